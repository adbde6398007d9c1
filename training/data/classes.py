"""CLASSES: the labels of a data set as classes to condition on, for batches, validation and samples."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.split import DataSplit, evenly_spaced
from training.messages import some

MAX_CLASSES = 1000  # more than this, or with fewer than two images each on average, and a warning is printed
MAX_ROWS = 10  # classes in a grid of samples


@dataclass(frozen=True)
class Classes:
    """Names and labels, from 0 to K - 1.

    Args:
        names: of the K classes: the labels in the order of the data set, or sorted.
        data: int64, the label of every image of DataSplit.data.
        train: (N,) int64, of the images that are trained on.
        held_out: (M,) int64, of the held-out images.
    """

    names: tuple[str, ...]
    data: np.ndarray
    train: np.ndarray
    held_out: np.ndarray

    @property
    def digest(self) -> str:
        """sha256 of all labels and their names."""
        sha256 = hashlib.sha256(repr(self.names).encode())
        for labels in (self.data, self.held_out):
            sha256.update(labels.astype("<i8").tobytes())
        return sha256.hexdigest()

    @property
    def counts(self) -> list[int]:
        """How many of the images that are trained on each class has."""
        return np.bincount(self.train, minlength=len(self.names)).tolist()

    def of_samples(self, index: np.ndarray) -> list[int]:
        """Labels for samples 0, 1, ...: of any number of them each class has about as many as in the data.

        The label at the quantile frac((i + 1/2) / golden ratio), which spreads evenly however many there are.
        """
        quantile = (index + 0.5) * (math.sqrt(5) - 1) / 2 % 1
        return np.searchsorted(np.cumsum(self.counts), quantile * len(self.train), side="right").tolist()

    def of_grid(self, num_images: int) -> list[int]:
        """Labels for a grid of about num_images samples with a row for each class, or for ten, evenly spaced."""
        rows = evenly_spaced(len(self.names), min(MAX_ROWS, num_images))
        return np.repeat(rows, max(1, num_images // len(rows))).tolist()

    def numbered_as(self, names: Sequence[str]) -> Classes:
        """The same classes with the numbers of a model that knows them by these names.

        Raises:
            ValueError: the model does not know one of them.
        """
        if unknown := [name for name in self.names if name not in names]:
            raise ValueError(f"the data has classes that the model was not trained on: {some(unknown)}")
        numbers = np.array([names.index(name) for name in self.names])
        return Classes(tuple(names), *(numbers[labels] for labels in (self.data, self.train, self.held_out)))

    def __str__(self) -> str:
        """Names and numbers of images, and warnings where the labels are hardly classes."""
        counts, names = self.counts, self.names
        lines = [f"{len(names)} classes: {some([f'{name} ({count})' for name, count in zip(names, counts)])}"]
        if len(names) > MAX_CLASSES or 2 * len(names) > len(self.train):
            lines.append(
                f"WARNING: {len(names)} classes for {len(self.train)} images, and each is learnt from its own images: "
                "are these the right labels (--label_column)?"
            )
        if empty := [name for name, count in zip(names, counts) if not count]:
            lines.append(f"WARNING: classes whose images are all held out are not learnt: {some(empty)}")
        return "\n".join(lines)


def find_classes(split: DataSplit) -> Classes:
    """The classes of the images of a split.

    Raises:
        ValueError: fewer than two classes, two of one name, an image without a label, or a held-out image of another
            class.
    """
    names = split.data.class_names()
    if len(names) < 2:
        raise ValueError(
            f"the images have {len(names)} different labels, and classes need at least 2 ({split.data.source}): give "
            "folders of classes, a metadata.csv with the columns file_name and label, or --label_column"
        )
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"different labels are called {some(twice)}, such as a number and a text: make them alike")
    labels = split.data.labels()
    assert labels is not None
    if len(unlabelled := np.flatnonzero(labels == len(names))):
        raise ValueError(
            f"{len(unlabelled)} images have no label, the first is {split.data.name(int(unlabelled[0]))}: give them "
            "one, or leave them out (of their shards with --streaming, else by --exclude)"
        )
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    held_out = split.held_out_set.label_names() if len(split.held_out) else []
    held_out = [held_out[i] for i in split.held_out_indices]
    if others := sorted({str(name) for name in held_out if name not in numbers}):
        raise ValueError(
            f"held-out images have labels that no training image has: {some(others)}: give another --validation_split, "
            "or none"
        )
    of_held_out = np.array([numbers[name] for name in held_out], dtype=np.int64)
    return Classes(names, labels, labels[split.train_indices], of_held_out)
