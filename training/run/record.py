"""RECORD: how a model was trained. It is training.json beside the weights, and part of each checkpoint's manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "training.json"  # in the folder of a saved pipeline
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"  # there, too; it has the calibrated tables
BY = {"validation_loss": "held-out loss", "kernel_distance": "kernel distance"}  # measures of RunRecord.best
SAMPLE_SEED = 1_000_000  # sample image i has seed SAMPLE_SEED + i at every step, so that its progress can be followed


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a model was trained.

    Args:
        step: optimizer steps done.
        global_batch: images per optimizer step.
        batch_size: images per forward pass; None in older records.
        num_processes: world size.
        device: name of the processor or GPU.
        threads: CPU threads that rank 0 computes with at this step; None on another device and in older records.
        tuning: how the network computed on this machine, see training/tune.py; None in older records.
        network: all fields of the UNet2DModel; None in older records.
        mixed_precision: what the network computed in: no, fp16 or bf16.
        num_images: images trained on.
        source: where they come from, see `data_set`.
        data_digest: sha256 of the decoded pixels, held-out images included; None in older records.
        labels_digest: sha256 of the labels and their names; None without classes, as the next three.
        class_names: of classes 0, 1, ...
        class_counts: number of images trained on, of each class.
        sample_labels: the class of each image in samples.png.
        held_out: where the held-out images come from, or "nothing".
        versions: of Python and of the libraries.
        commit: of this project's code; None outside a git checkout.
        config: all fields of Config.
        seconds: training time, without sampling and validation.
        share: of its budget that the run has used, in [0, 1]; None in older records.
        budget: for a resumed run, see training/budget.py; None in older records.
        best: which EMA weights are kept: `measure`, and its `value` at `step`; None: those of the last step.
        ema_length: sigma_rel of the average that training/choose_ema.py has made of the weights, see
            training/post_hoc_ema.py; None: they are the EMA weights of training.
        guide_step: the step that the guide is of, whose EMA weights are in guide/; None: the model has none.
        sample_seed: sample image i in samples.png has seed sample_seed + i.
    """

    step: int = 0
    global_batch: int
    batch_size: int | None = None
    num_processes: int
    device: str
    threads: int | None = None
    tuning: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    mixed_precision: str
    num_images: int
    source: str
    data_digest: str | None = None
    labels_digest: str | None = None
    class_names: list[str] | None = None
    class_counts: list[int] | None = None
    sample_labels: list[int] | None = None
    held_out: str
    sample_seed: int = SAMPLE_SEED  # older records lack it
    versions: dict[str, str]
    commit: str | None
    config: dict[str, Any]
    seconds: float = 0.0
    share: float | None = None
    budget: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    ema_length: float | None = None
    guide_step: int | None = None

    @property
    def weights_step(self) -> int:
        """The step that the weights are of."""
        return self.step if self.best is None else int(self.best["step"])

    @property
    def used(self) -> float:
        """The share of its budget that the run has used, in [0, 1]; in steps for an older record."""
        return self.step / self.config["max_train_steps"] if self.share is None else self.share

    @property
    def followed_the_clock(self) -> bool:
        """Whether the number of steps and the learning rates came from the speed of the machine."""
        if self.budget is None:
            return self.used < 1
        return bool(self.budget["total"] != self.budget["steps"])

    @classmethod
    def load(cls, folder: Path) -> RunRecord | None:
        """The record in the folder of a saved pipeline; None if it has none. Keys of later versions are ignored.

        Raises:
            ValueError: the file is damaged or lacks a key.
        """
        path = folder / FILE
        if not path.exists():
            return None
        values = read_json(path)
        required = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{path} has no {missing[0]!r}: it is not the record of a run of train.py")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_best(best: Mapping[str, Any]) -> str:
    """RunRecord.best in words: "step 400, where the held-out loss was lowest, 0.0123"."""
    return f"step {best['step']:,}, where the {BY[best['measure']]} was lowest, {best['value']:.4g}"


def data_set(source: str) -> str:
    """The part of a source that identifies the data set. Notes on its preparation follow the first ";".

    Compare only this part: the wording of the notes changes between versions of this project. The number of files that
    are no images does not belong to the data either.
    """
    return re.sub(r" \(\d+ other files ignored\)", "", source.partition(";")[0])


def bits_caveat(prediction_type: str, variance_type: str) -> str | None:
    """Why bits per dimension say little about a model with these settings of the scheduler; None if they do."""
    if prediction_type != "sample" or variance_type.startswith("learned"):
        return None
    return (
        "bits per dimension say little about this model: it predicts x_0, and at the smallest timesteps the bound "
        "divides the error of that prediction by a fixed variance that is far smaller, whatever the samples look like"
    )


def precision_name(mixed_precision: str) -> str:
    """What the network computes in, as reports and cards call it: float32, fp16 or bf16."""
    return "float32" if mixed_precision == "no" else mixed_precision


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds anything else; the message names it.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not contain a JSON object")
    return content
