"""The way home against diffusers' own pipeline, formulas done by hand, and networks that know the answer."""

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler

T = 4  # a walk this short takes the paths of a long one
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def network(channels=1, network_class=UNet2DModel, **options):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    }
    return network_class(**{**settings, **options}).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipe(channels=1, num_train_timesteps=T, scheduler=None, dtype=torch.float32, **options):
    scheduler = scheduler or DDPMScheduler(num_train_timesteps, timestep_spacing="trailing")
    return quiet(DDPMPipeline(network(channels, **options).to(dtype), scheduler))


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def class_pipe():
    """A network for which the class is most of what there is to see; class 2 is "no label"."""
    pipe = make_pipe(num_class_embeds=3)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def latent(pipe, *args, **options):
    return pipe(*args, output_type="latent", return_dict=False, **options)[0]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class GaussianNetwork(UNet2DModel):
    """Knows that the data is N(m, s^2) in every pixel, and says E[eps | x_t]: minus the score times the noise's std.

    m may be a picture; with s = 0 that picture is all the data.
    """

    m, s = 0.1, 0.2
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha_bar = self.alpha_bar[int(timestep)].item()
        variance = alpha_bar * self.s**2 + 1 - alpha_bar
        return (math.sqrt(1 - alpha_bar) * (sample - math.sqrt(alpha_bar) * self.m) / variance,)


def gaussian_pipe(scheduler, channels=1, **data):
    pipe = quiet(DDPMPipeline(network(channels, GaussianNetwork), scheduler))
    for name, value in data.items():
        setattr(pipe.unet, name, value)
    return pipe


# ---- Beside diffusers' own pipeline ----------------------------------------------------------------------------------


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
    unet = network(3)
    theirs = quiet(BuiltInDDPMPipeline(unet, BuiltInDDPMScheduler(10, **options)))
    ours = quiet(DDPMPipeline(unet, BuiltInDDPMScheduler(10, **options)))
    for make in (seeded, lambda: [seeded(3), seeded(4)]):
        expected, actual = (
            pipe(2, make(), steps, output_type, False)[0]  # the same places, too
            for pipe in (theirs, ours)
        )
        assert type(actual) is type(expected)
        if output_type == "pil":
            assert [image.mode for image in actual] == [image.mode for image in expected]
            actual, expected = (
                np.stack([np.asarray(image, dtype=int) for image in each]) for each in (actual, expected)
            )
            assert np.abs(actual - expected).max() <= 1
            assert (actual == expected).mean() > 0.99
        else:
            close(torch.as_tensor(actual), torch.as_tensor(expected))
            assert 0.2 < torch.as_tensor(actual).std() < 0.5  # neither grey nor black and white


def test_a_built_in_scheduler_becomes_ours_and_any_other_stays():
    options = {"num_train_timesteps": 30, "beta_end": 0.03, "variance_type": "fixed_large", "steps_offset": 1}
    given = BuiltInDDPMScheduler(**options)
    pipe = DDPMPipeline(unet=network(), scheduler=given)
    assert type(pipe.scheduler) is DDPMScheduler and isinstance(pipe, BuiltInDDPMPipeline)
    assert dict(pipe.scheduler.config) == dict(given.config)
    other = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert other.config == DPMSolverMultistepScheduler.from_config(given.config).config  # with its own defaults
    # positional arguments, which the built-in class takes for defaults, are kept
    positional = DDPMPipeline(
        network(), BuiltInDDPMScheduler(30, 1e-3, 0.03, "linear", np.full(30, 0.1))
    ).scheduler.config
    assert (positional.num_train_timesteps, positional.beta_start, positional.beta_end) == (30, 1e-3, 0.03)
    assert np.array_equal(positional.trained_betas, np.full(30, 0.1))
    own, ddim = DDPMScheduler(30), DDIMScheduler(30)
    assert DDPMPipeline(network(), own).scheduler is own
    assert DDPMPipeline(network(), ddim).scheduler is ddim


