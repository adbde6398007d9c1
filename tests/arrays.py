"""Random images and tensors, always the same for a seed, and what every extractor must do with images."""

import numpy as np
import torch
from PIL import Image


def random_images(*shape, seed=0, dtype=np.uint8, high=None):
    """Pixels from 0 to high - 1; by default all values of the dtype."""
    return np.random.default_rng(seed).integers(0, high or np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save_images(folder, count, *shape, name="{}.png"):
    """Create a folder with this many random images, (H, W) or (H, W, C); the number of an image is its seed."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(random_images(*shape, seed=i)).save(folder / name.format(i))
    return folder


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_in_8_and_16_bits(extractor, images):
    """images: uint8."""
    assert torch.equal(extractor(torch.from_numpy(images)), extractor(torch.from_numpy(images * np.uint16(257))))
