"""CALIBRATOR: the steps of a calibration: model, images, tables, comparison. See training/calibrate.py.

The mathematics is in ddpm_pipeline/calibration.py. Noises and images are split over the processes; what is fitted
depends on sums over all of them, so every process finds the same table.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_pipeline import DDPMScheduler
from ddpm_pipeline.arguments import make_generators
from ddpm_pipeline.calibrated import (
    Guidance,
    Table,
    load_tables,
    save_tables,
    table_from_json,
    table_to_json,
    why_not,
)
from ddpm_pipeline.calibration import (
    ALL_FREE,
    Parameters,
    Run,
    Sampler,
    TeacherObjective,
    Trial,
    all_numbers,
    best_times,
    dpm_solver_table,
    fit_steps,
    improve,
    smooth_changes,
    teacher_times,
)
from ddpm_pipeline.classifier import train_classifier
from ddpm_pipeline.denoiser import UNetDenoiser, prepare_denoiser
from ddpm_pipeline.files import replacing
from ddpm_pipeline.labels import null_class
from ddpm_pipeline.saving import pipeline_source
from training.calibration.config import CalibrationConfig
from training.calibration.moments import Moments
from training.data.split import DataSplit, evenly_spaced
from training.evaluation.reference import load_split
from training.evaluation.samples import load_models
from training.progress import progress, quiet_libraries
from training.run.runtime import Runtime

FOLDER = "calibration"
VERSION = 1  # of what is fitted; another one does not continue
TEACHER_IMAGES, HELD_OUT_IMAGES = 144, 48
MAX_VALUES = 2**19  # numbers in the teacher's images, which are kept at each of its 100 steps
ITERATIONS = 6
MOMENT_ITERATIONS = 2  # more of them only fit the features
MAX_TRAINING_IMAGES = 10_000  # whose moments are fitted to


class Calibrator:
    """One calibration: its config, runtime and model.

    Raises:
        ValueError: there is no such model, or the config does not fit it.
    """

    def __init__(self, config: CalibrationConfig) -> None:
        self.config = config
        self.runtime = Runtime("no", config.cpu_threads)
        quiet_libraries()
        # rank 0 downloads for all
        self.model = self.runtime.in_turn(lambda: load_models(config.model, ["ema"], config.revision))[0]
        self.pipe = self.model.pipe.to(self.runtime.device)
        if not isinstance(self.pipe.scheduler, DDPMScheduler):
            kind = type(self.pipe.scheduler).__name__
            raise ValueError(f"the scheduler of {config.model} is a {kind}: only a DDPMScheduler can be calibrated")
        longest = self.pipe.scheduler.num_steps
        if max(config.num_inference_steps) >= longest:
            raise ValueError(
                f"num_inference_steps has {max(config.num_inference_steps)}, but the process of {config.model} has "
                f"{longest} timesteps: give less"
            )
        self.guidance = Guidance(config.guidance_scale, config.autoguidance_scale, config.guidance_interval)
        self.denoiser(np.arange(1))  # checks the guidance
        self.folder = self._output_folder()
        self.split: DataSplit | None = None
        self.moments: Moments | None = None
        self.tables: dict[int, Table] = {}

    def _output_folder(self) -> Path:
        """The folder of the pipeline that gets the tables."""
        name = Path(self.config.output_dir or self.config.model)
        if self.config.output_dir:
            return name / "pipeline"
        if not name.is_dir():
            raise ValueError(
                f"{self.config.model} is not a local folder: give --output_dir for the calibrated pipeline"
            )
        return name / "pipeline" if (name / "pipeline").is_dir() else name

    @property
    def results(self) -> Path:
        """The folder of tables and comparison."""
        is_run = self.folder.name == "pipeline"
        return (self.folder.parent if is_run else self.folder) / FOLDER

    # ---- Images ------------------------------------------------------------------------------------------------------

    def load_images(self) -> None:
        """Load the training images; without them, tables are fitted to the model's own samples."""
        record, config = self.model.record, self.config
        if not config.use_images:
            return
        if record is None and not (config.dataset_name or config.train_data_dir):
            self.runtime.print(
                "it is not known what this model was trained on: it is fitted to its own samples of 100 steps. With "
                "--dataset_name or --train_data_dir it is fitted to the images too, which is better"
            )
            return
        self.split = self.runtime.in_turn(lambda: load_split(config, self.model))  # rank 0 decodes for all
        images, labels = self.split.train_images[::2], self.split.train_labels()  # the others are compared with
        chosen = evenly_spaced(len(images), MAX_TRAINING_IMAGES)
        options: dict[str, Any] = {"cache_dir": self._cache_dir, "device": self.runtime.device}

        def train() -> Moments:
            kinds = [None] if labels is None else [labels[::2], None]
            classifiers = [train_classifier(images, kind, **options) for kind in kinds]
            return Moments(images[chosen], classifiers, self._rows)

        self.moments = self.runtime.in_turn(train)

    @property
    def _cache_dir(self) -> Path:
        return Path(self.config.cache_dir).expanduser() / "features"

    # ---- Tables ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Fit the tables that are not in the folder of results yet."""
        self.results.mkdir(parents=True, exist_ok=True)
        file = self.results / "tables.json"
        self.tables = self.runtime.broadcast(self._read(file))
        missing = [number for number in self.config.num_inference_steps if number not in self.tables]
        if not missing:
            return
        teacher, held_out = self._teach()
        for number in missing:
            started = time.monotonic()
            self.tables[number] = self._fit_table(teacher, held_out, number)
            if self.runtime.is_main:
                self._write_tables(file)
            self.runtime.print(f"{number} steps: calibrated in {(time.monotonic() - started) / 60:.1f} min")

    def _teach(self) -> tuple[Trial, Trial]:
        """The teacher's samples, and its samples from other noises; objectives are yet to be chosen."""
        scheduler = self.pipe.scheduler
        values = int(np.prod(self._shape))
        share = min(1.0, MAX_VALUES / values / (TEACHER_IMAGES + HELD_OUT_IMAGES))
        table = dpm_solver_table(scheduler, teacher_times(scheduler))._replace(guidance=self.guidance)
        trials, first = [], 0
        for number in (TEACHER_IMAGES, HELD_OUT_IMAGES):
            sampler, noise = self._sampler(first, max(4, round(number * share)))
            steps = len(table.timesteps)
            with self._progress(f"teacher, {steps} steps", len(noise) * steps, sampler):
                run = sampler.run(table, noise)
            trials.append(Trial(sampler, run, TeacherObjective(run.images, self._total)))
            first += number
        return trials[0], trials[1]

    def _fit_table(self, teacher: Trial, held_out: Trial, num_steps: int) -> Table:
        scheduler = self.pipe.scheduler
        times = best_times(teacher.run, scheduler, num_steps, self._total)
        table = fit_steps(teacher.sampler, teacher.run, times, self._total)
        if self.moments is None:
            make_parameters = all_numbers if num_steps <= ALL_FREE else smooth_changes
            trials, goal = [teacher, held_out], "to its own samples"
        else:
            make_parameters, goal = smooth_changes, "to the training images"
            first, trials = TEACHER_IMAGES + HELD_OUT_IMAGES, []
            for number in (self.config.num_images, self.config.num_images // 2):
                sampler, noise = self._sampler(first, number)
                trials.append(Trial(sampler, Run(table, [noise], []), self.moments))
                first += number
        table = self._improve(table, trials[0], trials[1], make_parameters, f"{num_steps} steps, {goal}")
        return table._replace(coefficients=[[round(number, 6) for number in row] for row in table.coefficients])

    def _improve(
        self,
        table: Table,
        trial: Trial,
        held_out: Trial,
        make_parameters: Callable[[Table, int], Parameters],
        title: str,
    ) -> Table:
        number = len(table.timesteps)
        runs = len(make_parameters(table, self.pipe.scheduler.num_steps).differences) + 2
        images = sum(len(each.run.states[0]) for each in (trial, held_out))
        max_iterations = ITERATIONS if self.moments is None else MOMENT_ITERATIONS
        total = max_iterations * runs * number * images  # at most
        with self._progress(title, total, trial.sampler, held_out.sampler):
            starts = [each._replace(run=each.sampler.run(table, each.run.states[0])) for each in (trial, held_out)]
            return improve(starts[0], starts[1], make_parameters, max_iterations)[0].run.table

    # ---- Noises ------------------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, ...]:
        config = self.pipe.unet.config
        size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
        return config.in_channels, *size

    def _sampler(self, first: int, number: int) -> tuple[Sampler, Tensor]:
        """This process's share of noises first, first + 1, ...: a sampler for them, and x_T, (B, C, H, W)."""
        world_size = self.runtime.world_size
        each = -(-number // world_size)  # the same number on all processes
        index = first + np.arange(self.runtime.rank, each * world_size, world_size)
        generators = make_generators([self.config.seed + int(i) for i in index])
        noise = randn_tensor((each, *self._shape), generators, device=self.runtime.device)
        return Sampler(BatchedDenoiser(self.denoiser(index), self.config.batch_size), self.pipe.scheduler), noise

    def denoiser(self, index: np.ndarray) -> UNetDenoiser:
        """The network for these noises, with guidance; labels are spread evenly over the classes.

        Raises:
            ValueError: the network cannot be guided so.
        """
        labels = None
        if (number := self.pipe.unet.config.num_class_embeds) is not None:
            if null_class(self.pipe.unet) is not None:
                number -= 1
            labels = [int(i) % number for i in index]
        guidance = self.guidance
        return prepare_denoiser(
            self.pipe.unet, self.pipe.scheduler, self.runtime.device, len(index), labels, guidance.guidance_scale,
            guidance.guidance_interval, guidance.autoguidance_scale, self.pipe.guide,
        )  # fmt: skip

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return torch.stack(self.runtime.gather_objects([tensor])).sum(dim=0)

    def _rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes."""
        return torch.cat(self.runtime.gather_objects([tensor]))

    @contextmanager
    def _progress(self, title: str, total: int, *samplers: Sampler) -> Iterator[None]:
        """A progress bar over the images that the network of these samplers is called with."""
        with progress(desc=title, total=total, unit=" images", disable=not self.runtime.is_main, leave=False) as bar:

            def on_batch(number: int) -> None:
                bar.update(number)
                self.runtime.adapt_threads()

            for sampler in samplers:
                assert isinstance(sampler.denoiser, BatchedDenoiser)
                sampler.denoiser.on_batch = on_batch
            yield

    # ---- Results -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Put the tables into the configuration of the scheduler, beside those for other numbers or guidance."""
        pipe = self.pipe
        chosen = [self.tables[number] for number in self.config.num_inference_steps]
        replaced = {(len(table.timesteps), table.guidance) for table in chosen}
        kept = [
            table
            for table in load_tables(pipe.scheduler)
            if (len(table.timesteps), table.guidance) not in replaced
            and why_not(pipe.scheduler, pipe.unet, pipe.guide, table) is None
        ]
        tables = sorted([*kept, *chosen], key=lambda table: len(table.timesteps))
        save_tables(pipe.scheduler, pipe.unet, tables, pipe.guide)
        if not self.runtime.is_main:
            return
        if not self.folder.is_dir():
            pipe.save_pretrained(self.folder)
        else:
            config = json.loads(pipe.scheduler.to_json_string())
            _write(self.folder / "pipeline.py", pipeline_source())  # first: an older one has no tables
            file = self.folder / "scheduler" / "scheduler_config.json"
            _write(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        numbers = ", ".join(map(str, self.config.num_inference_steps))
        self.runtime.print(f"{self.folder} samples with calibrated steps for num_inference_steps={numbers}")

    def _key(self) -> str:
        """A hash of all that the tables depend on."""
        scheduler = {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")}
        images = None if self.moments is None or self.split is None else self.split.data.digest
        parts = [
            VERSION, self.model.sha256, scheduler, self.guidance, images, self.config.num_images, self.config.seed,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _read(self, file: Path) -> dict[int, Table]:
        """The tables of a calibration with the same settings; those that cannot be read do not count."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["key"] != self._key():
                return {}
            tables = [table_from_json(table, self.pipe.scheduler.num_steps) for table in content["tables"]]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {len(table.timesteps): table for table in tables}

    def _write_tables(self, file: Path) -> None:
        content = {"key": self._key(), "tables": [table_to_json(table) for table in self.tables.values()]}
        _write(file, json.dumps(content) + "\n")


class BatchedDenoiser:
    """A `Denoiser` for more images than one forward pass takes; each keeps its label.

    Args:
        denoiser: with labels for all images.
    """

    def __init__(self, denoiser: UNetDenoiser, batch_size: int) -> None:
        self._denoiser, self._labels, self._batch_size = denoiser, denoiser.class_labels, batch_size
        self.on_batch: Callable[[int], None] = lambda number: None

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        outputs = []
        for start in range(0, len(x_t), self._batch_size):
            part = slice(start, start + self._batch_size)
            if self._labels is not None:
                self._denoiser.class_labels = self._labels[part]
            outputs.append(self._denoiser(x_t[part], t))
            self.on_batch(len(outputs[-1]))
        return torch.cat(outputs)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
