"""SAMPLING: image grids of samples during training, and pipeline/ with the EMA weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline.files import remove, replacing
from training.progress import is_terminal
from training.run import checkpoint
from training.run.failures import is_out_of_memory
from training.run.record import SAMPLE_SEED, SCHEDULER_CONFIG, RunRecord

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from PIL import Image

    from ddpm_pipeline import DDPMPipeline, DDPMScheduler
    from training.config import Config
    from training.data.batches import Batches
    from training.ema import FlatEMA
    from training.run.inputs import Inputs
    from training.run.kept import GuideSnapshot
    from training.run.log import Log
    from training.run.runtime import Runtime
    from training.run.signals import StopSignal

PIPELINE = "pipeline"  # folder of the saved pipeline in the folder of the run
LAST = "pipeline-last"  # with the EMA weights of the last step, where pipeline/ has others: see best.py, choose_ema.py
SAMPLES, TRAJECTORY = "samples.png", "trajectory.png"  # in both


class EMASampler:
    """Samples with the EMA weights of a run, on all ranks."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        ema: FlatEMA,
        guide: GuideSnapshot,
        log: Log,
        stop: StopSignal,
        inputs: Inputs,
        batches: Batches,
    ) -> None:
        self.unet, self.scheduler = unet, scheduler
        self._config, self._runtime, self._ema, self._log, self._stop = config, runtime, ema, log, stop
        self._guide = guide
        self._classes = inputs.classes
        # The training image whose forward process is in trajectory.png, (1, C, H, W) in [-1, 1], and its label.
        first = torch.zeros(1, dtype=torch.int64)
        (self._x_0, _), self._x_0_label = batches.batch(0, first), None
        if self._classes is not None:
            i = np.searchsorted(inputs.split.train_indices, batches.indices(0, first))
            self._x_0_label = self._classes.train[i].tolist()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the network has the EMA weights and no dropout."""
        self.unet.eval()
        try:
            with self._ema.applied():
                yield
        finally:
            self.unet.train()

    def draw(self, step: int, num_images: int, class_labels: Sequence[int] | None = None) -> Tensor | None:
        """Samples (num_images, C, H, W) in [-1, 1]: image i has seed SAMPLE_SEED + i, whatever the world size.

        None, on all ranks, if a signal ends the run, or, with a warning, if any rank is out of memory.

        Args:
            class_labels: one for each image; None for a network without classes.
        """
        runtime = self._runtime
        # Rank r draws images r, r + world_size, ... All ranks draw equally many: those with fewer repeat image 0.
        per_rank = -(-num_images // runtime.world_size)
        indices = list(range(runtime.rank, num_images, runtime.world_size))
        indices += [0] * (per_rank - len(indices))
        images: list[Tensor] = []
        out_of_memory = False
        batch_size = images_at_once(*self._x_0.shape[2:])
        try:
            with self.ema_weights(), runtime.autocast():
                pipe = self._make_pipeline()
                title = f"sampling at step {step}"
                pipe.set_progress_bar_config(desc=title, leave=False, disable=not (runtime.is_main and is_terminal()))
                for start in range(0, per_rank, batch_size):
                    batch = indices[start : start + batch_size]
                    images += pipe(
                        seeds=[SAMPLE_SEED + i for i in batch],
                        class_labels=None if class_labels is None else [class_labels[i] for i in batch],
                        num_inference_steps=self._config.ddpm_num_inference_steps,
                        output_type="latent",
                        return_dict=False,
                        callback_on_step_end=self._interrupt,
                    )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        stopping, out_of_memory = runtime.any(self._stop.requested(), out_of_memory)
        if out_of_memory:
            runtime.print(
                f"WARNING: out of memory sampling {num_images} images at step {step}: skipped, training continues. "
                "Lower num_sample_images or validation_samples."
            )
        if stopping or out_of_memory:
            return None
        gathered = runtime.gather(torch.cat(images)).unflatten(0, (-1, per_rank))  # (world_size, per_rank, C, H, W)
        return gathered.transpose(0, 1).flatten(0, 1)[:num_images]

    def is_interrupted(self) -> bool:
        """Whether a signal ends the run, on any rank."""
        return self._runtime.any(self._stop.requested())[0]

    def save_grid(self, step: int) -> Tensor | None:
        """Draw samples and save their grid as samples/step-NNNNNN.png. Returns what `draw` returns."""
        number, labels = self._config.num_sample_images, None
        if self._classes is not None:
            labels = self._classes.of_grid(number)
            number = len(labels)
        samples = self.draw(step, number, labels)
        if samples is not None and self._runtime.is_main:
            self._log.sample_images(step, self._grid(samples))
        return samples

    def _grid(self, samples: Tensor) -> Image.Image:
        return sample_grid(samples, None if self._classes is None else self._classes.of_grid(len(samples)))

    def save_pipeline(self, record: RunRecord, name: str = PIPELINE) -> Tensor | None:
        """Write pipeline/: EMA weights, guide, run record, samples, a trajectory. Returns what `draw` returns."""
        samples = self.save_grid(record.weights_step)
        with self._runtime.together():
            if self._runtime.is_main:
                self._write_pipeline(record, samples, self._log.folder / name)
        return samples

    def _write_pipeline(self, record: RunRecord, samples: Tensor | None, folder: Path) -> None:
        from safetensors import SafetensorError

        from ddpm_pipeline import visualize

        images = {} if samples is None else {SAMPLES: self._grid(samples)}
        with self.ema_weights():
            pipe = self._make_pipeline()
            pipe.set_progress_bar_config(disable=True)
            try:
                images[TRAJECTORY] = visualize.trajectory_grid(
                    pipe,
                    self._x_0,
                    num_inference_steps=self._config.ddpm_num_inference_steps,
                    seed=SAMPLE_SEED,
                    class_labels=self._x_0_label,
                )
                self._log.save_image(images[TRAJECTORY], TRAJECTORY)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                print("WARNING: out of memory drawing trajectory.png: skipped. The model is saved.", file=sys.stderr)
            pipe.guide = self._guide.network(self.unet, record.weights_step)
            if pipe.guide is not None:
                record = replace(record, guide_step=self._guide.step)
            keep_tables(pipe, folder)
            try:
                save_pipeline(pipe, folder, record, images)
            except (OSError, SafetensorError) as error:
                networks = [each.state_dict() for each in (self.unet, pipe.guide) if each is not None]
                needed = checkpoint.estimate_bytes({}, {}, {}, *networks)
                advice = "checkpoints are untouched: make room, then --resume_from_checkpoint latest"
                raise checkpoint.disk_full(folder, error, needed, advice) from error

    def _interrupt(self, pipe: DDPMPipeline, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback after each sampling step: a signal ends sampling."""
        self._runtime.adapt_threads()
        pipe.interrupt = self._stop.requested()
        return {}

    def _make_pipeline(self) -> DDPMPipeline:
        from ddpm_pipeline import DDPMPipeline

        return DDPMPipeline(self.unet, self.scheduler)


