"""FILES TO PIXELS: pictures from a folder, the Hub or the moons become one memory-mapped array, decoded once.

This is the only place that knows files. `load_images` reads every picture twice: a quick pass over the headers settles
what all must share (size, channels, 8 or 16 bits), a second pass decodes. Then the array is kept in a cache, named by a
hash of everything it depends on, and the next run maps it into memory and starts at once.

    <cache_dir>/<key>/images.npy   (N, C, H, W) uint8 or uint16
    <cache_dir>/<key>/names.txt    for each a line of JSON: its name, and its label if the data set has labels
    <cache_dir>/<key>/meta.json    what it was made from, which pictures were left out and why, the data set's splits

What a picture means: its first frame, turned upright as its EXIF says, composited on a background where it is
transparent. All gray pictures give 1 channel, any colour gives 3. If one picture is 16-bit gray, all become 16-bit:
x 257, which maps 0..255 onto 0..65535. More channels come as .npy files of (H, W, C). `convert("RGB")` alone would get
much of this wrong: it shows the colours hidden under alpha and clips 16-bit gray to white.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps

# Pillow goes by content, not by name, and some of its formats start other programs (EPS): so only these.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
GRAY = frozenset(("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N"))
COLOUR = frozenset(("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap height and width
Payload = bytes | Path | None  # an encoded picture, or where it is


class _Target(NamedTuple):
    """What every picture is made into."""

    channels: int
    dtype: str
    height: int
    width: int
    center_crop: bool
    background: tuple[int, ...]  # 1 value for gray pictures, else 3


class _Header(NamedTuple):
    height: int
    width: int
    channels: int
    bits: int
    narrowed: bool  # 16 bits per colour channel: Pillow reads the upper 8
    frames: bool  # more than one


def _read_header(payload: Payload, min_side: int) -> _Header:
    header = _header_of_npy(payload) if _is_npy(payload) else _header_of_image(payload)
    if min(header.height, header.width) < min_side:
        raise ValueError(f"{header.height} x {header.width} pixels: min_side is {min_side}")
    return header


def _header_of_npy(payload: Payload) -> _Header:
    array = _open_npy(payload)
    height, width, channels = array.shape
    return _Header(height, width, channels, 8 * array.itemsize, False, False)


def _header_of_image(payload: Payload) -> _Header:
    with _open(payload) as image:
        if image.mode not in GRAY | COLOUR:
            kind = {"I": "32-bit or signed integers", "F": "floating point"}.get(image.mode, "unknown")
            raise ValueError(f"pixels of mode {image.mode} ({kind}); 8-bit, and gray of 16 bits, can be read")
        width, height = image.size
        # Asking a PNG without EXIF for it would decode the whole picture. The size of a TIFF has been turned already.
        if "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
        is_16 = image.mode.startswith("I;16")
        coding = str(image.tile)
        gray = image.mode in GRAY or "LA;16" in coding  # 16-bit gray with alpha, which Pillow reads as RGBA
        narrowed, frames = ";16" in coding and not is_16, getattr(image, "is_animated", False)
        return _Header(height, width, 1 if gray else 3, 16 if is_16 else 8, narrowed, frames)


def _decode(payload: Payload, target: _Target) -> np.ndarray:
    """(C, H, W) as the target wants it."""
    pixels = np.array(_open_npy(payload)) if _is_npy(payload) else _pixels(payload, target)
    narrow = pixels.itemsize == 1 and target.dtype == "uint16"
    pixels = pixels.astype(target.dtype, copy=False)  # from a file it may have the other byte order
    if narrow:
        pixels = pixels * np.uint16(257)  # 255 * 257 = 65535
    if (pixels.shape[0], pixels.shape[1]) != (target.height, target.width):
        pixels = _resize(pixels, target)
    if pixels.shape[2] != target.channels:
        pixels = np.repeat(pixels, target.channels, axis=2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _pixels(payload: Payload, target: _Target) -> np.ndarray:
    """(H, W, C) uint8 or uint16, upright and without alpha; C is 1 or 3."""
    with _open(payload) as image:
        ImageOps.exif_transpose(image, in_place=True)
        transparent = image.has_transparency_data
        if image.mode.startswith("I;16"):
            pixels = np.array(image).astype(np.uint16)[:, :, None]
            if transparent:  # one gray value that stands for nothing
                background = np.array(target.background, np.uint16) * np.uint16(257)
                pixels = np.where(pixels == image.info["transparency"], background, pixels)
            return pixels
        mode = "L" if target.channels == 1 else "RGB"
        if not transparent:
            return np.array(image.convert(mode)).reshape(image.height, image.width, -1)
        layers = np.array(image.convert(mode + "A")).astype(np.uint16)
        pixels, alpha = layers[:, :, :-1], layers[:, :, -1:]
        mixed = pixels * alpha + np.array(target.background, np.uint16) * (255 - alpha)  # at most 255^2: fits
        return ((mixed + 127) // 255).astype(np.uint8)  # rounded: there is no half, for 255 is odd


def _resize(pixels: np.ndarray, target: _Target) -> np.ndarray:
    height, width = pixels.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    if target.center_crop:
        scale = min(height / target.height, width / target.width)  # pixels of the picture per pixel of the target
        x = max(0.0, (width - scale * target.width) / 2)
        y = max(0.0, (height - scale * target.height) / 2)
        box = (x, y, width - x, height - y)
    channels = []
    for channel in np.moveaxis(pixels, 2, 0):
        wide = channel.dtype == np.uint16  # Pillow cannot resize 16 bits well, but floating point it can
        image = Image.fromarray(channel.astype(np.float32) if wide else np.ascontiguousarray(channel))
        resized = np.asarray(image.resize((target.width, target.height), Image.Resampling.LANCZOS, box))
        channels.append(np.clip(np.rint(resized), 0, 65535).astype(np.uint16) if wide else resized)
    return np.stack(channels, axis=2)


def _open(payload: Payload) -> ImageFile.ImageFile:
    if payload is None or payload == b"":
        raise ValueError("empty")
    if isinstance(payload, Path) and payload.stat().st_size == 0:
        raise ValueError("empty")
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)


def _is_npy(payload: Payload) -> bool:
    return isinstance(payload, Path) and payload.suffix.lower() == ".npy"


def _open_npy(payload: Payload) -> np.ndarray:
    """(H, W, C), mapped."""
    assert isinstance(payload, Path)
    array = np.lib.format.open_memmap(payload, mode="r")
    if array.ndim not in (2, 3) or array.dtype.kind != "u" or array.itemsize > 2:
        raise ValueError(f"an array {array.shape} of {array.dtype}; give (H, W) or (H, W, C), uint8 or uint16")
    return array[:, :, None] if array.ndim == 2 else array


def _colour(name: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"background is {name!r}: give a CSS colour name or #rrggbb") from None
    if alpha:
        raise ValueError(f"background is {name!r}: give a colour without transparency")
    return red, green, blue


def _luminance(colour: tuple[int, int, int]) -> int:
    """Of ITU-R BT.601, as Pillow makes gray of colour."""
    return int(np.array(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0])