# ---- Networks that know the answer -----------------------------------------------------------------------------------


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
def test_pictures_of_a_gaussian_have_its_mean_and_std(scheduler_class, options, steps, call, tolerance):
    """16,384 pixels, 4 standard errors, and for the std a relative tolerance for what so few steps miss.

    The last step of all of them gives E[x_0 | x_t], which has less variance than x_0: by Var E[x_0 | x_t] / Var x_0.
    """
    if "clip_sample" in scheduler_class().config:
        options = {"clip_sample": False, **options}
    pipe = gaussian_pipe(scheduler_class(timestep_spacing="trailing", **options))
    images = pipe(256, generator=seeded(), num_inference_steps=steps, output_type="pt", **call).images
    alpha_bar = pipe.unet.alpha_bar[int(pipe.scheduler.timesteps[-1])].item()
    std = 0.2 * math.sqrt(alpha_bar * 0.2**2 / (alpha_bar * 0.2**2 + 1 - alpha_bar))
    pixels = 2 * images.double() - 1
    n = pixels.numel()
    assert abs(pixels.mean() - 0.1) < 4 * std / math.sqrt(n)
    assert abs(pixels.std() / std - 1) < 4 / math.sqrt(2 * n) + tolerance, pixels.std() / std


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_a_network_that_knows_one_picture_gives_it(channels):
    """In every output type; bytes are rounded, not cut off, and what is beyond them is clipped."""
    levels = torch.arange(channels * 12 * 16).view(channels, 12, 16) % 256
    off = torch.tensor([-0.4, 0.0, 0.4]).repeat(levels.numel())[: levels.numel()].view(levels.shape)
    picture = (levels + off) / 127.5 - 1
    picture[:, 0, 0], picture[:, 0, 1] = -1.5, 1.5
    levels[:, 0, 0], levels[:, 0, 1] = 0, 255
    pipe = gaussian_pipe(DDPMScheduler(clip_sample=False, timestep_spacing="trailing"), channels, m=picture, s=0.0)
    options = {"seeds": [0, 1], "num_inference_steps": 5, "height": 12, "width": 16}
    x_0, pt, array = (pipe(output_type=kind, **options).images for kind in ("latent", "pt", "np"))
    expected = picture.expand(2, -1, -1, -1)
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


