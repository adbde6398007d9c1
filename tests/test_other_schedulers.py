"""Every scheduler class of diffusers in `pipe.scheduler`: images as right as DDIM's, or a ValueError that names it."""

import importlib
import inspect
import pkgutil

import diffusers
import diffusers.schedulers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.schedulers import COMPATIBLE
from tests.models import quiet, tiny_pipe
from tests.oracles import GaussianUNet


def all_schedulers():
    """By name, in every module of diffusers, exported or not."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        if module.name.rpartition(".")[2].startswith("scheduling_") and not module.name.endswith("_flax"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if inspect.isclass(value) and issubclass(value, SchedulerMixin) and value is not SchedulerMixin:
                    found[name] = value
    return found


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCHEDULERS = all_schedulers()
WITHOUT_X_0 = {  # they take no x_0-prediction, which they call "sample"
    "EulerAncestralDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
}  # fmt: skip
REQUIRED = {  # arguments without a default
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 2},
    "RFD4ProteinaScheduler": {"schedule_mode": "uniform", "noise_mode": "none", "tsr_k": 1, "translation_scale": 1},
}


def oracle(prediction_type="epsilon", mean=0.5, std=0.3):
    scheduler = DDPMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type=prediction_type)
    unet = GaussianUNet(scheduler, prediction_type, mean=mean, std=std, dtype=torch.float32)
    return quiet(DDPMPipeline(unet, scheduler))


def moments(pipe, steps=25):
    images = pipe(64, torch.Generator().manual_seed(0), steps, "latent").images
    return images.mean().item(), images.std().item()


def make(name, pipe, **options):
    """From the configuration of the pipeline's scheduler, as the documentation has it; without its fields where not."""
    try:
        return SCHEDULERS[name].from_config(pipe.scheduler.config, **REQUIRED.get(name, {}), **options)
    except Exception:
        try:
            return SCHEDULERS[name](**REQUIRED.get(name, {}))
        except Exception:
            return object.__new__(SCHEDULERS[name])  # whatever it needs, its name is enough


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_as_right_as_ddims_or_an_error(name):
    mean, std = -0.4, 0.2
    pipe = oracle(mean=mean, std=std)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ddim_mean, ddim_std = moments(pipe)
    pipe = oracle(mean=mean, std=std)
    pipe.scheduler = make(name, pipe)
    if name not in COMPATIBLE:
        with pytest.raises(ValueError, match=f"the scheduler is a {name}.*DDIMScheduler"):
            moments(pipe)
        return
    actual = moments(pipe)
    assert abs(actual[0] - mean) < abs(ddim_mean - mean) + 0.01
    # 25 steps of DDIM are too narrow by a part; ancestral noise in so few steps by a little more
    assert abs(actual[1] - std) < 1.4 * abs(ddim_std - std)


def test_the_list_has_no_class_that_does_not_exist():
    assert set(COMPATIBLE) <= set(SCHEDULERS)


@pytest.mark.parametrize("name", COMPATIBLE)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_are_right_or_an_error(name, prediction_type):
    pipe = oracle(prediction_type)
    pipe.scheduler = make(name, pipe)
    if prediction_type == "sample" and name in WITHOUT_X_0:
        with pytest.raises(ValueError, match="sample"):
            moments(pipe)
        return
    mean, std = moments(pipe)
    assert abs(mean - 0.5) < 0.03 and abs(std / 0.3 - 1) < 0.3


@pytest.mark.parametrize(
    ("scheduler_class", "options", "message"),
    [
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, "flow_prediction"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "continuous"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "log_linear"),
        (UniPCMultistepScheduler, {"predict_x0": False}, "predict_x0=False"),
        (UniPCMultistepScheduler, {"use_karras_sigmas": True}, None),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, None),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, None),
    ],
)
def test_options_that_make_a_class_another_family(scheduler_class, options, message):
    pipe = oracle()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    if message is not None:
        with pytest.raises(ValueError, match=f"{scheduler_class.__name__} has .*{message}"):
            moments(pipe)
        return
    mean, std = moments(pipe)
    assert abs(mean - 0.5) < 0.03 and abs(std / 0.3 - 1) < 0.3


def test_classes_of_the_users_own():
    class Derived(EDMEulerScheduler):
        pass

    class Careful(DDIMScheduler):
        pass

    pipe = oracle()
    pipe.scheduler = Careful.from_config(pipe.scheduler.config)
    assert moments(pipe)[0] == pytest.approx(0.5, abs=0.03)
    for wrong in (Derived(), object()):
        pipe.__dict__["scheduler"] = wrong
        with pytest.raises(ValueError, match=f"the scheduler is a {type(wrong).__name__}"):
            moments(pipe)


def test_betas_that_two_classes_have_by_default():
    """from_config leaves out what was left at a default, and the class has others; what is given stays."""
    pipe = oracle()
    pipe.scheduler = scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler is scheduler
    torch.testing.assert_close(scheduler.alphas_cumprod, DDPMScheduler().alphas_cumprod)
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.beta_end == 0.02
    pipe.scheduler = HeunDiscreteScheduler(beta_start=0.0002, beta_end=0.03, beta_schedule="scaled_linear")
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.0002, 0.03)


def test_a_network_that_predicts_a_variance():
    pipe = tiny_pipe(num_train_timesteps=20, out_channels=2)
    pipe.scheduler = DDPMScheduler(20)
    with pytest.raises(ValueError, match=r"predicts a variance of 1 channels.*learned_range"):
        pipe(seeds=[1])
    pipe.scheduler = DDPMScheduler(20, variance_type="learned_range", timestep_spacing="trailing", clip_sample=False)
    options = {"seeds": [1], "output_type": "latent"}
    deterministic = pipe(**options, eta=0).images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # it does not use the variance
    torch.testing.assert_close(pipe(**options, eta=0).images, deterministic, rtol=0, atol=1e-4)
    for scheduler_class in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMParallelScheduler):
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        assert pipe(**options).images.shape == (1, 1, 8, 8)
