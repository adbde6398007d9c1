"""IMAGE ARRAYS: data sets as (N, C, H, W) arrays of uint8 or uint16, possibly memory-mapped: checks and chunks."""

import math
from collections.abc import Iterator

import numpy as np

CHUNK_PIXELS = 2**23  # read at a time, so that a memory-mapped array is never in memory as a whole


def check_images(name: str, images: np.ndarray, min_images: int = 1) -> None:
    """Raise ValueError unless this is an array (N, C, H, W) of uint8 or uint16 with at least `min_images` images."""
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{name} is {getattr(images, 'dtype', type(images))}: give an array of uint8 or uint16")
    if images.ndim == 4 and images.shape[3] <= 4 and images.shape[1] > 16:
        raise ValueError(f"{name} has shape {images.shape}, which looks channels-last: give (N, C, H, W)")
    if images.ndim != 4 or 0 in images.shape[1:] or len(images) < min_images:
        raise ValueError(f"{name} has shape {images.shape}: give (N, C, H, W) with N at least {min_images}")


def chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """The images in order, a few at a time: about CHUNK_PIXELS, at least one image."""
    size = max(1, CHUNK_PIXELS // math.prod(images.shape[1:]))
    return (images[start : start + size] for start in range(0, len(images), size))
