"""Sampling against diffusers' pipeline, hand-written formulas and exact networks; image-to-image and trajectories."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from tests import gaussian
from tests.arrays import normal
from tests.models import quiet, tiny_pipe, tiny_unet
from tests.oracles import GaussianUNet
from tests.schedules import alpha_bar_table

T = 4  # few diffusion timesteps, but every branch is taken
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
randn = partial(normal, dtype=torch.float32)


def make_pipe(channels=1, num_train_timesteps=T, **options):
    return tiny_pipe(channels, num_train_timesteps=num_train_timesteps, **options)


@pytest.fixture
def pipe():
    return make_pipe()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, *args, **options):
    return pipe(*args, output_type="latent", return_dict=False, **options)[0]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gaussian_pipe(scheduler, channels=1, mean=0.1, std=0.2):
    """In float32, for the default beta schedule. With std 0 all the data is one image, `mean`."""
    unet = GaussianUNet(DDPMScheduler(), mean=mean, std=std, channels=channels, dtype=torch.float32)
    return quiet(DDPMPipeline(unet, scheduler))


# ---- Against diffusers' pipeline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "output_type", "options"),
    [
        (10, "pt", {}),
        (5, "np", {"timestep_spacing": "trailing"}),
        (7, "np", {"timestep_spacing": "linspace", "variance_type": "fixed_small_log", "clip_sample": False}),
        (10, "pil", {"prediction_type": "v_prediction"}),
    ],
)
def test_same_numbers_as_the_built_in_pipeline(steps, output_type, options):
    unet = tiny_unet(3)
    built_in = quiet(BuiltInDDPMPipeline(unet, BuiltInDDPMScheduler(10, **options)))
    ours = quiet(DDPMPipeline(unet, BuiltInDDPMScheduler(10, **options)))
    for make_generator in (seeded, lambda: [seeded(3), seeded(4)]):
        expected, actual = (
            pipe(2, make_generator(), steps, output_type, False)[0]  # positional arguments in the same order, too
            for pipe in (built_in, ours)
        )
        assert type(actual) is type(expected)
        if output_type == "pil":
            assert [image.mode for image in actual] == [image.mode for image in expected]
            actual, expected = (
                np.stack([np.asarray(image, dtype=int) for image in images]) for images in (actual, expected)
            )
            assert np.abs(actual - expected).max() <= 1
            assert (actual == expected).mean() > 0.99
        else:
            close(torch.as_tensor(actual), torch.as_tensor(expected))
            assert 0.2 < torch.as_tensor(actual).std() < 0.5  # neither grey nor black and white


def test_a_table_assigned_to_a_built_in_scheduler_is_kept():
    built_in = BuiltInDDPMScheduler(num_train_timesteps=20)
    built_in.alphas_cumprod = built_in.alphas_cumprod**3
    kept = DDPMPipeline(tiny_unet(), built_in).scheduler.alphas_cumprod
    assert torch.allclose(kept, built_in.alphas_cumprod, rtol=1e-6)


def test_only_a_built_in_ddpm_scheduler_is_replaced_by_ours():
    options = {"num_train_timesteps": 30, "beta_end": 0.03, "variance_type": "fixed_large", "steps_offset": 1}
    built_in = BuiltInDDPMScheduler(**options)
    pipe = DDPMPipeline(unet=tiny_unet(), scheduler=built_in)
    assert type(pipe.scheduler) is DDPMScheduler and isinstance(pipe, BuiltInDDPMPipeline)
    assert dict(pipe.scheduler.config) == dict(built_in.config)
    other = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert other.config == DPMSolverMultistepScheduler.from_config(built_in.config).config  # with its own defaults
    # positional arguments, which the built-in class takes for defaults, are kept
    positional = DDPMPipeline(
        tiny_unet(), BuiltInDDPMScheduler(30, 1e-3, 0.03, "linear", np.full(30, 0.1))
    ).scheduler.config
    assert (positional.num_train_timesteps, positional.beta_start, positional.beta_end) == (30, 1e-3, 0.03)
    assert np.array_equal(positional.trained_betas, np.full(30, 0.1))
    own, ddim = DDPMScheduler(30), DDIMScheduler(30)
    assert DDPMPipeline(tiny_unet(), own).scheduler is own
    assert DDPMPipeline(tiny_unet(), ddim).scheduler is ddim


# ---- Exact networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler_class", "options", "steps", "call", "tolerance"),
    [
        (DDPMScheduler, {}, None, {}, 0.0),
        (DDPMScheduler, {"variance_type": "fixed_large"}, None, {}, 0.005),
        (DDPMScheduler, {}, 100, {"eta": 0.0}, 0.03),
        (DDIMScheduler, {}, 100, {}, 0.03),
        (EulerDiscreteScheduler, {}, 100, {}, 0.03),
        (DPMSolverMultistepScheduler, {}, 25, {}, 0.005),
        (UniPCMultistepScheduler, {}, 25, {}, 0.005),
    ],
)
def test_samples_of_a_gaussian_have_its_mean_and_std(scheduler_class, options, steps, call, tolerance):
    """16,384 pixels, 4 standard errors, and for the std a relative tolerance for the discretization error.

    The last step of all of them gives E[x_0 | x_t], which has less variance than x_0: by Var E[x_0 | x_t] / Var x_0.
    """
    if "clip_sample" in scheduler_class().config:
        options = {"clip_sample": False, **options}
    pipe = gaussian_pipe(scheduler_class(timestep_spacing="trailing", **options))
    images = pipe(256, generator=seeded(), num_inference_steps=steps, output_type="pt", **call).images
    alpha_bar = pipe.unet.data.alpha_bar[int(pipe.scheduler.timesteps[-1])]
    std = 0.2 * math.sqrt(alpha_bar * 0.2**2 / (alpha_bar * 0.2**2 + 1 - alpha_bar))
    pixels = 2 * images.double() - 1
    n = pixels.numel()
    assert abs(pixels.mean() - 0.1) < 4 * std / math.sqrt(n)
    assert abs(pixels.std() / std - 1) < 4 / math.sqrt(2 * n) + tolerance, pixels.std() / std


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_data_of_one_image_is_sampled_exactly(channels):
    """In every output type; pixel values are rounded, not truncated, and clipped."""
    levels = torch.arange(channels * 12 * 16).view(channels, 12, 16) % 256
    offset = torch.tensor([-0.4, 0.0, 0.4]).repeat(levels.numel())[: levels.numel()].view(levels.shape)
    image = (levels + offset) / 127.5 - 1
    image[:, 0, 0], image[:, 0, 1] = -1.5, 1.5
    levels[:, 0, 0], levels[:, 0, 1] = 0, 255
    pipe = gaussian_pipe(DDPMScheduler(clip_sample=False, timestep_spacing="trailing"), channels, mean=image, std=0.0)
    options = {"seeds": [0, 1], "num_inference_steps": 5, "height": 12, "width": 16}
    x_0, pt, array = (pipe(output_type=kind, **options).images for kind in ("latent", "pt", "np"))
    expected = image.expand(2, -1, -1, -1)
    close(x_0, expected)
    close(pt, (expected / 2 + 0.5).clamp(0, 1))
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    if channels not in PIL_MODES:
        with pytest.raises(ValueError, match=f"{channels} channels.*give"):
            pipe(**options)
        return
    images = pipe(**options).images
    assert isinstance(images, list) and all(isinstance(image, Image.Image) for image in images)
    assert [(image.mode, image.size) for image in images] == [(PIL_MODES[channels], (16, 12))] * 2
    for image in images:
        assert np.array_equal(np.asarray(image).reshape(12, 16, channels), levels.permute(1, 2, 0).numpy())


def test_non_finite_weights_give_a_warning(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(math.nan)
    with pytest.warns(UserWarning, match="non-finite") as caught:
        (image,) = pipe().images
    assert image.size == (8, 8)
    assert [warning.filename for warning in caught] == [__file__]  # it names the user's line
    with pytest.warns(UserWarning, match="non-finite"):
        pipe(output_type="latent")


# ---- Random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_own_seed_alone(pipe, eta):
    seeds = [7, 8, 0, 123, 2**31, 5, 6, 2**32 - 1]
    batch = sample(pipe, seeds=seeds, eta=eta)
    for i, seed in enumerate(seeds):
        close(sample(pipe, seeds=seed, eta=eta)[0], batch[i])
    close(sample(pipe, seeds=seeds[::-1], eta=eta), batch.flip(0))
    close(sample(pipe, seeds=np.array(seeds[:6]), eta=eta), batch[:6])
    close(sample(pipe, seeds=np.int64(7), eta=eta), batch[:1])
    difference = (batch[:, None] - batch[None]).abs().amax(dim=(2, 3, 4)) + torch.eye(8)
    assert difference.min() > 0.1  # all images differ


def test_a_list_of_generators_equals_seeds(pipe):
    expected = sample(pipe, seeds=[3, 4])
    for sequence in (list, tuple):
        generators = sequence(seeded(seed) for seed in (3, 4))
        assert torch.equal(sample(pipe, 2, generator=generators), expected)
        assert not torch.equal(sample(pipe, 2, generator=generators), expected)  # their state has advanced
    assert torch.equal(sample(pipe, seeds=range(3, 5)), expected)
    assert torch.equal(sample(pipe, 2, seeds=(3, 4)), expected)
    assert torch.equal(sample(pipe, generator=[seeded(3)]), sample(pipe, seeds=3))


def test_the_global_generator_is_the_default(pipe):
    torch.manual_seed(11)
    first, second = sample(pipe), sample(pipe)
    torch.manual_seed(11)
    assert torch.equal(sample(pipe), first) and not torch.equal(first, second)


def test_sampling_starts_from_given_latents(pipe):
    generator = seeded(5)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    latents = noise.clone()
    close(sample(pipe, latents=latents, generator=generator), sample(pipe, 2, generator=seeded(5)), atol=0)
    assert torch.equal(latents, noise)
    wide = randn(1, 1, 6, 10)
    assert sample(pipe, latents=wide, eta=0).shape == (1, 1, 6, 10)
    assert torch.equal(sample(pipe, latents=wide.double(), eta=0), sample(pipe, latents=wide, eta=0))


# ---- Timesteps and sizes ---------------------------------------------------------------------------------------------


def algorithm_2(pipe, x_t, generator=None, eta=1.0):
    """Algorithm 2, DDPM, by hand over the schedule that is set, without classes."""
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(x_t.to(pipe.unet.dtype), t).sample.to(x_t.dtype)
            x_t = pipe.scheduler.step(output, t, x_t, generator=generator, ddim_eta=eta).prev_sample
    return x_t


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize(
    ("options", "timesteps"),
    [
        ({}, [5, 4, 3, 2, 1, 0]),
        ({"num_inference_steps": 3}, [5, 3, 1]),
        ({"num_inference_steps": 1}, [5]),
        ({"timesteps": [5, 3, 2]}, [5, 3, 2]),
        ({"timesteps": np.array([5, 0])}, [5, 0]),
        ({"timesteps": torch.tensor([3])}, [3]),
    ],
)
def test_timesteps_and_eta(options, timesteps, eta):
    pipe = make_pipe(num_train_timesteps=6)
    noise = randn(2, 1, 8, 8)
    actual = sample(pipe, latents=noise, generator=seeded(1), eta=eta, **options)
    assert pipe.scheduler.timesteps.tolist() == timesteps
    assert pipe.num_timesteps == len(timesteps)
    close(actual, algorithm_2(pipe, noise, seeded(1), eta=1.0 if eta is None else eta), atol=1e-6)
    if len(timesteps) > 1:
        other = algorithm_2(pipe, noise, seeded(1), eta=0.5 if eta is None else 1 - eta / 2)
        assert (other - actual).abs().max() > 0.001


def test_another_scheduler_keeps_its_own_default_of_eta():
    pipe = make_pipe(scheduler=DDIMScheduler(num_train_timesteps=10, timestep_spacing="trailing"))
    noise = randn(2, 1, 8, 8)
    default = sample(pipe, latents=noise, num_inference_steps=5)
    assert torch.equal(default, sample(pipe, latents=noise, num_inference_steps=5, eta=0.0))
    assert not torch.equal(default, sample(pipe, latents=noise, num_inference_steps=5, eta=1.0))
    built_in = quiet(DDIMPipeline(pipe.unet, pipe.scheduler))
    expected = built_in(2, generator=seeded(3), num_inference_steps=5, output_type="np").images
    close(*(torch.as_tensor(x) for x in (pipe(2, seeded(3), 5, "np").images, expected)))
    pipe.scheduler = EulerDiscreteScheduler(10, timestep_spacing="trailing")
    assert sample(pipe, seeds=1, timesteps=[9, 4, 0]).isfinite().all() and pipe.num_timesteps == 3


def test_image_sizes():
    assert sample(make_pipe(sample_size=(6, 10)), seeds=1).shape == (1, 1, 6, 10)
    assert sample(make_pipe(sample_size=(6, 10)), seeds=1, height=8).shape == (1, 1, 8, 10)
    assert sample(make_pipe(sample_size=None), seeds=1, height=4, width=12).shape == (1, 1, 4, 12)
    assert sample(make_pipe(sample_size=None), latents=randn(3, 1, 4, 12)).shape == (3, 1, 4, 12)
    assert sample(make_pipe(), seeds=1, width=12).shape == (1, 1, 8, 12)
    assert make_pipe()(seeds=[1, 2, 3], height=4, width=6).images[2].size == (6, 4)


# ---- Callbacks, interruption, gradients ------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_can_replace_latents():
    pipe, steps = make_pipe(scheduler=DDPMScheduler(T, timestep_spacing="trailing")), []

    def record(called_with, step, t, tensors):
        assert called_with is pipe and list(tensors) == ["latents"]
        steps.append((step, t, tensors["latents"]))

    options = {"seeds": [1, 2], "eta": 0.0}
    result = sample(pipe, callback_on_step_end=record, **options)
    assert torch.equal(result, sample(pipe, **options))  # recording changes nothing
    assert [entry[:2] for entry in steps] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert torch.equal(steps[-1][2], result)
    starts = [step.x_t for step in pipe.trajectory(**options)]
    assert all(torch.equal(end, start) for (*_, end), start in zip(steps, starts[1:]))

    other = randn(2, 1, 8, 8, seed=9)

    def replace(pipe, step, t, tensors):
        return {"latents": other} if step == 1 else {}

    replaced = sample(pipe, callback_on_step_end=replace, **options)
    close(replaced, sample(pipe, latents=other, timesteps=[1, 0], eta=0.0), atol=0)
    assert (replaced - result).abs().max() > 0.01

    tensors = []
    options |= {"callback_on_step_end": lambda *args: tensors.append(args[3]), "callback_on_step_end_tensor_inputs": []}
    sample(pipe, **options)
    assert tensors == [{}] * T


def test_interrupt_stops_after_the_current_step(pipe):
    ends = []

    def stop(pipe, step, t, tensors):
        ends.append(tensors["latents"])
        if step == 1:
            pipe.interrupt = True

    stopped = sample(pipe, seeds=1, callback_on_step_end=stop)
    assert len(ends) == 2 and pipe.interrupt
    assert torch.equal(stopped, ends[1])
    complete = sample(
        pipe, seeds=1, callback_on_step_end=lambda pipe, step, t, tensors: ends.append(tensors["latents"])
    )
    assert len(ends) == 2 + T and not pipe.interrupt  # the next run is complete
    assert torch.equal(ends[3], stopped) and not torch.equal(complete, stopped)


def test_the_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3)
    assert capsys.readouterr().err == ""


def test_no_gradients_are_kept_and_tuples_are_returned(pipe):
    pipe.unet.requires_grad_(True)
    as_tuple = pipe(seeds=1, output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1 and not as_tuple[0].requires_grad
    assert torch.equal(as_tuple[0], pipe(seeds=1, output_type="pt").images)
    for step in pipe.trajectory(seeds=1):
        assert not step.x_t.requires_grad and not step.x_0_pred.requires_grad
        assert torch.is_grad_enabled()  # between the steps the caller's own grad mode holds


@pytest.mark.parametrize(("dtype", "sampling_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_sampling_is_in_float32_or_float64(dtype, sampling_dtype):
    pipe = make_pipe(dtype=dtype)
    noise = randn(2, 1, 8, 8, dtype=sampling_dtype)
    actual = sample(pipe, latents=noise, eta=0.0)
    assert pipe.unet.dtype == dtype and actual.dtype == sampling_dtype
    assert all(step.x_t.dtype == step.x_0_pred.dtype == sampling_dtype for step in pipe.trajectory(seeds=1))
    close(actual, algorithm_2(pipe, noise, eta=0.0), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    if dtype == torch.bfloat16:
        assert not torch.equal(actual, actual.to(dtype).float())  # more digits than the network has
        close(actual, sample(make_pipe(), latents=noise, eta=0.0), atol=0.05)
        guided = make_pipe(dtype=dtype, num_class_embeds=3)
        assert sample(guided, seeds=[1, 2], class_labels=1, guidance_scale=2.0).dtype == sampling_dtype


# ---- Trajectories ----------------------------------------------------------------------------------------------------


def test_the_trajectory_goes_from_noise_to_the_image():
    pipe = gaussian_pipe(DDPMScheduler(timestep_spacing="trailing", clip_sample=False), mean=0.3, std=0.2)
    steps = list(pipe.trajectory(64, generator=seeded(), num_inference_steps=200))
    assert [step.t for step in steps] == list(range(999, 0, -5))
    assert all(isinstance(step.t, int) and step.x_t.shape == step.x_0_pred.shape == (64, 1, 8, 8) for step in steps)
    n = steps[0].x_t.numel()
    assert abs(steps[0].x_t.mean()) < 4 / math.sqrt(n)
    assert abs(steps[0].x_t.std() - 1) < 4 / math.sqrt(2 * n)
    for step in steps[::9]:  # Eq. 4 at every step, up to the discretization error of the std
        alpha_bar = alpha_bar_table(pipe.scheduler)[step.t].item()
        std = math.sqrt(alpha_bar * 0.04 + 1 - alpha_bar)
        assert abs(step.x_t.mean() - math.sqrt(alpha_bar) * 0.3) < 4 * std / math.sqrt(n) + 0.005
        assert abs(step.x_t.std() / std - 1) < 4 / math.sqrt(2 * n) + 0.1
    image = sample(pipe, 64, generator=seeded(), num_inference_steps=200)
    assert torch.equal(steps[-1].x_0_pred, image)
    distance = [(step.x_0_pred - image).square().mean().item() for step in steps[100::20]]
    assert all(earlier > later for earlier, later in zip(distance, distance[1:]))


def test_the_trajectory_takes_the_arguments_of_a_call():
    pipe = make_pipe(num_class_embeds=3)
    latents = randn(2, 1, 4, 12)
    options = {"class_labels": [0, 1], "guidance_scale": 2.0, "latents": latents, "timesteps": [3, 1], "eta": 0.0}
    first, second = pipe.trajectory(**options)
    assert (first.t, second.t) == (3, 1)
    assert torch.equal(first.x_t, latents)
    assert torch.equal(second.x_0_pred, sample(pipe, **options))
    assert torch.equal(latents, randn(2, 1, 4, 12))
    for x_t in (first.x_t, second.x_t):  # yielded tensors are not modified in place
        assert not torch.equal(x_t, second.x_0_pred)
    with pytest.raises(ValueError, match="eta is 2"):
        pipe.trajectory(class_labels=0, eta=2)  # at once, not at the first step


def test_schedulers_without_x_0_prediction_give_none_in_a_trajectory():
    pipe = make_pipe(scheduler=DPMSolverMultistepScheduler(100, timestep_spacing="trailing"))
    steps = list(pipe.trajectory(seeds=1, num_inference_steps=5))
    assert len(steps) == 5 and all(step.x_0_pred is None for step in steps)
    pipe.scheduler = DDIMScheduler(100, timestep_spacing="trailing")
    assert all(step.x_0_pred.shape == (1, 1, 8, 8) for step in pipe.trajectory(seeds=1, num_inference_steps=5))


def test_a_trajectory_from_an_image_follows_eq_4_and_samples_from_there():
    pipe = gaussian.gaussian_pipe(size=32)
    x_0 = torch.full((2, 1, 32, 32), 0.7, dtype=torch.float64)
    steps = list(pipe.trajectory(image=x_0, seeds=[1, 2], num_inference_steps=200, eta=0.0))
    forward, reverse = steps[:200], steps[200:]
    assert [step.t for step in forward] == [step.t for step in reverse][::-1]
    for step in forward:
        a = alpha_bar_table(pipe.scheduler)[step.t].item()
        noise = (step.x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
        assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * 2048) and abs(noise.mean().item()) < 4 / math.sqrt(2048)
        assert torch.equal(step.x_0_pred, x_0)
    assert torch.equal(reverse[0].x_t, forward[-1].x_t)
    assert reverse[-1].x_0_pred.std() == pytest.approx(gaussian.STD, rel=0.1)


# ---- Image-to-image --------------------------------------------------------------------------------------------------


def test_strength_goes_from_the_image_to_a_fresh_sample():
    pipe, x_0 = tiny_pipe(), gaussian.gaussian_images(3, dtype=torch.float32)
    seeds = [4, 5, 6]
    same = pipe.vary(x_0, 0, 10, seeds=seeds, output_type="latent").images
    fresh = pipe.vary(x_0, 1, 10, seeds=seeds, output_type="latent").images
    assert torch.equal(same, x_0)
    assert torch.equal(fresh, sample(pipe, seeds=seeds, num_inference_steps=10))
    pipe = gaussian.gaussian_pipe()
    x_0 = gaussian.gaussian_images(64, dtype=torch.float64)
    options = {"seeds": range(64), "eta": 0.0, "output_type": "latent"}
    distances = [(pipe.vary(x_0, s, 50, **options).images - x_0).square().mean().item() for s in (0.1, 0.3, 0.6, 1.0)]
    assert distances == sorted(distances) and distances[-1] == pytest.approx(2 * gaussian.STD**2, rel=0.1)


# ---- from_pipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_from_pipe_leaves_its_source_unchanged(dtype):
    source = BuiltInDDPMPipeline(tiny_unet().to(dtype), BuiltInDDPMScheduler(T, beta_end=0.03))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = quiet(DDPMPipeline.from_pipe(source))
    assert type(pipe) is DDPMPipeline and type(pipe.scheduler) is DDPMScheduler
    assert type(source.scheduler) is BuiltInDDPMScheduler
    assert pipe.unet is source.unet and source.unet.dtype == dtype
    assert pipe.scheduler.config.beta_end == 0.03
    assert sample(pipe, seeds=1).isfinite().all()
    ddim = DDPMPipeline.from_pipe(DDIMPipeline(source.unet, DDIMScheduler(T)))
    assert isinstance(ddim.scheduler, DDIMScheduler) and ddim.unet.dtype == dtype
    assert DDPMPipeline.from_pipe(source, dtype=torch.float32).unet.dtype == torch.float32
