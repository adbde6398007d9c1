"""DECODING: one image, from a file, its bytes or a PIL image, becomes an array of pixels. Training and pipeline use it.

Only the first frame of a file is used. It is turned upright by its EXIF or XMP orientation, and its transparent pixels
are composited on a background. Gray images have 1 channel, all others 3; images with more channels are .npy arrays,
(H, W, C). 16-bit gray keeps its 16 bits; in a data set with both depths, 8-bit images are multiplied by 257, which maps
0..255 onto 0..65535.

`convert("RGB")` alone gets much of this wrong: it reveals the colour hidden under alpha and clips 16-bit gray to white.
"""

import contextlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

# Only these, because Pillow detects the format by content and starts other programs for some of its formats (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
GRAY = frozenset(("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N"))
COLOUR = frozenset(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"))
IMAGE_CHANNELS = (1, 3, 4)  # numbers of channels of a PIL image: L, RGB, RGBA
ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap height and width
WITH_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # the keys of `image.info`
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two

# An encoded image or its file; None for an empty cell of a table; or a PIL image, of which the current frame is used.
Payload = bytes | Path | Image.Image | None


@dataclass(frozen=True)
class Header:
    """What is known about an image before it is decoded."""

    height: int  # upright
    width: int
    channels: int
    bits: int  # per channel, after decoding
    narrowed: bool  # the file has more than 8 bits per colour channel, and Pillow keeps 8
    animated: bool  # or several pages: more than one frame


class Size(NamedTuple):
    """What to resize an image to, and how: see Target."""

    height: int
    width: int
    center_crop: bool


@dataclass(frozen=True)
class Target:
    """What every image of a data set is decoded to."""

    channels: int  # with 4, alpha is the last one and nothing is composited; else the background is used
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
    header = _header_of_npy(payload) if is_npy(payload) else _header_of_image(payload)
    if min(header.height, header.width) < min_side:
        raise ValueError(f"{header.height} x {header.width} pixels: min_side is {min_side}")
    return header


def _header_of_npy(payload: Payload) -> Header:
    array = _open_npy(payload)
    height, width, channels = array.shape
    return Header(height, width, channels, 8 * array.itemsize, narrowed=False, animated=False)


def _header_of_image(payload: Payload) -> Header:
    with _open(payload) as image:
        wide, tags = _is_wide(image), _tiff_tags(image)
        if not wide and image.mode not in GRAY | COLOUR:
            kind = {"I": "32-bit or signed integers", "F": "floating point"}.get(image.mode, "unknown")
            raise ValueError(f"pixels are {kind} (mode {image.mode}): save it with 8 bits, or as 16-bit gray")
        if SIGNED in tags.get(SAMPLE_FORMAT, ()):  # which Pillow reads as unsigned if it has 8 bits
            raise ValueError("pixels are signed integers: save it with 8 bits, or as 16-bit gray")
        tiles = getattr(image, "tile", [])  # how a file that is not loaded yet is coded
        coding = str(tiles)
        max_value = tiles[0].args[-1] if tiles and image.format == "PPM" and isinstance(tiles[0].args, tuple) else 0
        height, width = _upright_size(image)
        gray = wide or image.mode in GRAY or "LA;16" in coding  # 16-bit gray with alpha, which Pillow reads as RGBA
        return Header(
            height,
            width,
            channels=1 if gray else 3,
            bits=16 if wide else 8,
            narrowed=not wide and (";16" in coding or max_value > 255),
            animated=not isinstance(payload, Image.Image) and getattr(image, "is_animated", False),
        )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) as `_layers` has them, from the metadata alone wherever it is before the pixels."""
    if image.format == "PNG" and getattr(image, "fp", None) and _has_late_metadata(image.fp):  # type: ignore[attr-defined]  # of files
        image.load()
    width, height = image.size
    # Look in `info` first, and past PNG's own getexif(), which decodes an image without EXIF. Pillow has swapped the
    # sides of a TIFF with this tag already.
    has_orientation = any(key in image.info for key in WITH_ORIENTATION) and ORIENTATION not in _tiff_tags(image)
    if has_orientation and Image.Image.getexif(image).get(ORIENTATION) in (5, 6, 7, 8):
        return width, height
    return height, width


def _has_late_metadata(file: Any) -> bool:
    """Whether a PNG has text or EXIF after its pixels, which Pillow reads only once it has decoded them."""
    position, after_pixels, found = file.tell(), False, False
    file.seek(8)
    while not found and len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        after_pixels |= kind == b"IDAT"
        found = after_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        file.seek(length + 4, 1)
    file.seek(position)
    return found


def _tiff_tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _is_wide(image: Image.Image) -> bool:
    """Whether this is gray with 16 bits: Pillow's I;16, and the mode I of a PGM file with more than 256 levels."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def decode(payload: Payload, target: Target) -> np.ndarray:
    """The image as `target` describes it: (C, H, W) uint8 or uint16.

    Raises:
        Exception: whatever Pillow raises for a broken file.
    """
    pixels = np.array(_open_npy(payload)) if is_npy(payload) else _pixels(payload, target)
    widen = pixels.itemsize == 1 and target.dtype == "uint16"
    pixels = pixels.astype(target.dtype, copy=False)  # also to the byte order of this machine
    if widen:
        pixels = pixels * np.uint16(257)  # 255 * 257 = 65535
    if (pixels.shape[0], pixels.shape[1]) != (target.height, target.width):
        pixels = _resize(pixels, target)
    if pixels.shape[2] != target.channels:
        pixels = np.repeat(pixels, target.channels, axis=2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_for(
    payload: Payload, channels: int, background: tuple[int, int, int], size: Size | None = None
) -> np.ndarray:
    """One image with this many channels, (C, H, W) uint8 or uint16, at its own depth.

    Args:
        size: to resize it to; None: its own.
    Raises:
        ValueError: only a .npy file can have this many channels, or this one has others.
        Exception: as read_header and decode.
    """
    header = read_header(payload)
    if is_npy(payload):
        if header.channels != channels and (header.channels, channels) != (1, 3):
            raise ValueError(f"it has {header.channels} channels: give {channels}")
    elif channels not in IMAGE_CHANNELS:
        raise ValueError(f"the model has {channels} channels, and PIL images have 1, 3 or 4: give arrays or tensors")
    behind = background_values(background, channels)
    height, width, center_crop = size or Size(header.height, header.width, center_crop=False)
    return decode(payload, Target(channels, f"uint{header.bits}", height, width, center_crop, behind))


def decode_mask(payload: Payload, size: Size | None = None) -> np.ndarray:
    """Luminance times alpha, (H, W) in [0, 1].

    Args:
        size: to resize it to; None: its own.
    Raises:
        ValueError: a .npy file with several channels.
        Exception: as read_header and decode.
    """
    read_header(payload)
    if is_npy(payload):
        array = _open_npy(payload)
        if array.shape[2] != 1:
            raise ValueError(f"the array is {array.shape} {array.dtype}: a mask has one channel")
        mask = array / np.iinfo(array.dtype).max
    else:
        pixels, alpha = _layers(payload, "L")
        white = float(np.iinfo(pixels.dtype).max)
        mask = pixels / white if alpha is None else (pixels / white) * (alpha / white)
    if size is not None and mask.shape[:2] != size[:2]:
        mask = _resize(np.rint(65535 * mask).astype(np.uint16), size) / 65535
    return mask[:, :, 0]


def _pixels(payload: Payload, target: Target) -> np.ndarray:
    """(H, W, C) uint8 or uint16, upright; with alpha for 4 channels, else composited, and C is 1 or 3."""
    pixels, alpha = _layers(payload, "L" if target.channels == 1 else "RGB")
    white = np.iinfo(pixels.dtype).max
    if target.channels == 4:
        colour = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        return np.concatenate([colour, np.full_like(pixels[:, :, :1], white) if alpha is None else alpha], axis=2)
    if alpha is None:
        return pixels
    dtype: Any = np.uint16 if white == 255 else np.uint32  # in which the products fit
    behind = np.array([value * (white // 255) for value in target.background], dtype)
    blend = pixels.astype(dtype) * alpha + behind * (dtype(white) - alpha)
    return ((blend + white // 2) // white).astype(pixels.dtype)  # rounds to nearest; no ties, since white is odd


def _layers(payload: Payload, mode: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The pixels, (H, W, 1 or 3), and alpha, (H, W, 1), both upright and uint8 or uint16; no alpha if it is opaque.

    Args:
        mode: "L" or "RGB", for images that are not 16-bit gray.
    """
    with _open(payload) as original:
        wide, tags, coding = _is_wide(original), dict(_tiff_tags(original)), str(getattr(original, "tile", []))
        image = ImageOps.exif_transpose(original)
    if "transparency" in image.info:
        image.info["transparency"] = _scaled_key(image.info["transparency"], coding)
    if wide:
        pixels = np.array(image).astype(np.uint16)[:, :, None]
        alpha = None
        if image.has_transparency_data:  # one gray value that means transparent
            alpha = np.where(pixels == image.info["transparency"], 0, 65535).astype(np.uint16)
        if tags.get(BITS_PER_SAMPLE) == (12,):  # Pillow leaves 0..4095, and 0 as it is where it is white
            pixels = ((pixels * np.uint32(65535) + 2047) // 4095).astype(np.uint16)
        if tags and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO:
            pixels = 65535 - pixels
        return pixels, alpha
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return np.array(image.convert(mode)).reshape(image.height, image.width, -1), None
    image = image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA")
    pixels = np.array(image.convert("RGB").convert(mode)).reshape(image.height, image.width, -1)
    return pixels, np.array(image.getchannel("A"))[:, :, None]


def _scaled_key(key: Any, coding: str) -> Any:
    """The value or colour that a PNG declares transparent, on the scale of the pixels, which Pillow leaves out."""
    if isinstance(key, int):
        return key * (85 if "'L;2'" in coding else 17 if "'L;4'" in coding else 1)  # 3 and 15 become 255
    if isinstance(key, tuple) and ("RGB;16" in coding or max(key) > 255):  # a PIL image that is loaded has no coding
        return tuple(value >> 8 for value in key)
    return key


def _resize(pixels: np.ndarray, target: Target | Size) -> np.ndarray:
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


def _open(payload: Payload) -> contextlib.AbstractContextManager[Image.Image]:
    if isinstance(payload, Image.Image):
        return contextlib.nullcontext(payload)
    if not payload or (isinstance(payload, Path) and payload.stat().st_size == 0):
        raise ValueError("empty")
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)


def is_npy(payload: Payload) -> bool:
    return isinstance(payload, Path) and payload.suffix.lower() == ".npy"


def _open_npy(payload: Payload) -> np.ndarray:
    """(H, W, C), memory-mapped."""
    assert isinstance(payload, Path)
    array = np.lib.format.open_memmap(payload, mode="r")
    if array.ndim not in (2, 3) or array.dtype.kind != "u" or array.itemsize > 2:
        raise ValueError(f"the array is {array.shape} {array.dtype}: give (H, W) or (H, W, C), uint8 or uint16")
    if array.ndim == 2:
        return array[:, :, None]
    height, width, channels = array.shape
    # (12, 64, 64), (12, 48, 64) and (3, 12, 16) are rather (C, H, W); (64, 64, 200) and (200, 64, 3) are clear.
    few_rows = height <= 4 and channels > 8
    if height != width and (few_rows or (width == channels and channels > 4) or channels > max(16, height)):
        raise ValueError(f"the array is {array.shape}, which looks channels-first: save it channels last, (H, W, C)")
    return array


def failure_reason(error: Exception) -> str:
    """Why an image cannot be read, without its path: Pillow raises OSError, SyntaxError, struct.error and more."""
    if isinstance(error, UnidentifiedImageError):  # its message has the full path, or an address in memory
        return "not an image in a known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


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


def background_values(colour: tuple[int, int, int], channels: int) -> tuple[int, ...]:
    """A background as in `Target`: for gray images the luminance of the colour."""
    return (luminance(colour),) if channels == 1 else colour
