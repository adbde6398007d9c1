"""The transforms that `train_unconditional.py` uses, reimplemented for PIL images with three channels."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode:
    BILINEAR = Image.Resampling.BILINEAR


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class Resize:
    """Resize the shorter side to `size`."""

    def __init__(self, size: int, interpolation: Image.Resampling = InterpolationMode.BILINEAR) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        if short == self.size:
            return image
        width, height = (self.size * side // short for side in image.size)
        return image.resize((width, height), self.interpolation)


class CenterCrop:
    """Crop a square of `size` from the centre."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = ((side - self.size) // 2 for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    """Crop a square of `size` at random."""

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (random.randint(0, side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


class PILToTensor:
    """(C, H, W) uint8."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ConvertImageDtype:
    """uint8 in 0..255 to floats in [0, 1]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, image: Tensor) -> Tensor:
        return image.to(self.dtype).div_(255)


class ToTensor:
    """(C, H, W) float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        return PILToTensor()(image).to(torch.float32).div_(255)


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std
