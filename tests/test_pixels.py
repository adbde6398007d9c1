"""Scaling between integer pixels and [-1, 1] against the formula in exact arithmetic, and sizes of images."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpm_pipeline.pixels import from_pixels, height_width, num_levels, to_pixels

DTYPES = [(np.uint8, torch.uint8, 256), (np.uint16, torch.uint16, 65536)]
dtypes = pytest.mark.parametrize(("dtype", "torch_dtype", "levels"), DTYPES, ids=["uint8", "uint16"])


@dtypes
def test_from_pixels_is_the_formula_to_the_rounding_of_float32(dtype, torch_dtype, levels):
    """x = 2 v / (levels - 1) - 1."""
    values = np.arange(levels, dtype=dtype)
    images = from_pixels(values)
    assert images.dtype == torch.float32
    assert images[0] == -1 and images[-1] == 1
    exact = [float(Fraction(2 * v, levels - 1) - 1) for v in range(levels)]
    # rounded twice: 2 v / (levels - 1), which is at most 2, and the difference
    assert (images.double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < 2 * 2.0**-23
    assert torch.equal(from_pixels(torch.from_numpy(values)), images)


@dtypes
def test_every_value_survives_a_round_trip(dtype, torch_dtype, levels):
    values = np.arange(levels, dtype=dtype).reshape(2, 1, 16, -1)
    pixels = to_pixels(from_pixels(values), dtype)
    assert pixels.dtype == dtype and pixels.shape == values.shape
    assert np.array_equal(pixels, values)


@dtypes
def test_to_pixels_rounds_to_the_nearest_level_and_clips(dtype, torch_dtype, levels):
    level = torch.tensor([0, 1, levels // 2, levels - 2, levels - 1], dtype=torch.float64)
    for offset in (-0.49, 0.0, 0.49):
        images = 2 * (level + offset) / (levels - 1) - 1
        assert to_pixels(images, dtype).tolist() == level.tolist()
    for value, expected in ((-1.5, 0), (1.5, levels - 1), (-torch.inf, 0), (torch.inf, levels - 1)):
        assert to_pixels(torch.tensor([value]), dtype).tolist() == [expected]
    for kind in (torch_dtype, np.dtype(dtype).newbyteorder(">")):
        pixels = to_pixels(torch.tensor([-1.0, 1.0]), kind)
        assert pixels.dtype == dtype and pixels.tolist() == [0, levels - 1]


def test_to_pixels_takes_half_precision_and_what_needs_a_gradient():
    images = from_pixels(np.arange(256, dtype=np.uint8)).bfloat16().requires_grad_()
    expected = ((images.detach().double() + 1) * 127.5).round()
    assert to_pixels(images).tolist() == expected.tolist()


def test_pixels_are_not_modified_and_go_to_the_device():
    pixels = torch.arange(8, dtype=torch.uint8)
    before = pixels.clone()
    assert from_pixels(pixels, "meta").device.type == "meta"
    from_pixels(pixels)
    assert torch.equal(pixels, before)
    images = torch.linspace(-2, 2, 8)
    kept = images.clone()
    to_pixels(images)
    assert torch.equal(images, kept)


@dtypes
def test_num_levels(dtype, torch_dtype, levels):
    assert num_levels(dtype) == num_levels(torch_dtype) == num_levels(np.dtype(dtype)) == levels


@pytest.mark.parametrize("dtype", [np.float32, torch.float32, np.int64, torch.int16, bool])
def test_other_dtypes_are_named_in_the_error(dtype):
    with pytest.raises(ValueError, match=r"pixels are .*: give uint8 or uint16"):
        num_levels(dtype)


def test_from_pixels_rejects_floats():
    with pytest.raises(ValueError, match="float32"):
        from_pixels(torch.zeros(2))
    with pytest.raises(ValueError, match="float64"):
        from_pixels(np.zeros(2))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, (64, 64)),
        ("64", (64, 64)),
        ("64x96", (64, 96)),
        ((64, 96), (64, 96)),
        ([64, 96], (64, 96)),
        ((64,), (64, 64)),
        (np.int64(32), (32, 32)),
        (1, (1, 1)),
    ],
)
def test_height_width(size, expected):
    sides = height_width(size)
    assert sides == expected and all(type(side) is int for side in sides)


@pytest.mark.parametrize(
    "size",
    [0, -1, "0", "0x8", "-8", "8x", "x8", "8X8", "8x8x8", "big", "", 8.0, None, True, (8, 0), (8, 8, 8), (), "\u0668"],
)
def test_bad_sizes_are_named_in_the_error(size):
    with pytest.raises(ValueError, match=r"resolution is .*: give one side in pixels, or height and width"):
        height_width(size, "resolution")