def test_weights_that_are_not_numbers_are_reported(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(math.nan)
    with pytest.warns(UserWarning, match="not finite") as caught:
        (image,) = pipe().images
    assert image.size == (8, 8)
    assert [warning.filename for warning in caught] == [__file__]  # it names the user's line
    with pytest.warns(UserWarning, match="not finite"):
        pipe(output_type="latent")


# ---- Which random numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_picture_depends_on_its_own_seed_alone(pipe, eta):
    seeds = [7, 8, 0, 123, 2**31, 5, 6, 2**32 - 1]
    batch = latent(pipe, seeds=seeds, eta=eta)
    for i, seed in enumerate(seeds):
        close(latent(pipe, seeds=seed, eta=eta)[0], batch[i])
    close(latent(pipe, seeds=seeds[::-1], eta=eta), batch.flip(0))
    close(latent(pipe, seeds=np.array(seeds[:6]), eta=eta), batch[:6])
    close(latent(pipe, seeds=np.int64(7), eta=eta), batch[:1])
    spread = (batch[:, None] - batch[None]).abs().amax(dim=(2, 3, 4)) + torch.eye(8)
    assert spread.min() > 0.1  # no two are alike


def test_a_list_of_generators_and_seeds_are_the_same(pipe):
    expected = latent(pipe, seeds=[3, 4])
    for many in (list, tuple):
        generators = many(seeded(seed) for seed in (3, 4))
        assert torch.equal(latent(pipe, 2, generator=generators), expected)
        assert not torch.equal(latent(pipe, 2, generator=generators), expected)  # they went on
    assert torch.equal(latent(pipe, seeds=range(3, 5)), expected)
    assert torch.equal(latent(pipe, 2, seeds=(3, 4)), expected)
    assert torch.equal(latent(pipe, generator=[seeded(3)]), latent(pipe, seeds=3))


def test_without_a_generator_the_global_one_is_taken(pipe):
    torch.manual_seed(11)
    first, second = latent(pipe), latent(pipe)
    torch.manual_seed(11)
    assert torch.equal(latent(pipe), first) and not torch.equal(first, second)


def test_latents_are_where_the_walk_starts(pipe):
    generator = seeded(5)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    given = noise.clone()
    close(latent(pipe, latents=given, generator=generator), latent(pipe, 2, generator=seeded(5)), atol=0)
    assert torch.equal(given, noise)
    wide = randn(1, 1, 6, 10)
    assert latent(pipe, latents=wide, eta=0).shape == (1, 1, 6, 10)
    assert torch.equal(latent(pipe, latents=wide.double(), eta=0), latent(pipe, latents=wide, eta=0))


# ---- Which steps -----------------------------------------------------------------------------------------------------


def walk_by_hand(pipe, x_t, generator=None, **options):
    """Algorithm 2, DDPM, over the schedule that is set, without classes."""
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(x_t.to(pipe.unet.dtype), t).sample.to(x_t.dtype)
            x_t = pipe.scheduler.step(output, t, x_t, generator=generator, **options).prev_sample
    return x_t


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, [5, 4, 3, 2, 1, 0]),
        ({"num_inference_steps": 3}, [5, 3, 1]),
        ({"num_inference_steps": 1}, [5]),
        ({"timesteps": [5, 3, 2]}, [5, 3, 2]),
        ({"timesteps": np.array([5, 0])}, [5, 0]),
        ({"timesteps": torch.tensor([3])}, [3]),
    ],
)
def test_schedules_and_eta(asked, steps, eta):
    pipe = make_pipe(num_train_timesteps=6)
    noise = randn(2, 1, 8, 8)
    actual = latent(pipe, latents=noise, generator=seeded(1), eta=eta, **asked)
    assert pipe.scheduler.timesteps.tolist() == steps
    assert pipe.num_timesteps == len(steps)
    close(actual, walk_by_hand(pipe, noise, seeded(1), eta=1.0 if eta is None else eta), atol=0)
    if len(steps) > 1:
        other = walk_by_hand(pipe, noise, seeded(1), eta=0.5 if eta is None else 1 - eta / 2)
        assert (other - actual).abs().max() > 0.001


def test_with_another_scheduler_eta_is_its_own_default():
    pipe = make_pipe(scheduler=DDIMScheduler(num_train_timesteps=10, timestep_spacing="trailing"))
    noise = randn(2, 1, 8, 8)
    plain = latent(pipe, latents=noise, num_inference_steps=5)
    assert torch.equal(plain, latent(pipe, latents=noise, num_inference_steps=5, eta=0.0))
    assert not torch.equal(plain, latent(pipe, latents=noise, num_inference_steps=5, eta=1.0))
    theirs = quiet(DDIMPipeline(pipe.unet, pipe.scheduler))
    expected = theirs(2, generator=seeded(3), num_inference_steps=5, output_type="np").images
    close(*(torch.as_tensor(x) for x in (pipe(2, seeded(3), 5, "np").images, expected)))
    pipe.scheduler = EulerDiscreteScheduler(10, timestep_spacing="trailing")
    assert latent(pipe, seeds=1, timesteps=[9, 4, 0]).isfinite().all() and pipe.num_timesteps == 3


def test_sizes():
    assert latent(make_pipe(sample_size=(6, 10)), seeds=1).shape == (1, 1, 6, 10)
    assert latent(make_pipe(sample_size=(6, 10)), seeds=1, height=8).shape == (1, 1, 8, 10)
    assert latent(make_pipe(sample_size=None), seeds=1, height=4, width=12).shape == (1, 1, 4, 12)
    assert latent(make_pipe(sample_size=None), latents=randn(3, 1, 4, 12)).shape == (3, 1, 4, 12)
    assert latent(make_pipe(), seeds=1, width=12).shape == (1, 1, 8, 12)
    assert make_pipe()(seeds=[1, 2, 3], height=4, width=6).images[2].size == (6, 4)


