"""SPLIT: which images a model is trained on, and which are held out to measure it.

If a data set has a validation or test split, that is the held-out set. Otherwise every 20th image, at most 1000, is
held out. Which ones depends only on the number of images, so a resumed run and a later evaluation agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.cache import load_images
from training.data.image_set import ImageSet

HELD_OUT_SPLITS = ("validation", "valid", "val", "test")  # the first of them that a data set has is held out
HELD_OUT_EVERY, MAX_HELD_OUT = 20, 1000  # without such a split: one image in 20, at most 1000


def evenly_spaced(count: int, num_indices: int) -> np.ndarray:
    """`num_indices` evenly spaced indices of range(count), or all of them if count is not larger."""
    return np.arange(count) if num_indices >= count else np.arange(num_indices) * count // num_indices


def splits_to_hold_out(splits: Sequence[str], trained_on: str) -> list[str]:
    """The splits of which no image is in `trained_on`, such as "train", "train[:100]" or "train+test"."""
    parts = {part.partition("[")[0].strip() for part in trained_on.split("+")}
    return [name for name in splits if name not in {*parts, "train"}]


@dataclass(frozen=True)
class DataSplit:
    """The images that a model is trained on, and the held-out set."""

    data: ImageSet  # the training split, or a data set of which some images are held out
    train_indices: np.ndarray  # (N,) int64, ascending: which of `data` the model is trained on
    held_out: np.ndarray  # (M, C, H, W), same dtype as data.images; M may be 0
    held_out_source: str  # where the held-out set comes from, for the log, the run record and the report
    held_out_set: ImageSet  # which the held-out images are in
    held_out_indices: np.ndarray  # (M,) int64, which of them
    num_train: int | None = None  # how many images the model is trained on, if `data` is a sample of them

    @property
    def num_train_images(self) -> int:
        """How many images the model is trained on."""
        return len(self.train_indices) if self.num_train is None else self.num_train

    def in_memory(self) -> DataSplit:
        """This split with images that can be read all at once: of a streamed one a sample, see streaming.py."""
        return self

    @property
    def train_images(self) -> np.ndarray:
        """(N, C, H, W): data.images itself if none of them is held out, otherwise a copy."""
        return self.data.images if len(self.train_indices) == len(self.data) else self.data.images[self.train_indices]

    def train_labels(self) -> np.ndarray | None:
        """(N,) int64, the labels of `train_images`; None if there are fewer than two (see ImageSet.labels)."""
        labels = self.data.labels()
        return None if labels is None else labels[self.train_indices]


def choose_held_out_split(validation_split: str | None, splits: Sequence[str], trained_on: str) -> str | None:
    """The split to hold out; None: there is none, and images of the training split are held out.

    Raises:
        ValueError: the data set has no such split.
    """
    others = splits_to_hold_out(splits, trained_on)
    if validation_split is None:
        return next((name for name in HELD_OUT_SPLITS if name in others), None)
    if validation_split in others:
        return validation_split
    allowed = " or ".join([*others, "none"])
    raise ValueError(
        f"validation_split is {validation_split!r}: give {allowed}, the data set has no other split to hold out"
    )


def check_alike(held_out: ImageSet, data: ImageSet, split: str) -> None:
    """Raise ValueError if the images of this split have other channels, sizes or bits than those to train on."""
    if held_out.images.shape[1:] != data.images.shape[1:] or held_out.images.dtype != data.images.dtype:
        raise ValueError(
            f"split {split!r} has images {held_out.images.shape[1:]} of {held_out.images.dtype}, the training split "
            f'{data.images.shape[1:]} of {data.images.dtype}: give another validation_split, or "none"'
        )


def load_data_split(validation_split: str | None = None, **options: Any) -> DataSplit:
    """The images of `load_images(**options)` to train on, and a held-out set.

    Args:
        validation_split: the split of the data set to hold out. None: the first of validation, valid, val and test that
            the data set has, or, if it has none, every 20th image, at most 1000. "none": nothing.
    Raises:
        ValueError: the data set has no such split, or its images have other channels or bits; and all of load_images.
    """
    data = load_images(**options)
    every_image = np.arange(len(data))
    if validation_split == "none":
        return DataSplit(data, every_image, data.images[:0], "nothing", data, every_image[:0])

    split = choose_held_out_split(validation_split, data.splits, options.get("split", "train"))
    if split is None:
        step = max(HELD_OUT_EVERY, -(-len(data) // MAX_HELD_OUT))
        chosen = np.arange(step - 1, len(data), step)
        source = f"one in {step} of {len(data)} images, not trained on" if len(chosen) else "nothing: too few images"
        held_out_images = np.array(data.images[chosen])
        return DataSplit(data, np.setdiff1d(every_image, chosen), held_out_images, source, data, chosen)

    # At the size of the training images, whatever the most common size in this split is.
    held_out = load_images(**options | {"split": split, "resolution": (data.height, data.width)})
    check_alike(held_out, data, split)
    indices = np.arange(len(held_out))
    return DataSplit(data, every_image, held_out.images, held_out.source, held_out, indices)
