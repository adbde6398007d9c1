"""Images and files for the tests in this folder."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def smooth(height, width, channels=3):
    """Slow waves, so that a resized image can be compared with a formula."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(x / width * (c + 1)) + 40 * np.cos(y / height * 3) for c in range(channels)]
    return np.stack(waves, axis=2).round().astype(np.uint8)


def chw(pixels):
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def png(width, height, depth, kind, rows, *chunks):
    """A PNG made by hand, for what Pillow cannot write. Every row begins with its filter, 0."""

    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(png_chunk(*c) for c in chunks)
        + png_chunk(b"IDAT", packed)
        + png_chunk(b"IEND", b"")
    )


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(width, height, bits, photometric, data, *, order="<", sample_format=1, samples=1, extra=None):
    """An uncompressed TIFF made by hand, of one strip."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: height}
    tags |= {279: len(data), 339: sample_format} | ({} if extra is None else {338: extra})
    shared = bits if samples > 1 else None  # the values of the tag 258 do not fit into its entry
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start + (2 * samples if shared else 0)
    entries = b""
    for tag, value in sorted(tags.items()):
        count = samples if tag == 258 and shared else 1
        kind, code = (4, "I") if tag in (256, 257, 273, 279) or count > 2 else (3, "H")
        if count > 1:
            entries += struct.pack(order + "HHII", tag, 3, count, start)
        else:
            entries += struct.pack(order + "HHI" + code, tag, kind, 1, value) + (b"\0\0" if code == "H" else b"")
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(order + "HIH", 42, 8, len(tags)) + entries + b"\0\0\0\0"
    return head + (struct.pack(order + f"{samples}H", *[bits] * samples) if shared else b"") + data


def cell(pixels):
    """An image as the Hub's data sets store it in a column."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": "a.png"}


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