# ---- Classes and guidance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_guidance_is_the_formula_with_two_passes(learned, scale):
    """eps = eps_null + w (eps_class - eps_null), and the learned variance that of the class. In float64."""
    scheduler = DDPMScheduler(
        5, beta_end=0.5, clip_sample=False, variance_type="learned_range" if learned else "fixed_small"
    )
    options = {"num_class_embeds": 4, "out_channels": 6 if learned else 3}
    pipe = make_pipe(3, scheduler=scheduler, dtype=torch.float64, **options)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    labels, null = torch.tensor([2, 0]), torch.tensor([3, 3])
    x_t = noise = randn(2, 3, 8, 8, dtype=torch.float64)
    generator, weight_of_class = seeded(1), []
    for t in scheduler.timesteps:
        with torch.no_grad():
            with_class, without = (pipe.unet(x_t, t, class_labels=each).sample for each in (labels, null))
        weight_of_class.append((with_class - without).abs().amax(dim=(0, 2, 3)))
        eps = without[:, :3] + scale * (with_class[:, :3] - without[:, :3])
        output = torch.cat([eps, with_class[:, 3:]], dim=1)
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    assert torch.stack(weight_of_class).min() > 0.01  # the class is seen in every channel
    actual = latent(pipe, latents=noise, generator=seeded(1), class_labels=labels, guidance_scale=scale)
    assert actual.dtype == torch.float64
    close(actual, x_t, atol=1e-10)
    assert pipe.guidance_scale == scale


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_labels_of_any_kind(class_pipe, scale):
    options = {"seeds": [3, 4], "guidance_scale": scale, "num_inference_steps": 2}
    expected = latent(class_pipe, class_labels=[1, 1], **options)
    for labels in (
        1,
        np.int64(1),
        torch.tensor(1),
        torch.tensor([1, 1]),
        np.array([1, 1]),
        (1, 1),
        torch.ones(2).int(),
    ):
        assert torch.equal(latent(class_pipe, class_labels=labels, **options), expected)
    other = latent(class_pipe, class_labels=[0, 1], **options)
    close(other[1], expected[1])
    assert (other[0] - expected[0]).abs().max() > 0.1
    # the length of a list is that of the batch
    assert latent(class_pipe, class_labels=[0, 1, 2], generator=seeded(), guidance_scale=scale).shape == (3, 1, 8, 8)
    four = latent(class_pipe, class_labels=[0, 1, 0, 1], latents=randn(4, 1, 8, 8), guidance_scale=scale)
    assert four.shape == (4, 1, 8, 8)


def test_guidance_makes_more_of_the_class(class_pipe):
    """In one step, that is: the picture moves along the line from that of no label, 3 times as far with 3."""
    options = {"latents": randn(1, 1, 8, 8), "timesteps": [3], "class_labels": 0}
    pipe = make_pipe(scheduler=DDPMScheduler(T, clip_sample=False), num_class_embeds=3)
    without, once, thrice = (latent(pipe, guidance_scale=scale, **options) for scale in (0.0, 1.0, 3.0))
    close(without, latent(pipe, **{**options, "class_labels": 2}))
    close(thrice - without, 3 * (once - without))


def test_networks_without_classes_and_with_other_classes(pipe):
    with pytest.warns(UserWarning, match="guidance_scale=2.0.*no classes") as caught:
        guided = latent(pipe, seeds=1, guidance_scale=2.0)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(guided, latent(pipe, seeds=1))
    numbers = make_pipe(class_embed_type="timestep")
    first, second = latent(numbers, seeds=[1, 1], class_labels=[0.5, 300.0])
    assert not torch.equal(first, second)
    close(latent(numbers, seeds=[1, 1], class_labels=300)[0], second)
    for options, words in (({"class_labels": 3, "guidance_scale": 2.0}, "guidance_scale is 2.0"), ({}, "class_labels")):
        with pytest.raises(ValueError, match=words):
            numbers(**options)


