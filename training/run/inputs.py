"""INPUTS: the images of a run, their classes and batches, the same on all ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.data.batches import Batches, Labels
from training.data.split import DataSplit, evenly_spaced, load_data_split
from training.messages import some

if TYPE_CHECKING:
    from training.config import Config
    from training.run.runtime import Runtime

MAX_CLASSES = 1000  # more than this, or with fewer than two images each on average, and a warning is printed
MAX_ROWS = 10  # classes in a grid of samples


@dataclass(frozen=True)
class Classes:
    """The classes that a network is conditioned on.

    Args:
        names: of classes 0 to K - 1.
        labels: (N,) int64, of the images that are trained on.
        held_out: (M,) int64, of the held-out images.
        num_class_embeds: of the network: K + 1 with the null class, K if no label is dropped.
        digest: sha256 of the names and of the labels of all images.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    held_out: np.ndarray
    num_class_embeds: int
    digest: str

    @property
    def counts(self) -> list[int]:
        """How many of the images that are trained on each class has."""
        return np.bincount(self.labels, minlength=len(self.names)).tolist()

    def as_in_data(self, num_images: int) -> list[int]:
        """Labels for samples, each class as often as in the data."""
        middles = (2 * np.arange(num_images) + 1) * len(self.labels) // (2 * num_images)
        return np.sort(self.labels)[middles].tolist()

    def of_grid(self, num_images: int) -> list[int]:
        """Labels for a grid of about num_images samples with a row for each class, or for ten, evenly spaced."""
        rows = evenly_spaced(len(self.names), min(MAX_ROWS, num_images))
        return np.repeat(rows, max(1, num_images // len(rows))).tolist()


@dataclass(frozen=True)
class Inputs:
    """Images, classes (None: not conditioned) and batches."""

    split: DataSplit
    classes: Classes | None
    batches: Batches
    global_batch: int

    @property
    def num_images(self) -> int:
        """How many images are trained on."""
        return len(self.split.train_indices)


def load_inputs(config: Config, runtime: Runtime) -> Inputs:
    """Load the data of a run on all ranks, and print what it is.

    Raises:
        ValueError: as load_images, DataSplit.class_labels and Runtime.agree.
    """
    split = runtime.in_turn(lambda: load_split(config))
    data = split.data
    labels, classes = None, None
    if config.class_conditional:
        found = split.class_labels()
        labels = Labels(found.data, len(found.names), config.label_dropout, config.balance_classes)
        sha256 = hashlib.sha256(repr(found.names).encode())
        for part in (found.data, found.held_out):
            sha256.update(part.astype("<i8").tobytes())
        num_class_embeds = len(found.names) + (config.label_dropout > 0)
        of_training = found.data[split.train_indices]
        classes = Classes(found.names, of_training, found.held_out, num_class_embeds, sha256.hexdigest())
    runtime.agree(
        number_of_images=len(split.train_indices),
        sha256_of_the_images=data.digest,
        number_of_held_out_images=len(split.held_out),
        sha256_of_the_labels=None if classes is None else classes.digest,
    )
    shape = f"{data.channels} x {data.height} x {data.width}"
    runtime.print(f"{len(split.train_indices)} images, {shape}, {data.images.dtype}, from {data.source}")
    if len(split.held_out):
        runtime.print(f"held out: {len(split.held_out)} images, {split.held_out_source}")
    if classes is not None:
        runtime.print(describe_classes(classes))
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * runtime.world_size
    batches = Batches(
        data.images,
        train_indices=split.train_indices,
        batch_size=global_batch,
        seed=config.seed,
        random_flip=config.random_flip,
        labels=labels,
        device=runtime.device,
    )
    return Inputs(split, classes, batches, global_batch)


def load_split(config: Config) -> DataSplit:
    """The images to train on and the held-out images."""
    return load_data_split(
        config.validation_split if config.validation_steps else "none",
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        train_data_dir=config.train_data_dir,
        split=config.split,
        image_column=config.image_column,
        label_column=config.label_column,
        include=config.include,
        exclude=config.exclude,
        follow_links=config.follow_links,
        split_folders=config.split_folders,
        resolution=config.height_width,
        center_crop=config.center_crop,
        background=config.background,
        on_bad_image=config.on_bad_image,
        min_side=config.min_side,
        cache_dir=Path(config.cache_dir).expanduser(),
        num_workers=config.dataloader_num_workers,
    )


def describe_classes(classes: Classes) -> str:
    """Names and numbers of images, and warnings where the labels are hardly classes."""
    counts, names = classes.counts, classes.names
    lines = [f"{len(names)} classes: {some([f'{name} ({count})' for name, count in zip(names, counts)])}"]
    if len(names) > MAX_CLASSES or 2 * len(names) > len(classes.labels):
        lines.append(
            f"WARNING: {len(names)} classes for {len(classes.labels)} images, and each is learnt from its own images: "
            "are these the right labels (--label_column)?"
        )
    if empty := [name for name, count in zip(names, counts) if not count]:
        lines.append(f"WARNING: classes whose images are all held out are not learnt: {some(empty)}")
    return "\n".join(lines)
