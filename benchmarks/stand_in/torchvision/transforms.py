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
    """Resize the shorter side to `size`; a pair is the height and width to resize to."""

    def __init__(
        self, size: int | tuple[int, int], interpolation: Image.Resampling = InterpolationMode.BILINEAR
    ) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        if not isinstance(self.size, int):
            return image.resize(self.size[::-1], self.interpolation)
        short = min(image.size)
        if short == self.size:
            return image
        width, height = (self.size * side // short for side in image.size)
        return image.resize((width, height), self.interpolation)


class CenterCrop:
    """Crop a square of `size`, or a height and width, from the centre."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


class RandomCrop(CenterCrop):
    """Crop a square of `size`, or a height and width, at random."""

    def __call__(self, image: Image.Image) -> Image.Image:
        left = random.randint(0, image.width - self.width)
        top = random.randint(0, image.height - self.height)
        return image.crop((left, top, left + self.width, top + self.height))


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