# ---- While it runs ---------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_changes_it():
    pipe, seen = make_pipe(scheduler=DDPMScheduler(T, timestep_spacing="trailing")), []

    def look(given, step, t, tensors):
        assert given is pipe and list(tensors) == ["latents"]
        seen.append((step, t, tensors["latents"]))

    options = {"seeds": [1, 2], "eta": 0.0}
    result = latent(pipe, callback_on_step_end=look, **options)
    assert torch.equal(result, latent(pipe, **options))  # looking changes nothing
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert torch.equal(seen[-1][2], result)
    starts = [step.x_t for step in pipe.trajectory(**options)]
    assert all(torch.equal(end, start) for (*_, end), start in zip(seen, starts[1:]))

    other = randn(2, 1, 8, 8, seed=9)

    def replace(pipe, step, t, tensors):
        return {"latents": other} if step == 1 else {}

    replaced = latent(pipe, callback_on_step_end=replace, **options)
    close(replaced, latent(pipe, latents=other, timesteps=[1, 0], eta=0.0), atol=0)
    assert (replaced - result).abs().max() > 0.01

    given = []
    latent(
        pipe, callback_on_step_end=lambda *args: given.append(args[3]), callback_on_step_end_tensor_inputs=[], **options
    )
    assert given == [{}] * T


def test_interrupt_ends_the_walk_where_it_is(pipe):
    ends = []

    def stop(pipe, step, t, tensors):
        ends.append(tensors["latents"])
        if step == 1:
            pipe.interrupt = True

    stopped = latent(pipe, seeds=1, callback_on_step_end=stop)
    assert len(ends) == 2 and pipe.interrupt
    assert torch.equal(stopped, ends[1])
    whole = latent(pipe, seeds=1, callback_on_step_end=lambda pipe, step, t, tensors: ends.append(tensors["latents"]))
    assert len(ends) == 2 + T and not pipe.interrupt  # the next walk is a whole one
    assert torch.equal(ends[3], stopped) and not torch.equal(whole, stopped)


def test_the_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3)
    assert capsys.readouterr().err == ""


