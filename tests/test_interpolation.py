"""Interpolation: spherical means, distance-balanced weights, and `fuse` against closed forms of Gaussian data."""

import math
import warnings

import numpy as np
import pytest
import torch

from ddpm_pipeline import pipeline_ddpm
from ddpm_pipeline.features import Extractor
from ddpm_pipeline.images import squared_pixel_distance
from ddpm_pipeline.interpolation import MAX_BISECTIONS, bisect_weights, is_double_exposure, spherical_mean
from ddpm_pipeline.moons import render
from tests.gaussian import MEAN, STD, gaussian_images, gaussian_pipe
from tests.models import tiny_pipe
from tests.schedules import alpha_bar_table


def slerp(a, b, w):
    """Shoemake 1985, with the norms interpolated linearly."""
    angle = math.acos(torch.dot(a, b) / a.norm() / b.norm())
    direction = (math.sin((1 - w) * angle) * a / a.norm() + math.sin(w * angle) * b / b.norm()) / math.sin(angle)
    return direction * ((1 - w) * a.norm() + w * b.norm())


# ---- Spherical mean --------------------------------------------------------------------------------------------------


def test_the_mean_of_two_latents_is_slerp():
    latents = torch.randn(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    latents[0, 1] *= 1.5
    for w in (0.0, 0.1, 0.5, 0.9, 1.0):
        mean = spherical_mean(latents, torch.tensor([[1 - w, w]], dtype=torch.float64))
        expected = slerp(latents[0, 0].flatten(), latents[0, 1].flatten(), w).view(1, 1, 8, 8)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-10)
        if w in (0, 1):
            assert torch.equal(mean[0], latents[0, int(w)])


def test_the_mean_of_several_latents_minimizes_the_squared_angles():
    """For three axes with equal weights it is the diagonal; any perturbation increases the sum of squared angles."""
    axes = torch.eye(3, dtype=torch.float64).view(1, 3, 3, 1, 1)
    mean = spherical_mean(axes, torch.full((1, 3), 1 / 3, dtype=torch.float64)).flatten()
    torch.testing.assert_close(mean, torch.full((3,), 3**-0.5, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 12, 1, 1, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    mean = spherical_mean(latents, weights).flatten()
    assert mean.norm() == pytest.approx((weights[0] * latents.flatten(2).norm(dim=2)[0]).sum().item())

    def sum_of_squared_angles(point):
        cosines = torch.nn.functional.cosine_similarity(latents.flatten(2)[0], point[None])
        return (weights[0] * cosines.acos().square()).sum().item()

    least = sum_of_squared_angles(mean)
    for _ in range(50):
        perturbed = mean + 1e-3 * torch.randn(12, generator=generator, dtype=torch.float64)
        assert sum_of_squared_angles(perturbed) >= least - 1e-9


# ---- Distance-balanced weights ---------------------------------------------------------------------------------------


def test_balance_reaches_the_wanted_distance_ratios():
    pipe, x_0 = gaussian_pipe(), gaussian_images(6)
    ratios = [0.1, 0.25, 0.5, 0.8]
    fused = pipe.fuse(x_0[:3], x_0[3:], ratios, balance=True, num_inference_steps=20, output_type="latent")
    np.testing.assert_allclose(fused.distance_ratios, ratios * 3, atol=0.005)
    pairs = torch.arange(3).repeat_interleave(4)
    to_a, to_b = ((fused.images - ends[pairs]).square().flatten(1).mean(1) for ends in (x_0[:3], x_0[3:]))
    np.testing.assert_allclose((to_a / (to_a + to_b)).numpy(), fused.distance_ratios, atol=1e-12)
    assert fused.network_calls == pipe.unet.calls <= 20 * 4 + 20 * MAX_BISECTIONS


def test_balance_takes_another_distance():
    pipe, x_0 = gaussian_pipe(), gaussian_images(2)
    root = lambda x, y: squared_pixel_distance(x, y).sqrt()  # noqa: E731
    fused = pipe.fuse(x_0[0], x_0[1], 0.2, balance=True, distance=root, num_inference_steps=20, output_type="latent")
    to_a, to_b = ((fused.images[0] - x).square().mean().sqrt().item() for x in x_0)
    assert to_a / (to_a + to_b) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (lambda x, y: (x - y).abs().mean(), r"distance gives \(\) for two batches of 1 images: give numbers, \(1,\)"),
        (lambda x, y: (x - y).abs(), r"distance gives \(1, 1, 8, 8\) for two batches"),
        (lambda x, y: "far", r"distance gives str for two batches"),
        (lambda x, y: torch.full((len(x),), torch.nan), r"distance gives \[nan\]: give finite numbers of 0 or more"),
        (lambda x, y: -squared_pixel_distance(x, y), r"distance gives \[-\d+\.\d+\]: give finite"),
    ],
)
def test_a_distance_that_is_none_is_refused(distance, message):
    x_0 = gaussian_images(2)
    with pytest.raises(ValueError, match=message):
        gaussian_pipe().fuse(x_0[0], x_0[1], 0.2, balance=True, distance=distance, num_inference_steps=2)