def images_at_once(height: int, width: int) -> int:
    """Images per forward pass: 64, or fewer large ones, whose activations would take gigabytes."""
    return min(64, max(1, 64 * 64**2 // (height * width)))


def sample_grid(samples: Tensor, labels: Sequence[int] | None) -> Image.Image:
    """The image grid of samples, with a row for each class.

    Args:
        labels: in order, of each class equally many; None: there are no classes.
    """
    from ddpm_pipeline import visualize

    return visualize.grid(samples) if labels is None else visualize.grid(samples, columns=labels.count(labels[0]))


def keep_tables(pipe: DDPMPipeline, folder: Path) -> None:
    """Give a pipeline the calibrated steps of the one in a folder, which it will replace, if they are for its weights.

    They go into a copy of its scheduler, since training samples without them. If some are lost, a line says so.
    """
    from ddpm_pipeline.calibrated import CALIBRATION, fitted_tables, table_to_json, with_tables
    from ddpm_pipeline.loading import read_json

    file = folder / SCHEDULER_CONFIG
    again = "to have calibrated steps, run calibrate.py again"
    try:
        saved = read_json(file).get(CALIBRATION)
        if saved is None:
            return
        scheduler = with_tables(pipe.scheduler, saved)
        tables, reason = fitted_tables(scheduler, pipe.unet, pipe.guide)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        print(f"WARNING: {file} is replaced, and was damaged ({error}): {again}", file=sys.stderr)
        return
    if reason is not None:
        print(f"WARNING: {file} has tables for another model, which are removed ({reason}): {again}", file=sys.stderr)
    if tables:
        pipe.scheduler = with_tables(scheduler, {**saved, "tables": [table_to_json(table) for table in tables]})


def save_pipeline(pipe: DDPMPipeline, folder: Path, record: RunRecord, images: dict[str, Image.Image]) -> None:
    """Write a pipeline, its run record and images by file name. All of it replaces `folder` at once."""
    with replacing(folder) as temporary:
        pipe.save_pretrained(str(temporary))
        record.save(temporary)
        for name, image in images.items():
            try:
                image.save(temporary / name)
            except OSError as error:  # a missing image must not cost the model
                (temporary / name).unlink(missing_ok=True)
                print(f"WARNING: cannot write {folder / name}: {error.strerror or error}.", file=sys.stderr)


def recover_pipeline(output_dir: Path) -> None:
    """After a run was killed while replacing pipeline/ or pipeline-last/: restore it and delete temporary files. Lock
    first."""
    # without the dot: as version 0.1 named it, and now maybe a copy that the user has made
    for old, name in ((f".{PIPELINE}.old", PIPELINE), (f"{PIPELINE}.old", PIPELINE), (f".{LAST}.old", LAST)):
        if (output_dir / old).exists() and not (output_dir / name).exists():
            (output_dir / old).rename(output_dir / name)
    for path in output_dir.iterdir():
        if re.fullmatch(rf"\.({PIPELINE}|{LAST})\.(old|tmp-[\w-]+)|{PIPELINE}\.tmp", path.name):
            remove(path)