def test_no_gradients_are_kept_and_tuples_are_given(pipe):
    pipe.unet.requires_grad_(True)
    as_tuple = pipe(seeds=1, output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1 and not as_tuple[0].requires_grad
    assert torch.equal(as_tuple[0], pipe(seeds=1, output_type="pt").images)
    for step in pipe.trajectory(seeds=1):
        assert not step.x_t.requires_grad and not step.x_0_pred.requires_grad
        assert torch.is_grad_enabled()  # between the steps of a walk the user's own state holds


@pytest.mark.parametrize(("dtype", "walk_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_walk_is_wide_whatever_the_network_is(dtype, walk_dtype):
    pipe = make_pipe(dtype=dtype)
    noise = randn(2, 1, 8, 8, dtype=walk_dtype)
    actual = latent(pipe, latents=noise, eta=0.0)
    assert pipe.unet.dtype == dtype and actual.dtype == walk_dtype
    assert all(step.x_t.dtype == step.x_0_pred.dtype == walk_dtype for step in pipe.trajectory(seeds=1))
    close(actual, walk_by_hand(pipe, noise, eta=0.0), atol=0)
    if dtype == torch.bfloat16:
        assert not torch.equal(actual, actual.to(dtype).float())  # more digits than the network has
        close(actual, latent(make_pipe(), latents=noise, eta=0.0), atol=0.05)
        guided = make_pipe(dtype=dtype, num_class_embeds=3)
        assert latent(guided, seeds=[1, 2], class_labels=1, guidance_scale=2.0).dtype == walk_dtype


# ---- The walk itself -------------------------------------------------------------------------------------------------


def test_the_walk_goes_from_noise_to_the_picture():
    pipe = gaussian_pipe(DDPMScheduler(timestep_spacing="trailing", clip_sample=False), m=0.3, s=0.2)
    steps = list(pipe.trajectory(64, generator=seeded(), num_inference_steps=200))
    assert [step.t for step in steps] == list(range(999, 0, -5))
    assert all(isinstance(step.t, int) and step.x_t.shape == step.x_0_pred.shape == (64, 1, 8, 8) for step in steps)
    n = steps[0].x_t.numel()
    assert abs(steps[0].x_t.mean()) < 4 / math.sqrt(n)
    assert abs(steps[0].x_t.std() - 1) < 4 / math.sqrt(2 * n)
    for step in steps[::9]:  # Eq. 4 all along, but for what 200 steps miss of the std
        alpha_bar = pipe.scheduler.alphas_cumprod[step.t].item()
        std = math.sqrt(alpha_bar * 0.04 + 1 - alpha_bar)
        assert abs(step.x_t.mean() - math.sqrt(alpha_bar) * 0.3) < 4 * std / math.sqrt(n) + 0.005
        assert abs(step.x_t.std() / std - 1) < 4 / math.sqrt(2 * n) + 0.1
    picture = latent(pipe, 64, generator=seeded(), num_inference_steps=200)
    assert torch.equal(steps[-1].x_0_pred, picture)
    distance = [(step.x_0_pred - picture).square().mean().item() for step in steps[100::20]]
    assert all(earlier > later for earlier, later in zip(distance, distance[1:]))


def test_the_walk_takes_what_a_call_takes(class_pipe):
    latents = randn(2, 1, 4, 12)
    options = {"class_labels": [0, 1], "guidance_scale": 2.0, "latents": latents, "timesteps": [3, 1], "eta": 0.0}
    first, second = class_pipe.walk(**options)
    assert (first.t, second.t) == (3, 1)
    assert torch.equal(first.x_t, latents)
    assert torch.equal(second.x_0_pred, latent(class_pipe, **options))
    assert torch.equal(latents, randn(2, 1, 4, 12))
    for x_t in (first.x_t, second.x_t):  # what was yielded is not what is worked on
        assert not torch.equal(x_t, second.x_0_pred)
    with pytest.raises(ValueError, match="eta is 2"):
        class_pipe.walk(class_labels=0, eta=2)  # at once, not at the first step


def test_the_walk_of_schedulers_that_do_not_say_what_they_take_for_the_picture():
    pipe = make_pipe(scheduler=DPMSolverMultistepScheduler(100, timestep_spacing="trailing"))
    steps = list(pipe.trajectory(seeds=1, num_inference_steps=5))
    assert len(steps) == 5 and all(step.x_0_pred is None for step in steps)
    pipe.scheduler = DDIMScheduler(100, timestep_spacing="trailing")
    assert all(step.x_0_pred.shape == (1, 1, 8, 8) for step in pipe.trajectory(seeds=1, num_inference_steps=5))


# ---- from_pipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_from_pipe_leaves_its_source_alone(dtype):
    source = BuiltInDDPMPipeline(network().to(dtype), BuiltInDDPMScheduler(T, beta_end=0.03))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = quiet(DDPMPipeline.from_pipe(source))
    assert type(pipe) is DDPMPipeline and type(pipe.scheduler) is DDPMScheduler
    assert type(source.scheduler) is BuiltInDDPMScheduler
    assert pipe.unet is source.unet and source.unet.dtype == dtype
    assert pipe.scheduler.config.beta_end == 0.03
    assert latent(pipe, seeds=1).isfinite().all()
    ddim = DDPMPipeline.from_pipe(DDIMPipeline(source.unet, DDIMScheduler(T)))
    assert isinstance(ddim.scheduler, DDIMScheduler) and ddim.unet.dtype == dtype
    assert DDPMPipeline.from_pipe(source, dtype=torch.float32).unet.dtype == torch.float32


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": 2, "generator": [seeded()]}, "list of 1, but batch_size is 2"),
        ({"generator": []}, "list of 0"),
        ({"generator": seeded(), "seeds": [3]}, r"seeds=\[3\] are both given"),
        ({"seeds": []}, "seeds has 0 entries"),
        ({"batch_size": 4, "seeds": 7}, "seeds has 1 entries, but the batch has 4"),
        ({"batch_size": 4, "seeds": [7, 8]}, "seeds has 2 entries, but the batch has 4"),
        ({"seeds": [1.5]}, "seeds is 1.5"),
        ({"seeds": [1, -1]}, "seeds is -1"),
        ({"seeds": [2**32]}, f"seeds is {2**32}"),
        ({"seeds": [1], "latents": randn(3, 1, 8, 8)}, "seeds has 1 entries, but the batch has 3"),
        ({"seeds": [1, 2], "latents": randn(3, 1, 8, 8)}, "seeds has 2 entries, but the batch has 3"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": T + 1}, f"num_inference_steps is {T + 1}.*from 1 to {T}"),
        ({"num_inference_steps": 2.5}, "2.5"),
        ({"timesteps": [2, 1], "num_inference_steps": 2}, "num_inference_steps=2"),
        ({"timesteps": [1, 2]}, r"\[1, 2\]"),
        ({"timesteps": [4, 2]}, "4"),
        ({"timesteps": []}, r"\[\]"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"class_labels": [1]}, r"class_labels is \[1\], but this network has no classes"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\).*\(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(1, 8, 8)}, r"\(1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8), "batch_size": 3}, "latents has 2 entries, but the batch has 3"),
        ({"latents": torch.zeros(1, 1, 8, 8), "height": 6}, r"\(1, 1, 8, 8\).*\(1, 1, 6, 8\)"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "int64"),
        ({"latents": torch.zeros(1, 1, 7, 8)}, "height is 7.*multiples of 2"),
        ({"height": 7}, "height is 7.*multiples of 2"),
        ({"width": 0}, "width is 0"),
        ({"width": -2}, "width is -2"),
        ({"height": 8.0}, "height is 8.0"),
        ({"output_type": "jpg"}, "output_type is 'jpg'.*'pil', 'np', 'pt', 'latent'"),
        ({"output_type": None}, "output_type is None"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt"]}, r"\['prompt'\].*\['latents'\]"),
    ],
)
def test_bad_input_is_named(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(**options)
    if not {"output_type", "callback_on_step_end_tensor_inputs"} & set(options):
        with pytest.raises(ValueError, match=words):
            pipe.trajectory(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"class_labels is None.*\[0, 3\)"),
        ({"class_labels": 3}, r"class_labels is 3.*\[0, 3\)"),
        ({"class_labels": [0, -1]}, r"\[0, -1\]"),
        ({"class_labels": [0.5]}, "0.5"),
        ({"class_labels": [[0, 1]]}, r"\[\[0, 1\]\]"),
        ({"class_labels": [0, 1], "batch_size": 3}, "class_labels has 2 entries, but the batch has 3"),
        ({"class_labels": [0], "latents": randn(2, 1, 8, 8)}, "class_labels has 1 entries, but the batch has 2"),
        ({"class_labels": [0, 1], "seeds": [1, 2, 3]}, "class_labels has 2 entries, but the batch has 3"),
        ({"class_labels": [0, 1], "seeds": 1}, "seeds has 1 entries, but the batch has 2"),
    ],
)
def test_bad_labels_are_named(class_pipe, options, words):
    with pytest.raises(ValueError, match=words):
        class_pipe(**options)


@pytest.mark.parametrize(
    ("scheduler", "options", "words"),
    [
        (DPMSolverMultistepScheduler(T), {"eta": 0.5}, "eta is 0.5, but DPMSolverMultistepScheduler"),
        (DDIMScheduler(T), {"timesteps": [3, 1]}, "timesteps are given, but DDIMScheduler"),
        (DDIMScheduler(T), {"eta": 2.0}, "eta is 2.0"),
        (DDIMScheduler(T), {"num_inference_steps": 9}, "num_inference_steps is 9"),
        (BuiltInDDPMScheduler(T), {"eta": 0.5}, "eta is 0.5, but DDPMScheduler"),
    ],
)
def test_what_another_scheduler_cannot_is_named(pipe, scheduler, options, words):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=words):
        pipe(**options)


def test_a_network_of_any_size_needs_to_be_told():
    for options in ({}, {"height": 8}, {"width": 8}):
        with pytest.raises(ValueError, match="sample_size None"):
            make_pipe(sample_size=None)(**options)
