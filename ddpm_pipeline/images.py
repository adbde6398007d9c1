"""PICTURES IN AND OUT: whatever kind they are, the walk sees (B, C, H, W), floats in [-1, 1]."""

import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .scheduling_ddpm import compute_dtype

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels


def check_output_type(output_type: str | None, channels: int) -> None:
    """Raise ValueError if pictures of so many channels cannot be given as that."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}: give one of {', '.join(map(repr, OUTPUT_TYPES))}")
    if output_type == "pil" and channels not in PIL_MODES:
        raise ValueError(f'output_type is "pil", but the images have {channels} channels: give "np" or "pt"')


def to_output(x_0: Tensor, output_type: str | None) -> Any:
    """Pictures (B, C, H, W) in [-1, 1] as output_type says."""
    if not x_0.isfinite().all():
        warnings.warn("some pixels are not finite numbers: are the network's weights whole?", stacklevel=3)
    if output_type == "latent":
        return x_0
    images = (x_0 / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (np.nan_to_num(array) * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def to_tensor(images: Any, name: str, channels: int) -> Tensor:
    """Pictures of any kind as (B, C, H, W), float32 or float64, in [-1, 1], on the CPU.

    Args:
        images: a PIL image; an array, uint8 or float in [-1, 1], (H, W), (H, W, C) or (B, H, W, C); a tensor, uint8 or
            float in [-1, 1], (C, H, W) or (B, C, H, W); or a list of single ones.
    Raises:
        ValueError: another type, shape or number of channels, numbers outside the range, or no numbers.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list: give at least one image")
        single = [to_tensor(image, name, channels) for image in images]
        if len({image.shape[1:] for image in single}) > 1:
            raise ValueError(f"{name} has images of shapes {sorted({tuple(i.shape[1:]) for i in single})}: give one")
        return torch.cat(single)
    if isinstance(images, Image.Image):
        images = np.array(_in_mode(images, channels))
    if isinstance(images, np.ndarray):
        pixels = torch.from_numpy(images.copy())
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = (pixels[None] if pixels.ndim == 3 else pixels).movedim(-1, 1)
    elif isinstance(images, Tensor):
        pixels = images.detach().cpu()
        pixels = pixels[None] if pixels.ndim == 3 else pixels
    else:
        raise ValueError(f"{name} is a {type(images).__name__}: give PIL images, arrays or tensors")
    if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.numel():
        kind = "(B, C, H, W) or (C, H, W)" if isinstance(images, Tensor) else "(B, H, W, C), (H, W, C) or (H, W)"
        raise ValueError(f"{name} has shape {tuple(images.shape)}: give {kind} with {channels} channels")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 127.5 - 1
    if not pixels.is_floating_point():
        raise ValueError(f"{name} is {pixels.dtype}: give uint8, or floats in [-1, 1]")
    pixels = pixels.to(compute_dtype(pixels.dtype))
    if not (pixels.abs() <= 1 + 1e-4).all():  # a picture that a walk has made may be a rounding error outside
        raise ValueError(
            f"{name} goes from {pixels.min():g} to {pixels.max():g}: give floats in [-1, 1] (of 0..255 x / 127.5 - 1)"
        )
    if 0 <= pixels.min() < pixels.max():  # as a pipeline gives them for output_type "np" and "pt"
        warnings.warn(
            f"{name} goes from {pixels.min():g} to {pixels.max():g} and is taken for [-1, 1]: if it is in [0, 1], give "
            "2 * x - 1",
            stacklevel=2,
        )
    return pixels


def to_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """Where to paint, bool, (B, C, H, W): where the mask is white, above the middle of its range.

    Args:
        mask: a PIL image; a bool, uint8 or float array or tensor whose shape can be broadcast to (B, C, H, W), for
            arrays (B, H, W, C) as well.
        shape: (B, C, H, W) of the images.
    Raises:
        ValueError: another type or shape, or nothing is white.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask.copy())
        if mask.ndim == 4 and mask.shape[-1] in (1, shape[1]) and mask.shape[1:3] == shape[2:]:
            mask = mask.movedim(-1, 1)
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask is a {type(mask).__name__}: give a PIL image, an array or a tensor")
    given = tuple(mask.shape)
    if mask.ndim == 3 and mask.shape[0] == shape[0] and shape[0] > 1:
        mask = mask[:, None]
    white = mask.detach().cpu()
    if white.dtype != torch.bool:
        white = white > (127 if white.dtype == torch.uint8 else 0.5)
    try:
        white = white.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {given}, which does not fit images of shape {shape}") from None
    if not white.flatten(1).any(1).all():
        raise ValueError("mask is black all over an image: white is where to paint")
    return white


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """A picture with so many channels; transparent ones are laid on white, as in training."""
    mode = PIL_MODES.get(channels)
    if mode is None:
        raise ValueError(f"the model has {channels} channels, which PIL images have not: give arrays or tensors")
    if channels < 4 and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
