"""Where diffusers' DDPMScheduler can stand, ours stands too and gives the same numbers: in pipelines that other people
wrote, and in code that uses its tables, its timesteps and its methods."""

import copy
import functools
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.experimental import ValueGuidedRLPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.pipelines.deprecated.audio_diffusion.pipeline_audio_diffusion import AudioDiffusionPipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_img2img import KandinskyV22Img2ImgPipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import KandinskyV22InpaintPipeline
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image

from ddpm_pipeline.scheduling_ddpm import BETA_SCHEDULES, PREDICTION_TYPES, VARIANCE_TYPES, DDPMScheduler
from tests.arrays import normal, random_images
from tests.models import tiny_unet

SOURCE = Path(diffusers.__file__).parent


def seeded():
    return torch.Generator().manual_seed(0)


def images(size=16):
    return Image.fromarray(random_images(size, size, 3))


# ---- Tiny networks, the same weights for each call -------------------------------------------------------------------


def with_fixed_weights(make):
    """One network for both schedulers: it has no state."""

    @functools.cache
    def cached():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make().eval()

    return cached


@with_fixed_weights
def vqvae():
    return VQModel(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=3, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@with_fixed_weights
def movq():
    return VQModel(
        block_out_channels=(32, 32), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        vq_embed_dim=4, norm_type="spatial", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip


@with_fixed_weights
def vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


@with_fixed_weights
def transformer():
    return DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=4, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        out_channels=8, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
    )  # fmt: skip


def kandinsky_unet(in_channels):
    return UNet2DConditionModel(
        in_channels=in_channels, out_channels=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        addition_embed_type="image", encoder_hid_dim=8, encoder_hid_dim_type="image_proj", cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


kandinsky_unet_4, kandinsky_unet_9 = (
    with_fixed_weights(functools.partial(kandinsky_unet, channels)) for channels in (4, 9)
)


@with_fixed_weights
def rl_unet():
    return UNet1DModel(
        in_channels=5, out_channels=5, block_out_channels=(8, 16), layers_per_block=1, act_fn="swish",
        norm_num_groups=4,
        down_block_types=("DownResnetBlock1D",) * 2, mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D",), out_block_type="OutConv1DBlock", time_embedding_type="positional",
        use_timestep_embedding=True, freq_shift=1.0, flip_sin_to_cos=False,
    )  # fmt: skip


class Value(torch.nn.Module):
    """A value function for a trajectory (B, 5, H)."""

    def forward(self, x, timesteps):
        return SimpleNamespace(sample=x.square().mean((1, 2))[:, None])


class Mel:
    """Stands for the converter of audio, which needs librosa."""

    x_res = y_res = 8
    hop_length = 1

    def get_sample_rate(self):
        return 1

    def load_audio(self, audio_file=None, raw_audio=None):
        pass

    def audio_slice_to_image(self, number):
        return Image.fromarray(random_images(8, 8))

    def image_to_audio(self, image):
        return np.asarray(image, dtype=np.float32).ravel()


class Env:
    observation_space, action_space = SimpleNamespace(shape=(3,)), SimpleNamespace(shape=(2,))

    def get_dataset(self):
        return {"observations": np.eye(3, dtype=np.float32), "actions": np.eye(2, dtype=np.float32)}


def tiny_3(**options):
    return tiny_unet(3, **options)


def kandinsky(pipeline, unet, scheduler, **inputs):
    embeds = {"image_embeds": normal(1, 8, dtype=torch.float32), "negative_image_embeds": torch.zeros(1, 8)}
    size = {"height": 16, "width": 16, "num_inference_steps": 4, "generator": seeded(), "output_type": "np"}
    return pipeline(unet(), scheduler, movq())(**embeds, **inputs, **size).images


def value_guided(scheduler):
    pipe = ValueGuidedRLPipeline(Value(), rl_unet(), scheduler, Env())
    scheduler.set_timesteps(8)
    return pipe(np.ones(3, dtype=np.float32), batch_size=4, planning_horizon=8)


def audio(scheduler, **options):
    return AudioDiffusionPipeline(None, tiny_unet(), Mel(), scheduler)(
        steps=6, generator=seeded(), step_generator=seeded(), **options
    ).audios


# What a user of the pipeline gets from it: a function of the scheduler.
PIPELINES = {
    "DDPMPipeline": lambda s: BuiltInDDPMPipeline(tiny_3(), s)(2, seeded(), 8, "np").images,
    "LDMPipeline": lambda s: LDMPipeline(vqvae(), tiny_3(), s)(2, seeded(), num_inference_steps=8, output_type="np")[0],
    "LDMPipeline, eta 1": lambda s: LDMPipeline(vqvae(), tiny_3(), s)(2, seeded(), 1.0, 8, "np")[0],
    "LDMSuperResolutionPipeline": lambda s: LDMSuperResolutionPipeline(
        vqvae(), tiny_unet(6, out_channels=3), s
    )(images(32), num_inference_steps=4, generator=seeded(), output_type="np").images,
    "DiTPipeline": lambda s: DiTPipeline(transformer(), vae(), s)(
        [1, 2], num_inference_steps=4, generator=seeded(), output_type="np"
    ).images,
    "KandinskyV22Pipeline": lambda s: kandinsky(KandinskyV22Pipeline, kandinsky_unet_4, s),
    "KandinskyV22Img2ImgPipeline": lambda s: kandinsky(
        KandinskyV22Img2ImgPipeline, kandinsky_unet_4, s, image=images(64), strength=0.6
    ),
    "KandinskyV22InpaintPipeline": lambda s: kandinsky(
        KandinskyV22InpaintPipeline, kandinsky_unet_9, s, image=images(64), mask_image=np.eye(64, dtype=np.float32)
    ),
    "AudioDiffusionPipeline": audio,
    "AudioDiffusionPipeline, from audio": lambda s: audio(s, raw_audio=np.zeros(9), start_step=2, mask_start_secs=1),
    "ValueGuidedRLPipeline": value_guided,
}  # fmt: skip
CONFIGS = {
    "default": {},
    "other": {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace", "clip_sample_range": 2.0},
    "v_prediction": {"prediction_type": "v_prediction", "variance_type": "fixed_large", "thresholding": True},
    "fixed_small_log": {"variance_type": "fixed_small_log", "prediction_type": "sample"},
}


def both(**options):
    return BuiltInDDPMScheduler(**options), DDPMScheduler(**options)


def run(name, scheduler):
    torch.manual_seed(0)  # some take no generator
    return np.asarray(PIPELINES[name](scheduler))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_diffusers(name, config):
    theirs, ours = both(**CONFIGS[config])
    expected, actual = (run(name, scheduler) for scheduler in (theirs, ours))
    assert expected.std() > 0
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"])
def test_pipelines_of_diffusers_with_learned_variance(name):
    theirs, ours = both(variance_type="learned_range")
    expected, actual = (run(name, scheduler) for scheduler in (theirs, ours))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_pipelines_of_diffusers_save_the_built_in_class(tmp_path):
    """So that their folders load where this package is not installed."""
    pipe = LDMPipeline(vqvae(), tiny_3(), DDPMScheduler(50, prediction_type="sample"))
    pipe.save_pretrained(tmp_path)
    loaded = LDMPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is BuiltInDDPMScheduler
    assert (loaded.config.num_train_timesteps, loaded.config.prediction_type) == (50, "sample")
    assert type(pipe.scheduler).__module__ == "ddpm_pipeline.scheduling_ddpm"


def test_step_takes_nothing_that_pipelines_look_for_and_the_built_in_one_lacks():
    """Pipelines inspect the signature, and then pass a default of theirs: eta is 0."""
    pattern = re.compile(r'"(\w+)" in (?:set\()?inspect\.signature\(\S*scheduler\.(\w+)')
    files = [*SOURCE.glob("pipelines/**/*.py"), *SOURCE.glob("experimental/**/*.py")]
    looked_for = {match for file in files for match in pattern.findall(file.read_text(encoding="utf-8"))}
    assert {("eta", "step"), ("generator", "step"), ("timesteps", "set_timesteps")} <= looked_for
    for argument, method in looked_for:
        theirs, ours = (inspect.signature(getattr(s, method)).parameters for s in both())
        assert (argument in ours) == (argument in theirs), (argument, method)
    theirs, ours = (list(inspect.signature(s.step).parameters) for s in both())
    assert ours[: len(theirs)] == theirs


# ---- Tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [schedule for schedule in BETA_SCHEDULES if schedule != "su"])
def test_public_tables(schedule):
    theirs, ours = both(beta_schedule=schedule)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps", "one"):
        expected, actual = getattr(theirs, name), getattr(ours, name)
        assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, expected.device), name
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def test_code_that_computes_x_t_itself():
    """As many training scripts do: the result goes into a float32 network, and a loss weight onto it."""
    network, x_0, noise, t = tiny_unet(), *(normal(2, 1, 8, 8, seed=i, dtype=torch.float32) for i in (0, 1)), [3, 600]
    results = []
    for scheduler in both():
        alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        weight = compute_snr(scheduler, torch.tensor(t)).clamp(max=5)
        loss = (weight * (network(x_t, torch.tensor(t)).sample - noise).square().mean((1, 2, 3))).mean()
        assert x_t.dtype == loss.dtype == torch.float32
        torch.testing.assert_close(scheduler.add_noise(x_0, noise, torch.tensor(t)), x_t)
        results.append(loss.item())
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def everything(scheduler):
    """What depends on alpha_bar and on the timesteps."""
    x, noise, t = normal(2, 1, 4, 4, dtype=torch.float32), normal(2, 1, 4, 4, seed=1, dtype=torch.float32), [5, 900]
    results = [scheduler.add_noise(x, noise, torch.tensor(t)), scheduler.get_velocity(x, noise, torch.tensor(t))]
    for t in scheduler.timesteps:
        x = scheduler.step(noise, t, x, generator=seeded()).prev_sample
        results.append(x)
    return results


def moved(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("cpu")
    scheduler.timesteps = scheduler.timesteps.to("cpu")


def other_schedule(scheduler):
    """Training scripts replace the tables, for example to rescale them to zero terminal SNR."""
    everything(scheduler)  # whatever was computed before is not used again
    scheduler.betas = torch.linspace(1e-3, 0.01, 1000)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)


def other_tables_in_place(scheduler):
    scheduler.alphas_cumprod *= 0.5


def registered(**options):
    """Training scripts of diffusers set prediction_type after the scheduler is made."""

    def change(scheduler):
        everything(scheduler)
        scheduler.register_to_config(**options)

    return change


def other_config(scheduler):
    """The constructors of Stable Diffusion's pipelines replace the config, to turn clipping off."""
    everything(scheduler)
    scheduler._internal_dict = FrozenDict({**scheduler.config, "clip_sample": False})


def part_of_the_timesteps(scheduler):
    scheduler.timesteps = scheduler.timesteps[3:]


def every_second_timestep(scheduler):
    everything(scheduler)
    scheduler.timesteps = scheduler.timesteps[::2]


def copied(scheduler):
    return copy.deepcopy(scheduler)


def pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


@pytest.mark.parametrize(
    "change",
    [
        moved, other_schedule, other_tables_in_place, part_of_the_timesteps, every_second_timestep, copied, pickled,
        other_config, registered(prediction_type="v_prediction"), registered(prediction_type="sample"),
        registered(clip_sample_range=2.0), registered(thresholding=True, sample_max_value=2.0),
    ],
)  # fmt: skip
def test_assigned_tables_timesteps_and_options_are_used(change):
    results = []
    for scheduler in both():
        scheduler.set_timesteps(20)
        changed = change(scheduler) or scheduler
        results.append(everything(changed))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_tables_of_another_length_are_refused():
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match=r"alphas_cumprod has shape \(10,\): give 1000 numbers"):
        scheduler.alphas_cumprod = torch.linspace(0.9, 0.1, 10)
    with pytest.raises(ValueError, match="timesteps are"):
        scheduler.timesteps = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="prediction_type is 'x_0': give one of"):
        scheduler.register_to_config(prediction_type="x_0")