class LeftHalf(torch.nn.Module):
    """Features for TorchScript: the pixels of the left half, of images of 8 x 8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :, :4].flatten(1)


def test_balance_in_features_of_a_file_or_an_extractor(tmp_path):
    pipe, x_0 = gaussian_pipe(), gaussian_images(2)
    file = tmp_path / "left.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(LeftHalf()).save(str(file))

    def fuse(distance):
        options = {"balance": True, "num_inference_steps": 20, "output_type": "latent", "distance": distance}
        return pipe.fuse(x_0[0], x_0[1], 0.2, **options)

    for distance in (file, str(file), Extractor("left", "key", LeftHalf())):
        fused = fuse(distance)
        to_a, to_b = ((fused.images[0] - x)[..., :4].square().mean().item() for x in x_0)
        assert to_a / (to_a + to_b) == pytest.approx(0.2, abs=0.006)
        assert fused.distance_ratios[0] == pytest.approx(to_a / (to_a + to_b), abs=1e-5)
    with pytest.raises(ValueError, match=r"^distance is '.*none\.pt', but this file does not exist"):
        fuse(tmp_path / "none.pt")


def test_bisection_on_steep_and_discontinuous_paths():
    """A ratio that jumps over its target gives the nearer side; paths are bisected together, each as long as needed."""
    paths = [lambda w: w, lambda w: w**8, lambda w: 0.9 * (w > 0.3) + 0.05, lambda w: 1 - (1 - w) ** 20]
    paths += [paths[2], lambda w: w + 0.1]  # the jump once more, and a path that misses its first endpoint
    batch_sizes = []

    def image_at(which, weights):
        batch_sizes.append(len(which))
        return torch.stack([paths[i](w) for i, w in zip(which.tolist(), weights)]).view(-1, 1, 1, 1).double()

    targets = torch.tensor([0.5, 0.5, 0.4, 0.25, 0.6, 0.0], dtype=torch.float64)
    weights, images = bisect_weights(image_at, lambda which, x: x.flatten(), targets, tolerance=0.005)
    for i, exact in ((0, 0.5), (1, 0.5 ** (1 / 8)), (3, 1 - 0.75 ** (1 / 20))):
        assert abs(images[i].item() - targets[i].item()) <= 0.005 and abs(weights[i].item() - exact) < 0.01, i
        assert images[i].item() == pytest.approx(float(paths[i](weights[i])))
    assert images[2].item() == pytest.approx(0.05) and images[4].item() == pytest.approx(0.95)  # and not the last one
    assert weights[5] == 0 and batch_sizes[0] == 6 and batch_sizes[1] == 4 and batch_sizes[-1] == 2
    assert len(batch_sizes) == MAX_BISECTIONS


# ---- fuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [False, True])
def test_endpoints_are_the_images(balance):
    pipe, x_0 = gaussian_pipe(), gaussian_images(4)
    fused = pipe.fuse(
        x_0[:2], x_0[2:], [0, 0.5, 1], balance=balance, num_inference_steps=20, output_type="latent",
        fixed_point_iterations=50,
    )  # fmt: skip
    images = fused.images.unflatten(0, (2, 3))
    assert (images[:, 0] - x_0[:2]).abs().max() < 1e-4 and (images[:, 2] - x_0[2:]).abs().max() < 1e-4
    assert fused.weights[0] == 0 and fused.weights[2] == 1 and len(fused.distance_ratios) == 6
    assert fused.distance_ratios[0] < 1e-6 and fused.distance_ratios[2] > 1 - 1e-6


def test_latent_interpolation_of_gaussian_images_is_the_closed_form():
    """Their deterministic sampler is linear: the fused image is slerp of the standardized images, scaled back."""
    pipe, x_0 = gaussian_pipe(), gaussian_images(2)
    options = {"num_inference_steps": 1000, "output_type": "latent", "fixed_point_iterations": 20}
    image = pipe.fuse(x_0[0], x_0[1], 0.3, **options).images[0]
    a = alpha_bar_table(pipe.scheduler)[-1].item()
    scale, shift = math.sqrt(a * STD**2 + 1 - a) / STD, math.sqrt(a) * MEAN
    latents = [(shift + scale * (x - MEAN)).flatten() for x in x_0]
    expected = (slerp(*latents, 0.3) - shift) / scale + MEAN
    assert (image.flatten() - expected.clamp(-1, 1)).abs().max() < 0.01


def test_the_noise_path_shares_noise_and_keeps_its_variance():
    """At weight 0.5 sampling starts from noise of standard deviation 1, not 0.71 as from a mean of two noises."""
    pipe, t = gaussian_pipe(size=64), 600
    starts = []
    pipe._sample = lambda run: starts.append(run.x_t) or run.x_t
    a, b = torch.full((1, 64, 64), 0.5), torch.full((1, 64, 64), -0.1)
    pipe.fuse(a, b, [0, 0.5, 1], path="noise", timestep=t, seeds=3)
    alpha_bar = alpha_bar_table(pipe.scheduler)[t].item()
    for x_t, mean in zip(starts[0], (0.5, 0.2, -0.1)):
        noise = (x_t - math.sqrt(alpha_bar) * mean) / math.sqrt(1 - alpha_bar)
        assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * 64 * 64) and abs(noise.mean().item()) < 4 / 64
        torch.testing.assert_close(noise, (starts[0][0] - math.sqrt(alpha_bar) * 0.5) / math.sqrt(1 - alpha_bar))
    assert pipe.scheduler.timesteps[0] == t  # and not one step later


def test_several_images():
    pipe, x_0 = gaussian_pipe(), gaussian_images(3)
    options = {"num_inference_steps": 20, "output_type": "latent", "fixed_point_iterations": 50}
    weights = [[1, 0, 0], [0.2, 0.3, 0.5]]
    fused = pipe.fuse(list(x_0), weight=weights, **options)
    assert (fused.images[0] - x_0[0]).abs().max() < 1e-4
    assert fused.distance_ratios is None and fused.weights == weights
    distances = [(fused.images[1] - x).square().mean().item() for x in x_0]
    assert distances[2] < distances[1] < distances[0]
    two = pipe.fuse(x_0[0], x_0[1], 0.3, **options).images
    same = pipe.fuse(list(x_0), weight=[0.7, 0.3, 0], **options).images
    torch.testing.assert_close(two, same, rtol=0, atol=1e-6)


def test_output_types_and_tuples():
    pipe, x_0 = tiny_pipe(), gaussian_images(2, dtype=torch.float32)
    for output_type, kind in (("pil", list), ("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)):
        options = {"num_inference_steps": 3, "output_type": output_type, "return_dict": False}
        for output in (
            pipe.fuse(x_0[0], x_0[1], [0.2, 0.8], **options),
            pipe.vary(x_0, 0.5, **options),
            pipe.inpaint(x_0, torch.ones(8, 8), **options),
        ):
            assert isinstance(output, tuple) and isinstance(output[0], kind) and len(output[0]) == 2


def test_a_mean_of_pixels_is_a_double_exposure_and_a_moon_between_two_is_none():
    half, between, full = (render(phase, 32) for phase in (math.pi / 2, 0.7 * math.pi, math.pi))
    endpoints = torch.stack([half, full])[None]
    blurred = torch.lerp((half + full) / 2, between, 0.3)  # of a weak model
    images = torch.stack([half, between, full, (half + full) / 2, torch.lerp(half, full, 0.3), blurred])
    weights = torch.full((len(images), 2), 0.5, dtype=torch.float64)
    expected = [False, False, False, True, True, True]
    assert is_double_exposure(images, endpoints, weights) == expected
    two_sets = endpoints.expand(2, -1, -1, -1, -1)
    assert is_double_exposure(torch.cat([images, images]), two_sets, weights.repeat(2, 1)) == expected * 2
    three = torch.stack([half, full, between])[None]
    thirds = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    assert is_double_exposure(torch.stack([three[0].mean(0), between]), three, thirds) == [True, False]


def test_fuse_says_which_images_are_double_exposures():
    pipe = gaussian_pipe()
    a, b = gaussian_images(2)
    fused = pipe.fuse(a, b, [0, 0.5, 1], num_inference_steps=20)
    assert len(fused.double_exposures) == 3 and not fused.double_exposures[0] and not fused.double_exposures[2]
    assert len(pipe.fuse(a, b, num_inference_steps=5, return_dict=False)) == 4


def test_noise_is_not_between_two_moons(monkeypatch):
    """Its distance ratio is about one half, as that of an image in the middle would be."""
    half, full, between = render([math.pi / 2, math.pi, 0.75 * math.pi], 8).split(1)
    noise = torch.randn(half.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def fuse(image):
        monkeypatch.setattr(pipeline_ddpm, "latent_path", lambda *args: lambda index, weights: image)
        return tiny_pipe().fuse(half, full, num_inference_steps=2)

    with pytest.warns(UserWarning, match="1 of 1 images are farther from both endpoints"):
        assert fuse(noise).distance_ratios[0] == pytest.approx(0.5, abs=0.1)
    for image in (half, full, between, (half + full) / 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fuse(image)
