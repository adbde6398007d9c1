"""PIXELS: scaling between integer pixel values and images in [-1, 1], and image sizes.

x = 2 v / (levels - 1) - 1        v = 0 .. levels - 1, with 256 levels for uint8 and 65536 for uint16
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor


def from_pixels(pixels: Tensor | np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """uint8 or uint16 pixels of any shape to float32 in [-1, 1], on `device` (default: the device of the pixels)."""
    pixels = from_array(pixels) if isinstance(pixels, np.ndarray) else pixels
    return pixels.to(device).float().mul_(2 / (num_levels(pixels.dtype) - 1)).sub_(1)


def from_array(array: np.ndarray) -> Tensor:
    """The tensor of an array, copied where PyTorch needs it: read-only, negative strides, another byte order.

    Raises:
        TypeError: PyTorch has no such dtype.
    """
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def to_pixels(images: Tensor, dtype: Any = np.uint8) -> np.ndarray:
    """Images in [-1, 1] of any shape to the nearest uint8 or uint16 pixels; values outside are clipped."""
    white = num_levels(dtype) - 1
    return ((images.detach().cpu().double().clamp(-1, 1) + 1) * (white / 2)).round().numpy().astype(_name(dtype))


def num_levels(dtype: Any) -> int:
    """Number of brightness levels of a torch or numpy dtype: 256 for uint8, 65536 for uint16.

    Raises:
        ValueError: any other dtype.
    """
    name = _name(dtype)
    if name not in ("uint8", "uint16"):
        raise ValueError(f"pixels are {name}: give uint8 or uint16")
    return 256 if name == "uint8" else 65536


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else np.dtype(dtype).name


def height_width(size: Any, name: str = "size") -> tuple[int, int]:
    """(H, W) in pixels from one side (64, "64"), from "HEIGHTxWIDTH" ("64x96") or from a pair of integers.

    Args:
        name: what the error message calls the value.
    Raises:
        ValueError: anything else, or a side below 1.
    """
    sides: Any = size
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+)(?:x(\d+))?", size, re.ASCII)):
        sides = [int(side) for side in match.groups() if side]
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides]
    sides = sides * 2 if len(sides) == 1 else sides
    integers = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not integers or min(sides) < 1:
        raise ValueError(f"{name} is {size!r}: give one side in pixels, or height and width")
    return int(sides[0]), int(sides[1])
