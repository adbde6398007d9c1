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

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


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
