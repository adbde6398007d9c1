"""IMAGES: PIL images, arrays and tensors in and out. Inside they are (B, C, H, W), floats in [-1, 1]."""

import warnings
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils.pil_utils import numpy_to_pil
from PIL import Image
from torch import Tensor

from .pixels import from_pixels, height_width
from .precision import compute_dtype
from .scheduling_ddpm import DDPMScheduler, check_choice

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels


def check_output_type(output_type: str | None, channels: int) -> None:
    """Raise ValueError if images with this many channels cannot be returned in this output_type."""
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels not in PIL_MODES:
        raise ValueError(f'output_type is "pil", but the images have {channels} channels: give "np" or "pt"')


def to_output(x_0: Tensor, output_type: str | None) -> Any:
    """Images (B, C, H, W) in [-1, 1] in the given output_type."""
    if not x_0.isfinite().all():
        warnings.warn("some pixels are non-finite: check the network's weights", stacklevel=3)
    if output_type == "latent":
        return x_0
    images = (x_0 / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return numpy_to_pil(np.nan_to_num(array))  # diffusers' own, so that the bytes are those of the built-in pipeline


def to_tensor(images: Any, name: str, channels: int) -> Tensor:
    """Images of any kind as (B, C, H, W), float32 or float64, in [-1, 1], on the CPU.

    Args:
        images: a PIL image; an array, uint8 or float in [-1, 1], (H, W), (H, W, C) or (B, H, W, C); a tensor, uint8 or
            float in [-1, 1], (C, H, W) or (B, C, H, W); or a list of single ones.
        name: of the argument, for messages.
    Raises:
        ValueError: another type, shape, dtype or number of channels, or values that are out of range or non-finite.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list: give at least one image")
        single = [to_tensor(image, name, channels) for image in images]
        shapes = sorted({tuple(image.shape[1:]) for image in single})
        if len(shapes) > 1:
            raise ValueError(f"{name} has images of shapes {shapes}: they must be equal")
        return torch.cat(single)
    if isinstance(images, Image.Image):
        images = np.array(_convert_mode(images, channels))
    if isinstance(images, np.ndarray):
        values = torch.from_numpy(images.copy())
        values = values[..., None] if values.ndim == 2 else values
        values = (values[None] if values.ndim == 3 else values).movedim(-1, 1)
    elif isinstance(images, Tensor):
        values = images.detach().cpu()
        values = values[None] if values.ndim == 3 else values
    else:
        raise ValueError(f"{name} is a {type(images).__name__}: give PIL images, arrays or tensors")
    if values.ndim != 4 or values.shape[1] != channels or not values.numel():
        layouts = "(B, C, H, W) or (C, H, W)" if isinstance(images, Tensor) else "(B, H, W, C), (H, W, C) or (H, W)"
        raise ValueError(f"{name} has shape {tuple(images.shape)}: give {layouts} with {channels} channels")
    if values.dtype == torch.uint8:
        return from_pixels(values)
    if not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}: give uint8, or floats in [-1, 1]")
    values = values.to(compute_dtype(values.dtype))
    if not (values.abs() <= 1 + 1e-4).all():  # a sampled image may be out of range by a rounding error
        raise ValueError(
            f"{name} ranges from {values.min():g} to {values.max():g}: give floats in [-1, 1] "
            "(from 0..255: x / 127.5 - 1)"
        )
    if 0 <= values.min() < values.max():  # the range of output_type "np" and "pt"
        warnings.warn(
            f"{name} ranges from {values.min():g} to {values.max():g} and is read as [-1, 1]: if it is in [0, 1], give "
            "2 * x - 1",
            stacklevel=2,
        )
    return values


def prepare_images(images: Any, name: str, unet: UNet2DModel, scheduler: Any) -> Tensor:
    """Checked images for a method that needs our scheduler, of the network's size.

    Args:
        images, name: as for `to_tensor`.
    Returns:
        (B, C, H, W) in [-1, 1], float32 or float64, on the CPU.
    Raises:
        ValueError: as for `to_tensor`; or another scheduler, or another size.
    """
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"the scheduler is a {type(scheduler).__name__}, but this method needs a DDPMScheduler: set "
            "pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)"
        )
    x_0 = to_tensor(images, name, unet.config["in_channels"])
    height, width = x_0.shape[2:]
    size = unet.config["sample_size"]
    if size is not None and (height, width) != height_width(size):
        allowed = " x ".join(map(str, height_width(size)))
        raise ValueError(f"{name} is {height} x {width} pixels: this network generates {allowed} (height x width)")
    check_image_size(unet, height, width)
    return x_0.to(compute_dtype(unet.dtype))


def check_image_size(unet: UNet2DModel, height: int | None, width: int | None, latents: Any = None) -> tuple[int, int]:
    """(H, W) in pixels: the given one, or that of the latents, or the one that the network was trained at.

    Raises:
        ValueError: there is none of these, or a side is not a multiple of what the network downsamples by.
    """
    if latents is not None and height is None and width is None and latents.ndim == 4:
        height, width = latents.shape[2:]
    if height is None or width is None:
        size = unet.config["sample_size"]
        if size is None:
            raise ValueError(f"the network has sample_size None, height is {height} and width {width}: give both")
        trained_height, trained_width = height_width(size)
        height = trained_height if height is None else height
        width = trained_width if width is None else width
    multiple = 2 ** (len(unet.config["block_out_channels"]) - 1)
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or side < 1 or side % multiple:
            raise ValueError(f"{name} is {side!r}: this network takes positive multiples of {multiple}")
    return height, width


def squared_pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the pixels: (B, C, H, W) twice to (B,)."""
    return (x - y).square().flatten(1).mean(1)


def to_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """Where to paint, bool, (B, C, H, W): where the mask is white, above the middle of its range.

    Args:
        mask: a PIL image; or a bool, uint8 or float array or tensor that broadcasts to (B, C, H, W); an array may also
            be (B, H, W, C).
        shape: (B, C, H, W) of the images.
    Raises:
        ValueError: another type or shape, or a mask without white.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask.copy())
        if mask.ndim == 4 and mask.shape[-1] in (1, shape[1]) and mask.shape[1:3] == shape[2:]:
            mask = mask.movedim(-1, 1)
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask is a {type(mask).__name__}: give a PIL image, an array or a tensor")
    mask_shape = tuple(mask.shape)
    if mask.ndim == 3 and mask.shape[0] == shape[0] and shape[0] > 1:
        mask = mask[:, None]
    white = mask.detach().cpu()
    if white.dtype != torch.bool:
        white = white > (127 if white.dtype == torch.uint8 else 0.5)
    try:
        white = white.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {mask_shape}, which does not broadcast to images of shape {shape}") from None
    if not white.flatten(1).any(1).all():
        raise ValueError("mask is black for a whole image: make it white where to paint")
    return white


def _convert_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image with this many channels; transparency is composited on white, as in training."""
    mode = PIL_MODES.get(channels)
    if mode is None:
        raise ValueError(f"the model has {channels} channels, and PIL images have 1, 3 or 4: give arrays or tensors")
    if channels < 4 and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
