"""Images and masks of every kind as tensors, with clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline.images import to_mask, to_tensor


def test_images_of_every_kind_are_the_same_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    floats = pixels / np.float32(127.5) - 1
    expected = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for images in (
        [Image.fromarray(image) for image in pixels],
        pixels,
        floats,
        list(pixels),
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        expected,
        list(expected),
    ):
        tensor = to_tensor(images, "images", 3)
        assert torch.allclose(tensor, expected, atol=1e-6) and tensor.dtype == torch.float32
    grey = pixels[0, ..., 0]
    for image in (Image.fromarray(grey), grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert torch.equal(to_tensor(image, "images", 1)[0, 0], torch.from_numpy(grey * np.float32(2 / 255) - 1))
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # an invisible red
    assert torch.equal(to_tensor(transparent, "images", 3), torch.ones(1, 3, 8, 8))
    assert to_tensor(torch.zeros(1, 1, 8, 8, dtype=torch.float16), "images", 1).dtype == torch.float32


def test_masks_of_every_kind_are_the_same_tensor():
    white = np.zeros((8, 8), dtype=bool)
    white[1:3, 5:] = True
    expected = torch.from_numpy(white).expand(2, 3, 8, 8)
    for mask in (
        Image.fromarray(np.uint8(white) * 255),
        Image.fromarray(white),
        white,
        white.astype(np.float32),
        np.uint8(white) * 255,
        torch.from_numpy(white),
        torch.from_numpy(white)[None],
        torch.from_numpy(white)[None, None],
        torch.from_numpy(white).expand(2, 8, 8),
        np.broadcast_to(white[None, ..., None], (2, 8, 8, 3)),
    ):
        assert torch.equal(to_mask(mask, (2, 3, 8, 8)), expected)


def test_floats_in_0_to_1_give_a_warning():
    bright = np.linspace(0, 1, 64).reshape(8, 8)
    with pytest.warns(UserWarning, match=r"image ranges from 0 to 1 and is read as \[-1, 1\].*give 2 \* x - 1"):
        to_tensor(bright, "image", 1)
    for image in (2 * bright - 1, np.ones((8, 8)), (255 * bright).astype(np.uint8)):
        to_tensor(image, "image", 1)  # a warning would be an error here
