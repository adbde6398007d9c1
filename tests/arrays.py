"""Random image arrays, and what every extractor must do with them."""

import numpy as np
import torch


def random_images(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def assert_same_in_8_and_16_bits(extractor, images):
    """images: uint8."""
    assert torch.equal(extractor(torch.from_numpy(images)), extractor(torch.from_numpy(images * np.uint16(257))))
