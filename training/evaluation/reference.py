"""REFERENCE: the real images of an evaluation: the reference set, the real-data baseline and the held-out set."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.config import Config
from training.data.classes import Classes
from training.data.shards import is_sharded
from training.data.split import DataSplit, evenly_spaced, splits_to_hold_out
from training.evaluation.samples import Model
from training.run.inputs import load_prepared_split
from training.run.record import data_set

SMALLEST_BASELINE = 6  # density and coverage need five nearest neighbours of every image


@dataclass(frozen=True)
class RealImages:
    """The real images that samples are compared with, and those of the real-data baseline.

    The real-data baseline is the same measure with real images instead of samples: what a perfect model would get, up
    to a standard error. It is compared with those images of the reference set that are not in it.

    Args:
        split: the data.
        reference: (N, C, H, W), the reference set, training images.
        reference_description: what the reference set is, for the report.
        baseline: (M, C, H, W), real images that are measured as if they were samples; M may be 0.
        baseline_description: what these are, for the report.
        not_in_baseline: (N,) bool, the reference images that the baseline is compared with.
        classes: of the images, with the numbers of the model; None: it has none.
        reference_labels, baseline_labels: (N,) and (M,) int64; None without classes.
        warning: why the baseline is missing or less comparable; None if it is neither.
    """

    split: DataSplit
    reference: np.ndarray
    reference_description: str
    baseline: np.ndarray
    baseline_description: str
    not_in_baseline: np.ndarray
    classes: Classes | None
    reference_labels: np.ndarray | None
    baseline_labels: np.ndarray | None
    warning: str | None

    @property
    def held_out(self) -> np.ndarray:
        return self.split.held_out

    @property
    def reference_sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.reference).data).hexdigest()


class DataConfig(Protocol):
    """The data of an evaluation or a calibration."""

    @property
    def dataset_name(self) -> str | None: ...
    @property
    def train_data_dir(self) -> str | None: ...
    @property
    def cache_dir(self) -> str: ...


def load_split(config: DataConfig, model: Model) -> DataSplit:
    """The data that the model was trained on, or that of the config, prepared as for training.

    The held-out set is the test split if there is one, because training may have been tuned on the others; otherwise
    it is what was held out during training.

    Raises:
        ValueError: it is not known what the model was trained on, or the images do not fit the model.
    """
    settings: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)}
    if model.record:  # before there were split_folders, every folder was trained on
        settings |= {"split_folders": False} | model.record.config
    if config.dataset_name or config.train_data_dir:
        settings |= {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
        settings |= {"split": "train", "image_column": None, "label_column": None}
        settings |= {"include": None, "exclude": None, "split_folders": True}
        settings["streaming"] &= is_sharded(config.dataset_name or config.train_data_dir or "")
        if config.dataset_name in (None, "moons"):  # a folder and the moons have no configurations and no such splits
            settings["dataset_config_name"] = None
            if settings["validation_split"] != "none":
                settings["validation_split"] = None
    elif not (settings["dataset_name"] or settings["train_data_dir"]):
        raise ValueError("it is not known what this model was trained on: give --dataset_name or --train_data_dir")
    size = model.pipe.unet.config.sample_size
    options: dict[str, Any] = {
        "resolution": size if isinstance(size, int) else tuple(size),
        "cache_dir": Path(config.cache_dir).expanduser(),
        "log": print,
    }
    split = load_prepared_split(settings, **options)
    if "test" in splits_to_hold_out(split.data.splits, settings["split"]):
        used = {"validation_split": "test", "validation_steps": None}
        split = load_prepared_split(settings | used, **options)
    split = split.in_memory()
    channels = model.pipe.unet.config.in_channels
    if split.data.channels != channels:
        raise ValueError(
            f"the images have {split.data.channels} channels, the model has {channels}: give the data it was trained on"
        )
    return split


def was_trained_on(model: Model, split: DataSplit) -> bool:
    """Whether the model was trained on these images, as far as its run record tells."""
    record = model.record
    if record is None or record.num_images != split.num_train_images:
        return False
    return data_set(record.source) == data_set(split.data.source)


def choose_real_images(
    split: DataSplit,
    num_reference: int,
    num_samples: int,
    kind: str = "training images",
    classes: Classes | None = None,
) -> RealImages:
    """A reference set of num_reference training images (0: all), and a baseline of num_samples real images.

    The baseline has held-out images if there are enough; else training images outside the reference set if there are
    enough; else some of all training images, at most half.

    Args:
        kind: what the report calls the training images.
        classes: of the images, with the numbers of the model.
    """
    train, held_out = split.train_indices, split.held_out
    labels = None
    reference = train if not num_reference else train[evenly_spaced(len(train), num_reference)]
    if len(held_out) >= num_samples:
        chosen = evenly_spaced(len(held_out), num_samples)
        baseline, description, not_in_baseline = held_out[chosen], "held-out images", np.ones(len(reference), bool)
        labels = None if classes is None else classes.held_out[chosen]
    else:
        unused = np.setdiff1d(train, reference)
        candidates = unused if len(unused) >= num_samples else train
        chosen = candidates[evenly_spaced(len(candidates), min(num_samples, len(train) // 2))]
        baseline, description, not_in_baseline = split.data.images[chosen], kind, ~np.isin(reference, chosen)
        labels = None if classes is None else classes.data[chosen]
    warning = None
    if min(len(baseline), int(not_in_baseline.sum())) < SMALLEST_BASELINE:
        baseline, labels = baseline[:0], None if labels is None else labels[:0]
        warning = f"there is no real-data baseline: {len(train)} images are too few to set {SMALLEST_BASELINE} aside"
    elif len(baseline) < num_samples:
        warning = (
            f"the real-data baseline has only {len(baseline)} images; distances depend on the number of images, so it "
            f"is not quite comparable with {num_samples} samples"
        )
    count = f"{len(reference)}" if len(reference) < len(train) else f"all {len(train)}"
    return RealImages(
        split=split,
        reference=np.asarray(split.data.images[reference]),
        reference_description=f"{count} {kind}",
        baseline=np.asarray(baseline),
        baseline_description=description,
        not_in_baseline=not_in_baseline,
        classes=classes,
        reference_labels=None if classes is None else classes.data[reference],
        baseline_labels=labels,
        warning=warning,
    )
