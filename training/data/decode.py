"""DECODING: one image, from a file or its bytes, becomes an array of pixels.

Only the first frame is used. It is turned upright by its EXIF orientation, and its transparent pixels are composited on
a background. Gray images have 1 channel, all others 3; images with more channels are .npy arrays, (H, W, C). 16-bit
gray keeps its 16 bits; in a data set with both depths, 8-bit images are multiplied by 257, which maps 0..255 onto
0..65535.

`convert("RGB")` alone gets much of this wrong: it reveals the colour hidden under alpha and clips 16-bit gray to white.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps

# Only these, because Pillow detects the format by content and starts other programs for some of its formats (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
GRAY = frozenset(("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N"))
COLOUR = frozenset(("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap height and width

Payload = bytes | Path | None  # an encoded image, or its file; None for an empty cell of a table


@dataclass(frozen=True)
class Header:
    """What is known about an image before it is decoded."""

    height: int  # upright
    width: int
    channels: int
    bits: int  # per channel, after decoding
    narrowed: bool  # the file has 16 bits per colour channel, and Pillow reads the upper 8
    animated: bool  # or several pages: more than one frame


@dataclass(frozen=True)
class Target:
    """What every image of a data set is decoded to."""

    channels: int
    dtype: str  # uint8 or uint16
    height: int
    width: int
    center_crop: bool  # resize to cover the size and crop the rest; False stretches the image to it
    background: tuple[int, ...]  # 8-bit values: one for gray images, else three


# ---- Headers ---------------------------------------------------------------------------------------------------------


def read_header(payload: Payload, min_side: int = 1) -> Header:
    """Size, channels and bits of an image, without decoding it.

    Raises:
        ValueError: a side is shorter than min_side, or the pixels are of a kind that cannot be read.
        Exception: whatever Pillow raises for a broken file.
    """
    header = _header_of_npy(payload) if _is_npy(payload) else _header_of_image(payload)
    if min(header.height, header.width) < min_side:
        raise ValueError(f"{header.height} x {header.width} pixels: min_side is {min_side}")
    return header


def _header_of_npy(payload: Payload) -> Header:
    array = _open_npy(payload)
    height, width, channels = array.shape
    return Header(height, width, channels, 8 * array.itemsize, narrowed=False, animated=False)


def _header_of_image(payload: Payload) -> Header:
    with _open(payload) as image:
        if image.mode not in GRAY | COLOUR:
            kind = {"I": "32-bit or signed integers", "F": "floating point"}.get(image.mode, "unknown")
            raise ValueError(f"pixels are {kind} (mode {image.mode}): save it with 8 bits, or as 16-bit gray")
        width, height = image.size
        # Look in `info` first: getexif() of a PNG without EXIF decodes the whole image. A TIFF is turned already.
        if "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
        is_16 = image.mode.startswith("I;16")
        coding = str(image.tile)
        gray = image.mode in GRAY or "LA;16" in coding  # 16-bit gray with alpha, which Pillow reads as RGBA
        return Header(
            height,
            width,
            channels=1 if gray else 3,
            bits=16 if is_16 else 8,
            narrowed=";16" in coding and not is_16,
            animated=getattr(image, "is_animated", False),
        )


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def decode(payload: Payload, target: Target) -> np.ndarray:
    """The image as `target` describes it: (C, H, W) uint8 or uint16.

    Raises:
        Exception: whatever Pillow raises for a broken file.
    """
    pixels = np.array(_open_npy(payload)) if _is_npy(payload) else _upright_pixels(payload, target)
    widen = pixels.itemsize == 1 and target.dtype == "uint16"
    pixels = pixels.astype(target.dtype, copy=False)  # also to the byte order of this machine
    if widen:
        pixels = pixels * np.uint16(257)  # 255 * 257 = 65535
    if (pixels.shape[0], pixels.shape[1]) != (target.height, target.width):
        pixels = _resize(pixels, target)
    if pixels.shape[2] != target.channels:
        pixels = np.repeat(pixels, target.channels, axis=2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _upright_pixels(payload: Payload, target: Target) -> np.ndarray:
    """(H, W, C) uint8 or uint16, upright and without alpha; C is 1 or 3."""
    with _open(payload) as image:
        ImageOps.exif_transpose(image, in_place=True)
        transparent = image.has_transparency_data
        if image.mode.startswith("I;16"):
            pixels = np.array(image).astype(np.uint16)[:, :, None]
            if transparent:  # one gray value that means transparent
                background = np.array(target.background, np.uint16) * np.uint16(257)
                pixels = np.where(pixels == image.info["transparency"], background, pixels)
            return pixels
        mode = "L" if target.channels == 1 else "RGB"
        if not transparent:
            return np.array(image.convert(mode)).reshape(image.height, image.width, -1)
        layers = np.array(image.convert(mode + "A")).astype(np.uint16)
        pixels, alpha = layers[:, :, :-1], layers[:, :, -1:]
        blend = pixels * alpha + np.array(target.background, np.uint16) * (255 - alpha)  # at most 255^2: fits
        return ((blend + 127) // 255).astype(np.uint8)  # rounds to nearest; no ties, since 255 is odd


def _resize(pixels: np.ndarray, target: Target) -> np.ndarray:
    height, width = pixels.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    if target.center_crop:
        scale = min(height / target.height, width / target.width)  # source pixels per target pixel
        x = max(0.0, (width - scale * target.width) / 2)
        y = max(0.0, (height - scale * target.height) / 2)
        box = (x, y, width - x, height - y)
    channels = []
    for channel in np.moveaxis(pixels, 2, 0):
        wide = channel.dtype == np.uint16  # Pillow resizes 16 bits badly and floating point well
        image = Image.fromarray(channel.astype(np.float32) if wide else np.ascontiguousarray(channel))
        resized = np.asarray(image.resize((target.width, target.height), Image.Resampling.LANCZOS, box))
        channels.append(np.clip(np.rint(resized), 0, 65535).astype(np.uint16) if wide else resized)
    return np.stack(channels, axis=2)


# ---- Opening ---------------------------------------------------------------------------------------------------------


def _open(payload: Payload) -> ImageFile.ImageFile:
    if not payload or (isinstance(payload, Path) and payload.stat().st_size == 0):
        raise ValueError("empty")
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)


def _is_npy(payload: Payload) -> bool:
    return isinstance(payload, Path) and payload.suffix.lower() == ".npy"


def _open_npy(payload: Payload) -> np.ndarray:
    """(H, W, C), memory-mapped."""
    assert isinstance(payload, Path)
    array = np.lib.format.open_memmap(payload, mode="r")
    if array.ndim not in (2, 3) or array.dtype.kind != "u" or array.itemsize > 2:
        raise ValueError(f"the array is {array.shape} {array.dtype}: give (H, W) or (H, W, C), uint8 or uint16")
    return array[:, :, None] if array.ndim == 2 else array


# ---- The background --------------------------------------------------------------------------------------------------


def parse_colour(name: str) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255, of a CSS colour name or #rrggbb.

    Raises:
        ValueError: anything else, or a colour with transparency.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"background is {name!r}: give a CSS colour name or #rrggbb") from None
    if alpha:
        raise ValueError(f"background is {name!r}: give a colour without transparency")
    return red, green, blue


def luminance(colour: tuple[int, int, int]) -> int:
    """The gray value of a colour by ITU-R BT.601, which is how Pillow converts to gray."""
    return int(np.array(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0])
