"""Class labels and classifier-free guidance: denoiser.py."""

from functools import partial

import numpy as np
import pytest
import torch

from ddpm_pipeline import DDPMScheduler
from tests.arrays import normal
from tests.gaussian import MEAN, gaussian_images, gaussian_pipe
from tests.models import tiny_pipe

T = 4
randn = partial(normal, dtype=torch.float32)


@pytest.fixture(scope="module")
def class_pipe():
    """A network whose output depends mostly on the class; class 2 is "no label"."""
    pipe = tiny_pipe(num_train_timesteps=T, num_class_embeds=3)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, **options):
    return pipe(output_type="latent", **options).images


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_guidance_is_the_formula_with_two_passes(learned, scale):
    """eps = eps_null + w (eps_class - eps_null), and the learned variance that of the class. In float64."""
    scheduler = DDPMScheduler(
        5, beta_end=0.5, clip_sample=False, variance_type="learned_range" if learned else "fixed_small"
    )
    options = {"num_class_embeds": 4, "out_channels": 6 if learned else 3}
    pipe = tiny_pipe(3, scheduler=scheduler, dtype=torch.float64, **options)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    labels, null = torch.tensor([2, 0]), torch.tensor([3, 3])
    x_t = noise = randn(2, 3, 8, 8, dtype=torch.float64)
    generator, effect_of_class = seeded(1), []
    for t in scheduler.timesteps:
        with torch.no_grad():
            with_class, without = (pipe.unet(x_t, t, class_labels=each).sample for each in (labels, null))
        effect_of_class.append((with_class - without).abs().amax(dim=(0, 2, 3)))
        eps = without[:, :3] + scale * (with_class[:, :3] - without[:, :3])
        output = torch.cat([eps, with_class[:, 3:]], dim=1)
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    assert torch.stack(effect_of_class).min() > 0.01  # in every channel
    actual = sample(pipe, latents=noise, generator=seeded(1), class_labels=labels, guidance_scale=scale)
    assert actual.dtype == torch.float64
    close(actual, x_t, atol=1e-10)
    assert pipe.guidance_scale == scale


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_labels_of_every_kind(class_pipe, scale):
    options = {"seeds": [3, 4], "guidance_scale": scale, "num_inference_steps": 2}
    expected = sample(class_pipe, class_labels=[1, 1], **options)
    for labels in (
        1,
        np.int64(1),
        torch.tensor(1),
        torch.tensor([1, 1]),
        np.array([1, 1]),
        (1, 1),
        torch.ones(2).int(),
    ):
        assert torch.equal(sample(class_pipe, class_labels=labels, **options), expected)
    other = sample(class_pipe, class_labels=[0, 1], **options)
    close(other[1], expected[1])
    assert (other[0] - expected[0]).abs().max() > 0.1
    # the length of a list is the batch size
    assert sample(class_pipe, class_labels=[0, 1, 2], generator=seeded(), guidance_scale=scale).shape == (3, 1, 8, 8)
    four = sample(class_pipe, class_labels=[0, 1, 0, 1], latents=randn(4, 1, 8, 8), guidance_scale=scale)
    assert four.shape == (4, 1, 8, 8)


def test_guidance_amplifies_the_effect_of_the_class():
    """In one step the image moves on the line from that of no label, 3 times as far with scale 3."""
    options = {"latents": randn(1, 1, 8, 8), "timesteps": [3], "class_labels": 0}
    pipe = tiny_pipe(scheduler=DDPMScheduler(T, clip_sample=False), num_class_embeds=3)
    without, once, thrice = (sample(pipe, guidance_scale=scale, **options) for scale in (0.0, 1.0, 3.0))
    close(without, sample(pipe, **{**options, "class_labels": 2}))
    close(thrice - without, 3 * (once - without))


FROM_IMAGES = {
    "vary": lambda pipe, images, **options: pipe.vary(images, 0.8, **options).images,
    "inpaint": lambda pipe, images, **options: pipe.inpaint(images, torch.eye(8), jump_length=2, **options).images,
}


