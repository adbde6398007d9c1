"""EMA CHOICE: averages of several lengths, measured after training, and the best one as the model of a run."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ddpm_pipeline import DDPMPipeline, visualize
from ddpm_pipeline.calibrated import hash_weights, with_tables
from ddpm_pipeline.files import replacing
from ddpm_pipeline.pixels import from_pixels
from training.evaluation.config import ChoiceConfig
from training.evaluation.evaluator import Evaluator
from training.evaluation.measures import Measurement
from training.evaluation.reference import RealImages
from training.evaluation.samples import Model, SamplerConfig
from training.post_hoc_ema import Profile, coefficients_of, reconstruct
from training.progress import is_terminal
from training.run import checkpoint
from training.run.ema_snapshots import FOLDER, list_snapshots
from training.run.record import RunRecord
from training.run.runtime import Runtime
from training.run.sampling import (
    LAST,
    PIPELINE,
    SAMPLES,
    TRAJECTORY,
    images_at_once,
    keep_tables,
    recover_pipeline,
    sample_grid,
    save_pipeline,
)


class Choice:
    """One choice: the model of the run as it is, and what was measured of it and of each length.

    Raises:
        ValueError: there is no such run, or it has no snapshots of the step of its model; or it is being written to.
    """

    def __init__(self, config: ChoiceConfig) -> None:
        self.config, self.run = config, Path(config.run)
        self.runtime = Runtime(config.mixed_precision, config.cpu_threads)
        if not self.run.is_dir():
            raise ValueError(f"run is {config.run!r}: there is no such folder; give that of a run of train.py")
        self._lock = None
        with self.runtime.together():
            if self.runtime.is_main:
                self._lock = checkpoint.lock(self.run)  # while it trains, its model is not known
                recover_pipeline(self.run)
        if not (self.run / PIPELINE).is_dir():
            raise ValueError(f"{self.run} has no {PIPELINE}/: finish the run, --resume_from_checkpoint latest")
        self.evaluator = Evaluator(config.evaluation(), self.runtime)
        self.model: Model = self.evaluator.models[0]
        self.snapshots = self._find_snapshots()
        self.measured: dict[float | None, Measurement | None] = {}  # by length; None: the model as it is

    def _find_snapshots(self) -> dict[Profile, Callable[[], dict[str, Tensor]]]:
        """Those of the run, checked before anything is drawn: they are of this model, and enough for each length.

        Snapshots of another step than the last one are of another run, or this one is not finished.
        """
        record = self.model.record
        if record is None or not record.config.get("post_hoc_ema"):
            raise ValueError(
                f"{self.run / PIPELINE} was not trained with --post_hoc_ema from its first step to its last"
            )
        parameters = self.model.pipe.unet.named_parameters()
        snapshots = list_snapshots(self.run, {name: tuple(each.shape) for name, each in parameters})
        if (newest := max(profile.step for profile in snapshots)) != record.step:
            raise ValueError(
                f"{self.run / FOLDER} has snapshots up to step {newest:,}, {self.run / PIPELINE} is of step "
                f"{record.step:,}: finish the run, --resume_from_checkpoint latest"
            )
        for length in self.config.ema:
            coefficients_of(list(snapshots), length)
        return snapshots

    # ---- Measuring ---------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure the model as it is and each length, on all ranks, and print a table."""
        self.real: RealImages = self.evaluator.load_images()
        extractors = self.evaluator.make_extractors(self.real)
        sampler = SamplerConfig(self.config.num_inference_steps, 1.0)
        for length in (None, *self.config.ema):
            model = self.model if length is None else self._average(length)
            found = self.evaluator.measure_sampler(model, sampler, self.real, extractors, primary=False)
            self.measured[length] = next((m for m in found if m.measure == "frechet_distance"), None)
        self.measured = self.runtime.broadcast(self.measured)
        warnings = dict.fromkeys(self.runtime.broadcast(self.evaluator.warnings))
        if not any(self.measured.values()):
            raise ValueError(f"no distance could be measured: {'; '.join(warnings)}")
        for warning in warnings:
            self.runtime.print(f"WARNING: {warning}.")
        self.runtime.print("\n".join(["", *self.table(), ""]))

    def _average(self, length: float) -> Model:
        unet = copy.deepcopy(self.model.pipe.unet)
        unet.load_state_dict({**unet.state_dict(), **reconstruct(self.snapshots, length)})
        pipe = DDPMPipeline(unet, self.model.pipe.scheduler)
        return self.model._replace(pipe=pipe, weights=f"EMA-{length:g}", sha256=hash_weights(unet, torch.float32))

    @property
    def best(self) -> float | None:
        """The length with the smallest distance; None: no length has a smaller one than the model as it is."""
        return min(self.measured, key=lambda length: value(self.measured[length]))

    def table(self) -> list[str]:
        """A line for each length."""
        first = next(each for each in self.measured.values() if each is not None)
        as_it_is = "as it is"
        if self.model.record is not None and self.model.record.ema_length is not None:
            as_it_is += f", {self.model.record.ema_length:g}"
        lines = [f"{'length':<16}{first.name} ({first.extractor}), {first.n} samples"]
        for length, each in self.measured.items():
            number = "not measured" if each is None else f"{each.value:.4g}"
            if each is not None and each.standard_error is not None:
                number += f" +- {each.standard_error:.2g}"
            mark = "  <- best" if length == self.best else ""
            lines.append(f"{as_it_is if length is None else format(length, 'g'):<16}{number}{mark}")
        if first.real_data_baseline is not None:
            lines.append(f"{'real images':<16}{first.real_data_baseline:.4g}")
        return lines

    # ---- Saving ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Make the best average the model, on rank 0."""
        if self.best is None:
            self.runtime.print(f"{self.run / PIPELINE} stays as it is")
            return
        with self.runtime.together():
            if self.runtime.is_main:
                self._write(self.best)

    def release(self) -> None:
        """Let others write into the folder of the run again."""
        if self._lock is not None:
            self._lock.release()

    def _write(self, length: float) -> None:
        folder, last = self.run / PIPELINE, self.run / LAST
        # With --keep_best, pipeline/ may be of an earlier step and without its guide.
        source = last if last.is_dir() else folder
        pipe: Any = DDPMPipeline.from_pretrained(source).to(self.runtime.device)
        record = RunRecord.load(source)
        assert record is not None
        record = dataclasses.replace(record, best=None, ema_length=length)
        pipe.unet.load_state_dict({**pipe.unet.state_dict(), **reconstruct(self.snapshots, length)})
        pipe.scheduler = with_tables(pipe.scheduler, None)
        images = self._images(pipe, record)
        keep_tables(pipe, folder)
        if not last.exists():
            with replacing(last) as temporary:
                shutil.copytree(folder, temporary)
        save_pipeline(pipe, folder, record, images)
        print(f"{folder} has the average of length {length:g} now; {last} has the EMA weights of training")
        if (report := self.run / "report.json").exists():
            print(f"{report} is about the former weights: run evaluate.py again")

    def _images(self, pipe: Any, record: RunRecord) -> dict[str, Image.Image]:
        """The sample images of a saved pipeline, as in training."""
        labels, steps = record.sample_labels, record.config["ddpm_num_inference_steps"]
        number = record.config["num_sample_images"] if labels is None else len(labels)
        x_0 = from_pixels(self.real.split.train_images[:1], self.runtime.device)
        label = None if self.real.classes is None else self.real.classes.train[:1].tolist()
        batch_size = images_at_once(*x_0.shape[2:])
        pipe.set_progress_bar_config(desc="sampling", leave=False, disable=not is_terminal())
        samples: list[Tensor] = []
        with self.runtime.autocast():
            for start in range(0, number, batch_size):
                batch = range(start, min(number, start + batch_size))
                samples += pipe(
                    seeds=[record.sample_seed + i for i in batch],
                    class_labels=None if labels is None else [labels[i] for i in batch],
                    num_inference_steps=steps,
                    output_type="latent",
                    return_dict=False,
                )
        options = {"num_inference_steps": steps, "seed": record.sample_seed, "class_labels": label}
        return {
            SAMPLES: sample_grid(torch.cat(samples), labels),
            TRAJECTORY: visualize.trajectory_grid(pipe, x_0, **options),
        }


def value(measurement: Measurement | None) -> float:
    """The smaller, the better."""
    return measurement.value if measurement is not None and math.isfinite(measurement.value) else math.inf
