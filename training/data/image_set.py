"""IMAGE SET: the decoded images of one data set, with their names and labels, as cache.py has left them on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """The images of one data set, all of one shape."""

    images: np.ndarray  # (N, C, H, W) uint8 or uint16, memory-mapped read-only
    source: str  # where they come from, for the log and the card; the part before the first ";" identifies the data set
    skipped: tuple[str, ...]  # "name: reason" of each unreadable image that was left out
    names_file: Path  # names.txt
    splits: tuple[str, ...] = ()  # all splits of the data set; empty for a folder of images
    digest: str = ""  # sha256 of the pixels, their shape and their dtype
    label_order: tuple[str, ...] | None = None  # of the labels in names.txt; None: they are sorted

    def name(self, i: int) -> str:
        """The name of image i: its path in the folder, or its row in the table."""
        with open(self.names_file, encoding="ascii") as lines:
            return str(json.loads(next(islice(lines, i, None)))[0])

    @cached_property
    def _labels(self) -> list[Any]:
        """The label of each image, None where it has none."""
        with open(self.names_file, encoding="ascii") as lines:
            return [label[0] if label else None for _, *label in map(json.loads, lines)]

    @cached_property
    def _distinct_labels(self) -> list[Any]:
        """In the order of the data set, or sorted."""
        return in_order(set(self._labels) - {None}, self.label_order)

    def class_names(self) -> tuple[str, ...]:
        """The labels that images have, as text."""
        return tuple(map(str, self._distinct_labels))

    def labels(self) -> np.ndarray | None:
        """(N,) int64, indices into `class_names`, or the number of them for an image without a label.

        None if all images have the same.
        """
        numbers = {label: i for i, label in enumerate([*self._distinct_labels, None])}
        labels = np.array([numbers[label] for label in self._labels])
        return labels if len(labels) and (labels != labels[0]).any() else None

    def label_names(self) -> list[str | None]:
        """The label of each image as text, None where it has none."""
        return [None if label is None else str(label) for label in self._labels]

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def height(self) -> int:
        return self.images.shape[2]

    @property
    def width(self) -> int:
        return self.images.shape[3]

    @property
    def max_value(self) -> int:
        """The value of white: 255 or 65535."""
        return int(np.iinfo(self.images.dtype).max)


def in_order(labels: set[Any], order: tuple[str, ...] | None) -> list[Any]:
    """These labels in the order of their data set; None: it has none, numbers before texts."""
    if order is not None:
        return [label for label in order if label in labels]
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def open_cache(folder: Path, notes: Iterable[str]) -> ImageSet:
    """The images in a folder of the cache.

    Args:
        notes: to add to the description of their source.
    Raises:
        ValueError: the folder is damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="ascii"))
        images = np.load(folder / "images.npy", mmap_mode="r")
        source = [meta["source"], *notes]
        if meta.get("max") is not None and meta["max"] * 10 <= np.iinfo(images.dtype).max:
            source.append(
                f"no pixel is brighter than {meta['max']} of {np.iinfo(images.dtype).max}, if these are masks or have "
                "fewer bits, scale them to the whole range"
            )
        return ImageSet(
            images,
            "; ".join(source),
            tuple(meta["skipped"]),
            folder / "names.txt",
            tuple(meta["splits"]),
            digest=meta["digest"],
            label_order=None if meta["label_order"] is None else tuple(meta["label_order"]),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}): delete it") from error
