"""CALIBRATOR: the steps of a calibration: model, images, tables, comparison. See training/calibrate.py.

The mathematics is in ddpm_pipeline/calibration.py. Noises and images are split over the processes; what is fitted
depends on sums over all of them, so every process finds the same table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.arguments import guidance_of, make_generators
from ddpm_pipeline.calibrated import (
    Guidance,
    Table,
    hash_weights,
)
from ddpm_pipeline.calibration import (
    ALL_FREE,
    DAMPING,
    KEPT_SOLVERS,
    MakeParameters,
    NetworkErrors,
    Run,
    Sampler,
    TeacherObjective,
    Trial,
    all_numbers,
    best_solver,
    best_times,
    fit_steps,
    improve,
    network_errors,
    smooth_changes,
    smooth_changes_and_noise,
)
from ddpm_pipeline.classifier import train_classifier
from ddpm_pipeline.denoiser import UNetDenoiser, prepare_denoiser
from ddpm_pipeline.features import Extractor, make_extractor
from ddpm_pipeline.labels import null_class
from ddpm_pipeline.pixels import from_pixels
from ddpm_pipeline.solver_tables import dpm_solver_table, leading_times, solver_tables, trailing_times
from training.calibration.compare import load_records
from training.calibration.config import MAX_IMAGES, CalibrationConfig
from training.calibration.moments import Moments
from training.calibration.results import COMPARISON, FITS, FOLDER, Fits, kept_tables
from training.data.classes import Classes, find_classes
from training.data.split import DataSplit, evenly_spaced
from training.evaluation.reference import load_split
from training.evaluation.samples import hash_scheduler, load_models
from training.progress import progress, quiet_libraries
from training.run.record import SCHEDULER_CONFIG
from training.run.runtime import Runtime

VERSION = 6  # of what is fitted; another one does not continue
TEACHER_IMAGES = 96
MAX_VALUES = 2**19  # numbers in the teacher's images, which are kept at each of its 100 steps
TEACHER_ITERATIONS = 6
MOMENT_ITERATIONS = 2  # more of them only fit the features
NOISE_ITERATIONS = 1
CLEARLY_LESS = 0.9  # with one 4% smaller, the Frechet distance on MNIST became 2.8 instead of 2.3
MAX_KEPT_VALUES = 2**31  # numbers in the states and predictions of all steps, which are kept of six runs: 8 GB
LEAST_IMAGES = 16
DIFFERENCE_IMAGES = 32  # at least so many noises to differentiate with; else a quarter of the others
ERROR_IMAGES = 256  # that the errors of the network are measured on
MAX_TRAINING_IMAGES = 10_000  # whose moments are fitted to


class Calibrator:
    """One calibration: its config, runtime and model.

    Raises:
        ValueError: there is no such model, or the config does not fit it.
    """

    def __init__(self, config: CalibrationConfig) -> None:
        self.config = config
        self.split: DataSplit | None = None
        self.classes: Classes | None = None
        self.extractor: Extractor | None = None  # of the comparison
        self.moments: Moments | None = None
        self.tables: dict[int, Table] = {}
        self.runtime = Runtime("no", config.cpu_threads)
        quiet_libraries()
        # rank 0 downloads for all
        self.model = self.runtime.in_turn(lambda: load_models(config.model, ["ema"], config.revision))[0]
        self.pipe = self.model.pipe.to(self.runtime.device)
        if not isinstance(self.pipe.scheduler, DDPMScheduler):
            kind = type(self.pipe.scheduler).__name__
            raise ValueError(f"the scheduler of {config.model} is a {kind}: only a DDPMScheduler can be calibrated")
        network = self.pipe.unet.config
        if network.sample_size is None:
            raise ValueError(f"the network of {config.model} has no sample_size: put the size of its images there")
        if network.class_embed_type == "timestep":
            raise ValueError(f"the network of {config.model} has class_embed_type='timestep', not classes")
        longest = self.pipe.scheduler.num_steps
        if max(config.num_inference_steps) >= longest:
            raise ValueError(
                f"num_inference_steps has {max(config.num_inference_steps)}, but the process of {config.model} has "
                f"{longest} timesteps: give less"
            )
        self.guidance = Guidance(config.guidance_scale, config.autoguidance_scale, config.guidance_interval)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of guidance without effect, which is an error here
            if (effective := guidance_of(self.denoiser(np.arange(1)))) != self.guidance:
                raise ValueError(f"{self.guidance} would be {effective} for {config.model}: it has no classes to guide")
        self.folder = self._output_folder()
        self.runtime.in_turn(self._check_kept)

    def _check_kept(self) -> None:
        """What an earlier calibration has left: if it is damaged, that is said now, not after the fit."""
        load_records(self.results / COMPARISON)
        kept_tables(self.folder, self.pipe)

    def _output_folder(self) -> Path:
        """The folder of the pipeline that gets the tables."""
        name = Path(self.config.output_dir or self.config.model).resolve()
        if self.config.output_dir:
            folder = name / "pipeline"
            if folder.is_dir():
                self._check_same_model(DDPMPipeline.from_pretrained(folder), folder)
            return folder
        if not name.is_dir():
            raise ValueError(
                f"{self.config.model} is not a local folder: give --output_dir for the calibrated pipeline"
            )
        folder = name / "pipeline" if (name / "pipeline").is_dir() else name
        if not (folder / SCHEDULER_CONFIG).exists():
            raise ValueError(f"{folder} has no {SCHEDULER_CONFIG}: give --output_dir for the calibrated pipeline")
        return folder

    def _check_same_model(self, there: Any, folder: Path) -> None:
        """ValueError unless the pipeline of the output folder has these networks and this scheduler."""
        if hash_scheduler(there.scheduler) != self.model.scheduler_hash:
            other = "scheduler"
        elif weights_of(there) != weights_of(self.pipe):
            other = "model"
        else:
            return
        raise ValueError(f"{folder} has another {other} than {self.config.model}: give another --output_dir")

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
        names = self.pipe.class_names
        self.classes = None if names is None else find_classes(self.split).numbered_as(names)
        images = self.split.train_images[::2]  # the others are compared with
        if (number := len(self.split.train_images)) < LEAST_IMAGES:
            raise ValueError(f"there are {number} training images: give at least {LEAST_IMAGES}, or --use_images false")
        if all((images[i] == images[0]).all() for i in range(len(images))):
            raise ValueError("all training images are equal: nothing can be fitted to them; give --use_images false")
        chosen = evenly_spaced(len(images), MAX_TRAINING_IMAGES)
        self.runtime.print(f"features of {number:,} training images, and classifiers of them, unless they are cached")
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "device": self.runtime.device}

        others = self.others(self.split)

        def train() -> tuple[Moments, Extractor | None]:
            given = config.fit_extractor
            extractors = [] if given is None else [make_extractor(given, device=self.runtime.device)]
            compared = None
            if config.compare:
                labels = others.train_labels()
                compared = make_extractor(config.extractor, images=others.train_images, labels=labels, **options)
            # of rotations, also if there are labels: a classifier of those is what one compares with
            classifier = train_classifier(images, None, **options)
            return Moments(images[chosen], [classifier], extractors, self._rows), compared

        self.moments, self.extractor = self.runtime.in_turn(train)

    @staticmethod
    def others(split: DataSplit) -> DataSplit:
        """Those training images that tables are not fitted to."""
        return dataclasses.replace(split, train_indices=split.train_indices[1::2])

    @property
    def cache_dir(self) -> Path:
        return Path(self.config.cache_dir).expanduser() / "features"

    # ---- Tables ------------------------------------------------------------------------------------------------------

    def fit(self, on_table: Callable[[], None]) -> None:
        """Fit the tables that are not in the folder of results yet.

        Args:
            on_table: called when there is a new one, and once if there are some already.
        """
        self.results.mkdir(parents=True, exist_ok=True)
        fits = Fits(self.results / FITS, self._key())
        found = self.runtime.broadcast(self.runtime.in_turn(lambda: fits.read(self.pipe.scheduler.num_steps)))
        self.tables = {number: each for number, each in found.items() if each.guidance == self.guidance}
        numbers = self.config.num_inference_steps
        missing = [number for number in numbers if number not in self.tables]
        if there_are := [number for number in numbers if number in self.tables]:
            self.runtime.print(f"{', '.join(map(str, there_are))} steps: fitted before")
            on_table()
        if not missing:
            return
        teacher = self._teach(0, TEACHER_IMAGES)
        if self.moments is None:
            held_out = self._teach(1, TEACHER_IMAGES // 2)
        for number in missing:
            started = time.monotonic()
            self.runtime.print(f"{number} steps: the fit begins")
            times = best_times(teacher.run, self.pipe.scheduler, number, self._total)
            if self.moments is None:
                table = self._fit_to_teacher(self._fit_steps(teacher, times), teacher, held_out)
            else:
                table = self._fit_to_images(teacher, times)
            rounded = [[round(value, 6) for value in row] for row in table.coefficients]
            noise = tuple(round(deviation, 6) for deviation in table.noise)
            self.tables[number] = table._replace(coefficients=rounded, noise=noise)
            if self.runtime.is_main:
                fits.write(self.tables)
            self.runtime.print(f"{number} steps: calibrated in {(time.monotonic() - started) / 60:.1f} min")
            on_table()

    def _fit_steps(self, teacher: Trial, times: list[int]) -> Table:
        return fit_steps(teacher.sampler, teacher.run, times, self._total)

    def _fit_to_teacher(self, table: Table, teacher: Trial, held_out: Trial) -> Table:
        make_parameters = all_numbers if len(table.timesteps) <= ALL_FREE else smooth_changes
        trials = teacher.of(table), held_out.of(table)
        return self._improve("", trials, make_parameters, TEACHER_ITERATIONS)[0].run.table

    def _fit_to_images(self, teacher: Trial, times: list[int]) -> Table:
        """From the teacher's steps; then from the best solver as it is, if that is clearly better than what was found.

        With many steps from the solver alone: it is right, and what is wrong is the network.
        """
        number, numel = len(times), int(np.prod(self._shape))
        num_images = max(LEAST_IMAGES, min(self.config.num_images, MAX_KEPT_VALUES // (6 * 2 * number * numel)))
        if num_images < self.config.num_images:
            self.runtime.print(f"{number} steps: fitted with {num_images} images, for which there is memory")
        any_table = dpm_solver_table(self.pipe.scheduler, times)._replace(guidance=self.guidance)
        differences = min(num_images, max(DIFFERENCE_IMAGES, num_images // 4))
        sets = (2, num_images), (3, num_images), (5, differences), (3, max(LEAST_IMAGES // 2, num_images // 8))
        blank, blank_held_out, blank_differences, few = (self.trial(which, share, any_table) for which, share in sets)

        def fit(title: str, start: Table, *kinds: tuple[str, MakeParameters, int]) -> Trial:
            trials = blank.of(start), blank_held_out.of(start)
            for kind, make_parameters, iterations in kinds:
                trials = self._improve(title + kind, trials, make_parameters, iterations, DAMPING, blank_differences)
            return trials[1]

        noise = (", noise", smooth_changes_and_noise, NOISE_ITERATIONS)
        both = (("", smooth_changes, MOMENT_ITERATIONS), noise)
        if number > ALL_FREE:
            solver = self._best_solver(few, blank_held_out)
            return fit("", solver.run.table, noise).run.table
        found = fit("", self._fit_steps(teacher, times), *both)
        solver = self._best_solver(few, blank_held_out)
        if solver.value() < CLEARLY_LESS * found.value():
            found = fit(", from a solver", solver.run.table, *both)
        return found.run.table

    def trial(self, which: int, number: int, table: Table) -> Trial:
        """What samples from this set of noises have in common with the training images; nothing is sampled yet."""
        assert self.moments is not None
        sampler, noise = self._sampler(which, number)
        return Trial(sampler, Run(table, [noise], []), self.moments)

    def _best_solver(self, few: Trial, trial: Trial) -> Trial:
        """With the number of steps of these trials, at their timesteps or at evenly spaced ones."""
        scheduler, timesteps = self.pipe.scheduler, trial.run.table.timesteps
        number = len(timesteps)
        spacings = [timesteps, trailing_times(scheduler, number), leading_times(scheduler, number)]
        of_few = len(solver_tables(scheduler, spacings)) * len(few.run.states[0])
        of_trial = (KEPT_SOLVERS + len(NetworkErrors._fields)) * len(trial.run.states[0])
        with self._progress(f"{number} steps, solvers", (of_few + of_trial) * number, few.sampler, trial.sampler):
            return best_solver(few, trial, spacings, self.errors)

    def errors(self, run: Run) -> NetworkErrors:
        """On held-out images, or on training images if none are held out."""
        assert self.split is not None
        images, classes = self.split.held_out, self.classes
        labels = None if classes is None else classes.held_out
        if not len(images):
            others = self.others(self.split)
            images, labels = others.train_images, None if classes is None else classes.data[others.train_indices]
        chosen = evenly_spaced(len(images), ERROR_IMAGES)
        own = chosen[self._share(len(chosen)) % len(chosen)]
        sampler, _ = self._sampler(4, len(chosen), None if labels is None else labels[own].tolist())
        return network_errors(run, sampler, from_pixels(images[own], self.runtime.device), self._total)

    def _improve(
        self,
        title: str,
        trials: tuple[Trial, Trial],
        make_parameters: MakeParameters,
        max_iterations: int,
        least_damping: float = 0.0,
        differences: Trial | None = None,
    ) -> tuple[Trial, Trial]:
        """With a progress bar: at most this many iterations."""
        table, few = trials[0].run.table, differences or trials[0]
        number, runs = len(table.timesteps), len(make_parameters(table, self.pipe.scheduler).differences) + 1
        noises = runs * len(few.run.states[0]) + sum(len(each.run.states[0]) for each in trials)
        samplers = [each.sampler for each in (few, *trials)]
        with self._progress(f"{number} steps{title}", max_iterations * number * noises, *samplers):
            return improve(*trials, make_parameters, max_iterations, least_damping, differences)

    def _teach(self, which: int, number: int) -> Trial:
        """The teacher's samples from this set of noises."""
        table = dpm_solver_table(self.pipe.scheduler, trailing_times(self.pipe.scheduler))
        sampler, noise = self._sampler(which, max(4, min(number, MAX_VALUES // int(np.prod(self._shape)))))
        steps = len(table.timesteps)
        with self._progress(f"teacher, {steps} steps", len(noise) * steps, sampler):
            run = sampler.run(table._replace(guidance=self.guidance), noise)
        return Trial(sampler, run, TeacherObjective(run.images, self._total))

    def _key(self) -> str:
        """A hash of all that the tables depend on."""
        scheduler = {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")}
        images = None if self.moments is None or self.split is None else self.split.data.digest
        is_guided = self.guidance.autoguidance_scale != 1
        guide = hash_weights(self.pipe.guide, torch.float32) if is_guided else None
        labels = None if (found := self.labels(np.arange(1000))) is None else np.bincount(found).tolist()
        parts = [
            VERSION, self.model.sha256, guide, scheduler, self.guidance, images, labels,
            self._as_many_on_each(self.config.num_images), self.config.seed, self.moments and self.moments.extractors,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # ---- Noises ------------------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, ...]:
        config = self.pipe.unet.config
        size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
        return config.in_channels, *size

    def _as_many_on_each(self, number: int) -> int:
        """At least so many, and as many on each process."""
        world_size = self.runtime.world_size
        return -(-number // world_size) * world_size

    def _share(self, number: int) -> np.ndarray:
        """Which ones of about so many are those of this process: as many on each."""
        return np.arange(self.runtime.rank, self._as_many_on_each(number), self.runtime.world_size)

    def _sampler(self, which: int, number: int, labels: list[int] | None = None) -> tuple[Sampler, Tensor]:
        """This process's share of a set of noises: a sampler for them, and x_T, (B, C, H, W).

        Args:
            labels: of the images; default: spread evenly over the classes.
        """
        index = which * MAX_IMAGES + self._share(number)
        generators = make_generators([self.config.seed + int(i) for i in index])

        def draw() -> Tensor:
            return randn_tensor((len(index), *self._shape), generators, device=self.runtime.device)

        noise = draw()
        denoiser = BatchedDenoiser(self.denoiser(index, labels), self.config.batch_size)
        return Sampler(denoiser, self.pipe.scheduler, draw), noise

    def denoiser(self, index: np.ndarray, labels: list[int] | None = None) -> UNetDenoiser:
        """The network for these noises, with guidance; by default labels are spread evenly over the classes.

        Raises:
            ValueError: the network cannot be guided so.
        """
        guidance, labels = self.guidance, self.labels(index) if labels is None else labels
        return prepare_denoiser(
            self.pipe.unet, self.pipe.scheduler, self.runtime.device, len(index), labels, guidance.guidance_scale,
            guidance.guidance_interval, guidance.autoguidance_scale, self.pipe.guide,
        )  # fmt: skip

    def labels(self, index: np.ndarray) -> list[int] | None:
        """Labels of these noises, each class as often as in the data; None for a network without classes."""
        if (number := self.pipe.unet.config.num_class_embeds) is None:
            return None
        if self.classes is not None:
            return self.classes.of_samples(index)
        number -= null_class(self.pipe.unet) is not None
        return [int(i) % number for i in index]

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


def weights_of(pipe: Any) -> list[str | None]:
    """A hash of the weights of its network, and one of those of its guide."""
    networks = pipe.unet, pipe.guide
    return [None if network is None else hash_weights(network, torch.float32) for network in networks]