@pytest.mark.parametrize("interval", [None, (200, 700)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("method", FROM_IMAGES)
def test_methods_from_images_guide_as_the_closed_form(method, prediction_type, interval):
    """With networks exact for N(m, s^2), whose prediction is linear in m, guidance is a step in the model of
    N(m_null + w (m_class - m_null), s^2). In float64."""
    shift, w = -0.2, 2.5  # of the mean, from one class to the next; class 2 is the null class
    pipe = gaussian_pipe(prediction_type, num_class_embeds=3, class_shift=shift)
    truth = gaussian_pipe(prediction_type)
    guided = []

    def set_mean(unet, arguments):
        is_guided = interval is None or interval[0] <= int(arguments[1]) < interval[1]
        guided.append(is_guided)
        unet.data.mean = MEAN + (2 * shift + w * (0 - 2 * shift) if is_guided else 0)

    truth.unet.register_forward_pre_hook(set_mean)
    options = {"seeds": [3, 4], "num_inference_steps": 10, "output_type": "latent"}
    expected = FROM_IMAGES[method](truth, gaussian_images(), **options)
    guidance = {"class_labels": 0, "guidance_scale": w, "guidance_interval": interval}
    actual = FROM_IMAGES[method](pipe, gaussian_images(), **options, **guidance)
    close(actual, expected, atol=1e-10)
    assert any(guided) and all(guided) == (interval is None)
    assert pipe.guidance_scale == w


@pytest.mark.parametrize("method", FROM_IMAGES)
def test_methods_from_images_with_scale_1_are_those_without_guidance(class_pipe, method):
    options = {"class_labels": [1, 0], "seeds": [3, 4], "num_inference_steps": T, "output_type": "latent"}
    images = gaussian_images(dtype=torch.float32)
    plain, once, thrice = (
        FROM_IMAGES[method](class_pipe, images, **options, **guidance)
        for guidance in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0})
    )
    assert torch.equal(plain, once)
    assert (plain - thrice).abs().max() > 0.01


def test_an_interval_without_guidance_is_a_warning(class_pipe):
    for method in (class_pipe, lambda **options: class_pipe.vary(torch.zeros(1, 8, 8), **options)):
        with pytest.warns(
            UserWarning, match=r"guidance_interval=\(0, 2\) has no effect: guidance_scale is 1"
        ) as caught:
            method(seeds=1, class_labels=0, guidance_interval=(0, 2))
        assert [warning.filename for warning in caught] == [__file__]


def test_variations_at_full_strength_are_guided_samples(class_pipe):
    options = {"class_labels": [1, 0], "seeds": [3, 4], "num_inference_steps": 3, "guidance_scale": 3.0}
    varied = class_pipe.vary(torch.zeros(2, 1, 8, 8), 1.0, output_type="latent", **options).images
    assert torch.equal(varied, sample(class_pipe, **options))


def test_networks_without_classes_and_with_class_embed_type():
    pipe = tiny_pipe(num_train_timesteps=T)
    with pytest.warns(UserWarning, match="guidance_scale=2.0.*no classes") as caught:
        guided = pipe(output_type="latent", seeds=1, guidance_scale=2.0).images
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(guided, sample(pipe, seeds=1))
    with pytest.warns(UserWarning, match="guidance_scale=2.0.*no classes") as caught:
        pipe.vary(torch.zeros(1, 8, 8), guidance_scale=2.0)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match=r"guidance_interval=\(0, 2\) has no effect: .* no classes") as caught:
        pipe(seeds=1, guidance_interval=(0, 2))
    assert [warning.filename for warning in caught] == [__file__]
    numbers = tiny_pipe(num_train_timesteps=T, class_embed_type="timestep")
    first, second = sample(numbers, seeds=[1, 1], class_labels=[0.5, 300.0])
    assert not torch.equal(first, second)
    close(sample(numbers, seeds=[1, 1], class_labels=300)[0], second)
    for options, message in (
        ({"class_labels": 3, "guidance_scale": 2.0}, "guidance_scale is 2.0"),
        ({}, "class_labels"),
    ):
        with pytest.raises(ValueError, match=message):
            numbers(**options)
