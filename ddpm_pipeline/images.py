"""IMAGES: files, PIL images, arrays and tensors in and out. Inside they are (B, C, H, W), floats in [-1, 1]."""

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils.pil_utils import numpy_to_pil
from PIL import Image
from torch import Tensor

from .decode import IMAGE_CHANNELS, Size, decode_for, decode_mask, failure_reason, parse_colour, read_header
from .pixels import from_array, from_pixels, height_width
from .precision import compute_dtype
from .scheduling_ddpm import DDPMScheduler, check_choice

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Fields of the network's configuration; diffusers keeps a "_" field and ignores it.
BACKGROUND, CENTER_CROP = "_background", "_center_crop"

T = TypeVar("T")


def check_output_type(output_type: str | None, channels: int) -> None:
    """Raise ValueError if images with this many channels cannot be returned in this output_type."""
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels not in IMAGE_CHANNELS:
        raise ValueError(f'output_type is "pil", but the images have {channels} channels: give "np" or "pt"')


def to_output(x_0: Tensor, output_type: str | None, stacklevel: int = 3) -> Any:
    """Images (B, C, H, W) in [-1, 1] in the given output_type."""
    if not x_0.isfinite().all():
        warnings.warn("some pixels are non-finite: check the network's weights", stacklevel=stacklevel)
    if output_type == "latent":
        return x_0
    images = (x_0 / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return numpy_to_pil(np.nan_to_num(array))  # diffusers' own, so that the bytes are those of the built-in pipeline


def background_of(unet: UNet2DModel) -> str:
    """The colour behind transparent pixels in the images that the network was trained on: white if it is not saved."""
    return unet.config.get(BACKGROUND, "white")


def record_background(unet: UNet2DModel, colour: str) -> None:
    """Save the colour behind transparent pixels with the network, in its configuration, unless it is white as always.

    Raises:
        ValueError: not a colour.
    """
    if parse_colour(colour) != parse_colour(background_of(unet)):
        unet.register_to_config(**{BACKGROUND: colour})


def record_center_crop(unet: UNet2DModel, center_crop: bool) -> None:
    """Save how images of another size were resized for training with the network, in its configuration."""
    unet.register_to_config(**{CENTER_CROP: center_crop})


def size_of(unet: UNet2DModel) -> Size | None:
    """What images are resized to, as in training; None if that is not saved."""
    center_crop, size = unet.config.get(CENTER_CROP), unet.config["sample_size"]
    return None if center_crop is None or size is None else Size(*height_width(size), bool(center_crop))


def to_tensor(images: Any, name: str, channels: int, background: str = "white", size: Size | None = None) -> Tensor:
    """Images of any kind as (B, C, H, W), float32 or float64, in [-1, 1], on the CPU.

    Args:
        images: a file or a PIL image, read as in training (see decode.py); an array, uint8, uint16 or float in [-1, 1],
            (H, W), (H, W, C) or (B, H, W, C); a tensor of the same dtypes, (C, H, W) or (B, C, H, W); or a list of
            single ones.
        name: of the argument, for messages.
        background: colour behind transparent pixels of files and PIL images.
        size: that files and PIL images are resized to; None: they keep theirs.
    Raises:
        ValueError: another type, shape, dtype or number of channels, values that are out of range or non-finite, or a
            file that cannot be read.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list: give at least one image")
        single = [to_tensor(image, name, channels, background, size) for image in images]
        shapes = sorted({tuple(image.shape[1:]) for image in single})
        if len(shapes) > 1:
            raise ValueError(f"{name} has images of shapes {shapes}: they must be equal")
        return torch.cat(single)
    if isinstance(images, (str, os.PathLike, Image.Image)):
        colour = parse_colour(background)
        if size is not None:
            ((height, width),) = _file_sizes(images, name)
            if (height, width) != size[:2]:
                warnings.warn(
                    f"{name}: images of {height} x {width} pixels are resized to {size.height} x {size.width}, as in "
                    "training",
                    stacklevel=2,
                )
        return from_pixels(_read(lambda payload: decode_for(payload, channels, colour, size), images, name))[None]
    if isinstance(images, np.ndarray):
        values = _own_tensor(images, name)
        values = values[..., None] if values.ndim == 2 else values
        values = (values[None] if values.ndim == 3 else values).movedim(-1, 1)
    elif isinstance(images, Tensor):
        values = images.detach().cpu()
        values = values[None] if values.ndim == 3 else values
    else:
        raise ValueError(f"{name} is a {type(images).__name__}: give files, PIL images, arrays or tensors")
    if values.ndim != 4 or values.shape[1] != channels or not values.numel():
        layouts = "(B, C, H, W) or (C, H, W)" if isinstance(images, Tensor) else "(B, H, W, C), (H, W, C) or (H, W)"
        raise ValueError(f"{name} has shape {tuple(images.shape)}: give {layouts} with {channels} channels")
    if values.dtype in (torch.uint8, torch.uint16):
        return from_pixels(values)
    if not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}: give uint8, uint16, or floats in [-1, 1]")
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


def check_readable(file: Any, name: str) -> None:
    """Raise ValueError if a file is not an image; its pixels are not looked at."""
    _read(read_header, file, name)


def _read(read: Callable[[Any], T], image: Any, name: str) -> T:
    """`read` of a file or PIL image, with every error as a ValueError that names it."""
    payload = image if isinstance(image, Image.Image) else Path(image).expanduser()
    which = f"a PIL image of mode {image.mode}" if isinstance(image, Image.Image) else str(image)
    try:
        return read(payload)
    except Exception as error:  # whatever Pillow raises for a broken file
        reason = failure_reason(error)
        raise ValueError(f"{name}: {which}{' is ' if reason.startswith('not an') else ': '}{reason}") from error


def _own_tensor(array: np.ndarray, name: str) -> Tensor:
    """A copy of an array as a tensor."""
    try:
        return from_array(array.copy())
    except TypeError:
        raise ValueError(f"{name} is an array of {array.dtype}: PyTorch has no such dtype") from None


def prepare_images(images: Any, name: str, unet: UNet2DModel, scheduler: Any) -> Tensor:
    """Checked images for a method that needs our scheduler, of the network's size. Files and PIL images of another size
    are resized as in training, if the network's configuration tells how.

    Args:
        images, name: as for `to_tensor`.
    Returns:
        (B, C, H, W) in [-1, 1], float32 or float64, on the CPU.
    Raises:
        ValueError: as for `to_tensor`; or another scheduler, or another size.
    """
    if not isinstance(scheduler, DDPMScheduler):
        kind = type(scheduler)  # the built-in class has the name of ours
        raise ValueError(
            f"the scheduler is a {kind.__module__}.{kind.__name__}, but this method needs a {DDPMScheduler.__module__}."
            "DDPMScheduler: set pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)"
        )
    x_0 = to_tensor(images, name, unet.config["in_channels"], background_of(unet), size_of(unet))
    height, width = x_0.shape[2:]
    size = unet.config["sample_size"]
    if size is not None and (height, width) != height_width(size):
        allowed = " x ".join(map(str, height_width(size)))
        raise ValueError(
            f"{name} is {height} x {width} pixels: this network generates {allowed} (height x width). Resize it; files "
            "and PIL images are resized if the model says how its training images were"
        )
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
        if not isinstance(side, (int, np.integer)) or isinstance(side, bool) or side < 1 or side % multiple:
            raise ValueError(f"{name} is {side!r}: this network takes positive multiples of {multiple}")
    return int(height), int(width)


def squared_pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the pixels: (B, C, H, W) twice to (B,)."""
    return (x - y).square().flatten(1).mean(1)


def to_distance(distance: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance that `fuse` balances in: a function, or that of an extractor of features or of its name or file."""
    if isinstance(distance, (str, os.PathLike)):
        if not __name__.endswith(".images"):  # remote code, which is one file
            raise ValueError(
                f"distance is {str(distance)!r}, but this pipeline is remote code, which has no extractors: give a "
                "function of two batches of images, or an extractor"
            )
        make_extractor = importlib.import_module(".features", __package__).make_extractor
        if str(distance) == "classifier":
            raise ValueError("distance is 'classifier', which is trained on images: give the extractor itself")
        try:
            distance = make_extractor(str(distance), device=device)
        except ValueError as error:
            message = str(error).replace("extractor is", "distance is", 1).replace('"classifier", ', "")
            raise ValueError(message) from None
    distance = getattr(distance, "squared_distance", distance)
    if not callable(distance):
        raise ValueError(
            f"distance is {distance!r}: give a function of two batches of images, or an extractor of features, by "
            "itself or as for make_extractor"
        )
    return distance


def to_mask(mask: Any, shape: tuple[int, ...], size: Size | None = None, images: Any = ()) -> Tensor:
    """Where to paint, bool, (B, C, H, W): where the mask is white, above the middle of its range.

    Args:
        mask: a file or a PIL image of the images' size, of which luminance times alpha counts; or an array or tensor
            that broadcasts to (B, C, H, W), bool, uint8, uint16, or numbers in [0, 1]; an array may also be
            (B, H, W, C) or (H, W, C), and both may be (B, H, W).
        shape: (B, C, H, W) of the images.
        size: that the images were resized to, as a file or PIL image of their own size is; None: they were not resized.
        images: as they were before; only those that are files or PIL images are resized.
    Raises:
        ValueError: another type, size or shape, values that are out of range, or a mask without white.
    """
    if isinstance(mask, (str, os.PathLike, Image.Image)):
        (given,) = _file_sizes(mask, "mask")
        own = set() if size is None else _file_sizes(images, "image")
        allowed = sorted({shape[2:]} | (own if len(own) == 1 else set()))  # another shape would be cropped elsewhere
        if given not in allowed:
            text, *sizes = (" x ".join(map(str, each)) for each in (given, *allowed))
            raise ValueError(f"mask is {text} pixels (height x width): give {' or '.join(sizes)}, as the images are")
        mask = _read(lambda payload: decode_mask(payload, size), mask, "mask")
    if isinstance(mask, np.ndarray):
        mask_shape = mask.shape
        if mask.ndim in (3, 4) and mask_shape[-1] in (1, shape[1]) and mask_shape[-3:-1] == shape[2:]:
            mask = np.moveaxis(mask, -1, -3).reshape(-1, mask_shape[-1], *shape[2:])  # with B, since C may equal it
        mask = _own_tensor(mask, "mask")
    elif isinstance(mask, Tensor):
        mask_shape = tuple(mask.shape)
    else:
        raise ValueError(f"mask is a {type(mask).__name__}: give a file, a PIL image, an array or a tensor")
    if mask.ndim == 3 and mask.shape[0] == shape[0] and shape[0] > 1:
        if shape[0] == shape[1]:
            raise ValueError(f"mask has shape {mask_shape}, for images or for channels: give ({shape[0]}, 1, H, W)")
        mask = mask[:, None]
    white = _is_white(mask.detach().cpu())
    try:
        white = white.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {mask_shape}, which does not broadcast to images of shape {shape}") from None
    if not white.flatten(1).any(1).all():
        raise ValueError("mask is black for a whole image: make it white where to paint")
    return white


def _file_sizes(images: Any, name: str) -> set[tuple[int, int]]:
    """(H, W) of the files and PIL images in an argument, before they are resized."""
    if isinstance(images, (list, tuple)):
        return {size for image in images for size in _file_sizes(image, name)}
    if not isinstance(images, (str, os.PathLike, Image.Image)):
        return set()
    header = _read(read_header, images, name)
    return {(header.height, header.width)}


def _is_white(mask: Tensor) -> Tensor:
    """bool: above the middle of the range of its dtype; numbers of another dtype must be in [0, 1]."""
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype in (torch.uint8, torch.uint16):
        return mask.int() > (127 if mask.dtype == torch.uint8 else 32767)
    values = mask.real.double()
    if mask.is_complex() or not ((values - 0.5).abs() <= 0.5 + 1e-4).all():
        low, high = values.min(), values.max()
        raise ValueError(f"mask is {mask.dtype}, {low:g} to {high:g}: give bool, uint8, uint16, or numbers in [0, 1]")
    return values > 0.5
