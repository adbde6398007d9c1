"""The moons against geometry: the area of an ellipse, mirror images, averages of pixels, rotations."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ddpm_pipeline import moons, rng
from ddpm_pipeline.moons import MoonDataset, lit_fraction, phase_of, render, strip

TURN = 2 * math.pi
FULL, HALF = math.pi, math.pi / 2


def circle_distance(a, b):
    return ((a - b + math.pi) % TURN - math.pi).abs()


@pytest.fixture(scope="module")
def phases():
    return torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * TURN


@pytest.fixture(scope="module")
def disc():
    """x, y in radii of the moon and whether a pixel is on it, for 256 x 256 pixels, independent of moons.py."""
    along = (torch.arange(256) - 127.5) / (256 * moons.RADIUS)
    x, y = along[None, :].expand(256, 256), -along[:, None].expand(256, 256)
    return x, y, x**2 + y**2 < 1


def lit(phase):
    """Pixels closer to the full moon than to the new moon."""
    new, full, image = render([0, FULL, phase], 256)
    return (image > (new + full) / 2)[0]


# ---- Geometry --------------------------------------------------------------------------------------------------------


def test_lit_fraction_at_the_quarters():
    for phase, fraction in ((0, 0), (HALF, 0.5), (FULL, 1), (3 * HALF, 0.5)):
        assert lit_fraction(phase) == pytest.approx(fraction, abs=1e-15)
    phases = torch.linspace(0, TURN, 9, dtype=torch.float64)
    assert lit_fraction(phases).tolist() == [lit_fraction(phase) for phase in phases.tolist()]


@pytest.mark.parametrize("phase", [0.3, 0.8, 1.2, 1.9, 2.5, 3.0, 3.4, 4.1, 4.5, 5.0, 5.7, 6.0])
def test_the_terminator_is_a_half_ellipse_and_the_lit_area_is_its(phase, disc):
    x, y, on_disc = disc
    side = x if phase < math.pi else -x  # waxing moons are lit on the right, waning ones on the left
    expected = side > math.cos(phase) * (1 - y**2).clamp(min=0).sqrt()
    measured = lit(phase)
    assert (measured ^ expected)[on_disc].float().mean() < 0.01
    assert measured[on_disc].float().mean() == pytest.approx(lit_fraction(phase), abs=0.01)


@pytest.mark.parametrize("phase", [0.5, 1.0, HALF, 2.0, 2.8])
def test_a_waning_moon_is_a_mirrored_waxing_moon(phase, disc):
    assert (lit(phase) ^ lit(TURN - phase).flip(-1))[disc[2]].float().mean() < 0.02


def test_the_sky_is_black_and_every_moon_is_a_disc(phases):
    images = render(phases, 64)
    edge = math.ceil(64 * (0.5 - moons.RADIUS)) - 1
    assert (images[..., :edge, :] == -1).all()
    assert (images[..., :edge] == -1).all()
    assert (images[..., 28:36, 28:36] > -0.97).all()  # earthshine: the new moon as well
    assert images.max() <= 1


def test_north_is_up_and_east_is_right():
    north, south = render(FULL, 64).tensor_split(2, dim=-2)
    assert north.mean() < south.mean()  # the large seas are in the north, Tycho and its rays in the south
    west, east = render(FULL, 64)[..., 18:26, :].tensor_split(2, dim=-1)
    assert west[..., 18:26].mean() < east[..., :6].mean()  # Imbrium is west of the middle


def test_a_small_image_is_the_pixel_mean_of_a_large_one(phases):
    difference = F.avg_pool2d(render(phases, 64), 2) - render(phases, 32)
    assert difference.square().mean().sqrt() < 0.005
    assert difference.abs().max() < 0.2  # somewhere along the thinnest crescent


def test_tilt_rotates_counterclockwise():
    image = render(1.0, 48)
    assert torch.allclose(render(1.0, 48, tilt=HALF), image.rot90(1, (-2, -1)), atol=1e-4)
    assert torch.allclose(render([1.0, 1.0], 48, tilt=[0.0, FULL])[1], image.rot90(2, (-2, -1)), atol=1e-4)
    wide = render(1.0, (32, 48), tilt=0.4)
    assert torch.allclose(wide[..., 8:40], render(1.0, 32, tilt=0.4), atol=1e-4)


def test_shapes_and_types_of_phase():
    assert render(1.0).shape == (1, 32, 32)
    assert render(torch.tensor(1.0), (20, 30)).shape == (1, 20, 30)
    batch = render([1.0, 2.0, 3.0], (20, 30))
    assert batch.shape == (3, 1, 20, 30)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, render(np.array([1.0, 2.0, 3.0]), (20, 30)))
    assert torch.equal(batch[1], render(2.0, (20, 30)))  # a single image equals that of a batch
    assert torch.allclose(batch[1], render(2.0 - TURN, (20, 30)), atol=1e-5)
    assert strip([0.0, HALF, FULL], 24).size == (72, 24)


# ---- Distances and phase_of ------------------------------------------------------------------------------------------


def test_distance_increases_smoothly_with_the_difference_in_phase():
    step = TURN / 1024
    bank = render(torch.arange(1024) * step).flatten(1)
    near, twice = ((bank - bank.roll(k, 0)).square().mean(1) for k in (1, 2))
    assert near.min() > 1e-7  # no two moons are the same
    assert near.max() < 5e-4  # and none jumps
    assert ((twice / near - 4).abs() < 0.5).all()  # quadratic, as of a differentiable curve
    away = torch.stack([(bank - bank.roll(k, 0)).square().mean(1) for k in range(0, 257, 16)])
    assert (away.diff(dim=0) > 0).all()  # up to a quarter turn, a larger difference in phase is a larger distance


def test_phase_of_inverts_render(phases):
    images = render(phases)
    phase, distance = phase_of(images)
    assert circle_distance(phase, phases).max() <= TURN / 2048 * 1.05  # half a step of 1024
    assert distance.max() < 1e-4
    single = phase_of(images[7], num_phases=600)
    assert isinstance(single.phase, float)
    assert isinstance(single.distance, float)
    assert abs(single.phase - phases[7]) <= TURN / 1200 * 1.05


def test_phase_of_under_noise(phases):
    std = 0.05
    images = render(phases)
    noise = std * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = images - images.sign() * noise.abs()  # inwards, so that values stay in [-1, 1]
    phase, distance = phase_of(noisy)
    assert circle_distance(phase, phases).max() < 0.1
    assert (distance / noise.square().flatten(1).mean(1) - 1).abs().max() < 0.05


@pytest.mark.parametrize("half", [HALF, 3 * HALF])
def test_the_mean_of_half_and_full_moon_is_far_from_every_moon(half):
    mean = (render(FULL) + render(half)) / 2
    assert phase_of(mean).distance > 0.1
    assert phase_of(render((FULL + half) / 2)).distance < 1e-6


def test_phase_of_accepts_floats_uint8_and_pil_images():
    floats = render([1.0, 4.0], 24)
    array = ((floats + 1) * 127.5).round().byte()
    pil = [Image.fromarray(image[0].numpy()) for image in array]
    expected = phase_of(floats)
    for images in (floats.numpy(), floats.double(), array, array.numpy(), pil, list(floats)):
        match = phase_of(images)
        assert torch.allclose(match.phase, expected.phase)
        assert torch.allclose(match.distance, expected.distance, atol=2e-5)
    assert phase_of(pil[1]).phase == expected.phase[1]
    mirrored = phase_of(array.numpy()[..., ::-1])  # negative strides
    assert circle_distance(mirrored.phase, -expected.phase).max() < 0.2


# ---- The data set ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_item_i_depends_on_i_alone(tilt):
    make = {"size": 16, "seed": 3, "tilt": tilt}
    data, longer = MoonDataset(40, **make), MoonDataset(1000, **make)
    forwards = [data[i] for i in range(40)]
    backwards = [data[i] for i in reversed(range(40))][::-1]
    images, phases = data.images(), data.phases()
    assert images.dtype == torch.uint8
    assert images.shape == (40, 1, 16, 16)
    for i in range(40):
        for item in (forwards[i], backwards[i], longer[i], data[i - 40]):
            assert torch.equal(item["image"], images[i])
            assert item["phase"] == phases[i]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(longer.images(order), images[order])
    assert not torch.equal(MoonDataset(40, size=16, seed=4, tilt=tilt).phases(), phases)
    assert [len(data), len(list(iter(data)))] == [40, 40]


def test_images_show_their_phase_and_are_tilted_within_the_limit():
    data = MoonDataset(200, seed=5)
    assert circle_distance(phase_of(data.images()).phase, data.phases()).max() < 0.02
    tilted = MoonDataset(200, seed=5, tilt=0.1)
    assert torch.equal(tilted.phases(), data.phases())
    assert not torch.equal(tilted.images(), data.images())
    assert circle_distance(phase_of(tilted.images()).phase, data.phases()).max() < 0.3


def test_phases_are_uniform_on_the_circle_and_independent():
    n = 8192
    phases, other = MoonDataset(n, seed=0).phases(), MoonDataset(n, seed=1).phases()
    assert 0 <= phases.min() < phases.max() < TURN
    # For independent uniform angles a mean of n cosines has standard error sqrt(1 / 2n): 26 means within 4 of them.
    angles = [k * phases for k in range(1, 11)]
    angles += [
        phases[1:] - phases[:-1],
        phases - other,
        rng.uniform(rng.key(0, rng.Stream.MOON_TILT), torch.arange(n)) * TURN - phases,
    ]
    for angle in angles:
        assert abs(angle.cos().mean()) < 4 * math.sqrt(0.5 / n)
        assert abs(angle.sin().mean()) < 4 * math.sqrt(0.5 / n)
    # Kolmogorov: the largest gap between the two distribution functions is below 1.95 / sqrt(n) in 999 of 1000 draws.
    gap = (phases.sort().values / TURN - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("index", [5, -6, 10**9])
def test_an_index_out_of_range_is_an_error(index):
    with pytest.raises(IndexError, match=str(index)):
        MoonDataset(5)[index]
    with pytest.raises(IndexError, match=str(index)):
        MoonDataset(5).images([0, index])


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "arguments", "value"),
    [
        (render, {"phase": float("nan")}, "nan"),
        (render, {"phase": [0.0, float("inf")]}, "inf"),
        (render, {"phase": "full"}, "full"),
        (render, {"phase": [[1.0, 2.0]]}, r"\[\[1.0, 2.0\]\]"),
        (render, {"phase": 1.0, "size": 0}, "0"),
        (render, {"phase": 1.0, "size": -3}, "-3"),
        (render, {"phase": 1.0, "size": 31.5}, "31.5"),
        (render, {"phase": 1.0, "size": (32, 32, 1)}, r"\(32, 32, 1\)"),
        (render, {"phase": [1.0, 2.0], "tilt": [0.1, 0.2, 0.3]}, r"\(3,\)"),
        (render, {"phase": 1.0, "tilt": [0.1]}, r"\(1,\)"),
        (MoonDataset, {"length": 0}, "0"),
        (MoonDataset, {"length": 2.5}, "2.5"),
        (MoonDataset, {"size": "big"}, "big"),
        (MoonDataset, {"seed": 0.5}, "0.5"),
        (MoonDataset, {"tilt": -0.1}, "-0.1"),
        (MoonDataset, {"tilt": math.nan}, "nan"),
        (phase_of, {"images": torch.zeros(1, 8, 8), "num_phases": 511}, "511"),
        (phase_of, {"images": torch.full((1, 8, 8), 255.0)}, "255"),
        (phase_of, {"images": torch.full((1, 8, 8), math.nan)}, "nan"),
        (phase_of, {"images": torch.zeros(8, 8)}, r"\(8, 8\)"),
        (phase_of, {"images": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\)"),
        (phase_of, {"images": [torch.zeros(1, 8, 8), torch.zeros(1, 9, 9)]}, r"\(1, 9, 9\)"),
        (phase_of, {"images": torch.zeros(1, 8, 8, dtype=torch.int64)}, "int64"),
        (phase_of, {"images": Image.new("RGB", (8, 8))}, "RGB"),
        (phase_of, {"images": []}, "list"),
        (phase_of, {"images": "moon.png"}, "str"),
    ],
)
def test_bad_input_is_named_in_the_error(call, arguments, value):
    with pytest.raises(ValueError, match=value):
        call(**arguments)
