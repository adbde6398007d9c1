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

from typing import Any, NamedTuple

import numpy as np

from training.data.cache import ImageSet, load_images

HELD_OUT_SPLITS = ("validation", "valid", "val", "test")  # the first that a data set has, unless told
HELD_OUT_EVERY, HELD_OUT_MOST = 20, 1000  # of a data set without one every 20th picture, but no more than 1000


def evenly(number: int, wanted: int) -> np.ndarray:
    """Indices of so many of them, evenly spread; all if there are no more."""
    return np.arange(number) if wanted >= number else np.arange(wanted) * number // wanted


class DataSplit(NamedTuple):
    """What is learned from, and what is held out to see how well."""

    data: ImageSet  # what was read first, of which `rows` are learned from
    train_indices: np.ndarray  # (N,) int64, rising
    held_out: np.ndarray  # (M, C, H, W), of the type of data.images; M may be 0
    source: str  # of the held-out pictures, in words

    @property
    def training(self) -> np.ndarray:
        """(N, C, H, W): a view of the data if nothing of it is held out, else a copy."""
        return self.data.images if len(self.train_indices) == len(self.data) else self.data.images[self.train_indices]

    def labels(self) -> np.ndarray | None:
        """Of `training`: see ImageSet.labels."""
        labels = self.data.labels()
        return None if labels is None else labels[self.train_indices]


def load_data_split(split: str | None = None, **options: Any) -> DataSplit:
    """The pictures of `load_images(**options)`, and others that are held out from learning.

    Args:
        split: of the data set, to hold out: by default a split for that if it has one, else every 20th picture, 1000 at
            most; "none": nothing.
    Raises:
        ValueError: the data set has no such split, or its pictures are of another kind.
    """
    data = load_images(**options)
    rows = np.arange(len(data))
    if split == "none":
        return DataSplit(data, rows, data.images[:0], "nothing")
    if split is None:
        split = next((name for name in HELD_OUT_SPLITS if name in data.splits), None)
    elif split not in data.splits or split == "train":
        allowed = [name for name in data.splits if name != "train"] or "no split but its own"
        raise ValueError(f"validation_split is {split!r}: the data set has {allowed}; or give none")
    if split is None:
        every = max(HELD_OUT_EVERY, -(-len(data) // HELD_OUT_MOST))
        chosen = np.arange(every - 1, len(data), every)
        words = (
            f"every {every}th picture of {data.source}, not learned from"
            if len(chosen)
            else "nothing: too few pictures"
        )
        return DataSplit(data, np.setdiff1d(rows, chosen), np.array(data.images[chosen]), words)
    # of the size of those that are learned from, whatever is commonest among these
    others = load_images(**options | {"split": split, "resolution": (data.height, data.width)})
    if others.images.shape[1:] != data.images.shape[1:] or others.images.dtype != data.images.dtype:
        raise ValueError(
            f"split {split!r} has pictures {others.images.shape[1:]} of {others.images.dtype}, the training split "
            f"{data.images.shape[1:]} of {data.images.dtype}: give another validation_split, or none"
        )
    return DataSplit(data, rows, others.images, others.source)