def test_options_that_are_registered_go_to_other_schedulers():
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.register_to_config(prediction_type="v_prediction")
    for kind in (DDPMScheduler, BuiltInDDPMScheduler, DDIMScheduler):
        config = kind.from_config(scheduler.config).config
        assert config.prediction_type == "v_prediction" and config.clip_sample is False
    assert "beta_start" in scheduler.config["_use_default_values"]


class DerivedScheduler(DDPMScheduler):
    @register_to_config
    def __init__(self, num_train_timesteps=50, own=1):
        super().__init__(num_train_timesteps, prediction_type="sample")


def test_a_derived_class_has_options_of_its_own():
    scheduler = DerivedScheduler(own=2)
    assert scheduler.config.own == 2 and scheduler.config.prediction_type == scheduler.prediction_type == "sample"


# ---- Methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_get_variance(variance_type):
    """A method that diffusers' own pipelines call, whose meaning depends on the type."""
    predicted = normal(1, 1, 2, 2, dtype=torch.float32).clamp(-1, 1) if variance_type.startswith("learned") else None
    theirs, ours = both(variance_type=variance_type)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(50)
    for t in theirs.timesteps[:-1]:
        expected, actual = (s._get_variance(t, predicted_variance=predicted) for s in (theirs, ours))
        torch.testing.assert_close(actual.float(), expected, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(
            ours._get_variance(t, variance_type="fixed_small_log").float(),
            theirs._get_variance(t, variance_type="fixed_small_log"),
            rtol=2e-3,
            atol=1e-6,
        )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_samples_of_any_number_of_dimensions(shape, prediction_type):
    """Signals, images and videos."""
    theirs, ours = both(prediction_type=prediction_type)
    x, noise, t = (
        normal(*shape, dtype=torch.float32),
        normal(*shape, seed=1, dtype=torch.float32),
        torch.tensor([7, 70]),
    )
    for method in ("add_noise", "get_velocity"):
        torch.testing.assert_close(getattr(ours, method)(x, noise, t), getattr(theirs, method)(x, noise, t))
    expected, actual = (s.step(noise, 500, x, seeded()).prev_sample for s in (theirs, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "noise_shape", "t"),
    [
        ((1, 4, 4), (1, 1, 4, 4), [1, 20, 300]),
        ((1, 2, 4, 4), (3, 2, 4, 4), [9, 90, 900]),
        ((2, 1, 4, 4), (2, 3, 4, 4), [5]),
    ],
)
def test_noise_of_another_shape_is_broadcast(x_shape, noise_shape, t):
    theirs, ours = both()
    x, noise, t = (
        normal(*x_shape, dtype=torch.float32),
        normal(*noise_shape, seed=1, dtype=torch.float32),
        torch.tensor(t),
    )
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
