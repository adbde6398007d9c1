"""RESULTS: what a calibration leaves: the tables of finished fits, those of the pipeline, and the comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_pipeline.calibrated import (
    CALIBRATION,
    Guidance,
    Table,
    fitted_tables,
    save_tables,
    table_from_json,
    table_to_json,
    with_tables,
)
from ddpm_pipeline.files import replacing
from ddpm_pipeline.saving import pipeline_source
from ddpm_pipeline.solver_tables import TEACHER_STEPS
from training.calibration.compare import (
    FeatureDistances,
    Measure,
    Samples,
    TeacherDistance,
    best_settings,
    compare,
    draw,
    plot,
    summary,
    table,
)
from training.calibration.settings import CALIBRATED, SETTINGS, Setting, make_plan, num_calls
from training.evaluation.reference import choose_real_images
from training.run.record import SCHEDULER_CONFIG, read_json

if TYPE_CHECKING:
    from training.calibration.calibrator import Calibrator

FOLDER, FITS, COMPARISON = "calibration", "tables.json", "comparison.json"
MAX_REFERENCE_IMAGES = 10_000  # that samples are compared with
SCREENED, COMPARED = 2**24, 2**25  # added to the seeds for the comparison: noises that were not fitted to
# Samples of each setting, and how many settings go on: in the end, to as many samples as ours. What 32 samples say is
# rough: on MNIST the best of all with 1,024 was 16th. But that is far from the 41st.
SCREENINGS = ((32, 40), (96, 12), (256, 5))
MANY_CALLS = 10  # with as many or more, those that go on after the first screening are tried with the next number
CLIPPED = {"thresholding": True, "sample_max_value": 1.0}  # as clip_sample, which DPM-Solver++ of diffusers has not

# ---- Tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fits:
    """The file of the tables of finished fits, by what they depend on, so that no fit is done twice.

    Args:
        key: of the fits of this calibration.
    """

    path: Path
    key: str

    def read(self, num_train_timesteps: int) -> dict[int, Table]:
        """The tables of this key by their number of steps; those that are damaged do not count."""
        try:
            tables = [table_from_json(each, num_train_timesteps) for each in self._content()[self.key]]
        except (ValueError, KeyError, TypeError):
            return {}
        return {len(each.timesteps): each for each in tables}

    def write(self, tables: Mapping[int, Table]) -> None:
        content = self._content() | {self.key: [table_to_json(each) for each in tables.values()]}
        _write(self.path, json.dumps(content) + "\n")

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def kept_tables(folder: Path, pipe: Any) -> tuple[list[Table], str | None]:
    """The tables in the folder of a pipeline that are for these networks, and why others there are not.

    Raises:
        ValueError: they are damaged.
    """
    file = folder / SCHEDULER_CONFIG
    config = read_json(file) if file.exists() else pipe.scheduler.config
    try:
        return fitted_tables(with_tables(pipe.scheduler, config.get(CALIBRATION)), pipe.unet, pipe.guide)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def save(calibrator: Calibrator) -> None:
    """Put the tables into the configuration of the scheduler, beside those for other numbers of steps or guidance."""
    pipe, folder, runtime = calibrator.pipe, calibrator.folder, calibrator.runtime
    numbers = [number for number in calibrator.config.num_inference_steps if number in calibrator.tables]
    chosen = [calibrator.tables[number] for number in numbers]
    replaced = {(len(each.timesteps), each.guidance) for each in chosen}
    fitted, reason = kept_tables(folder, pipe)  # as they are now: another calibration may have ended during this one
    if reason is not None:
        runtime.print(f"older tables of {folder} are dropped: {reason}")
    kept = [each for each in fitted if (len(each.timesteps), each.guidance) not in replaced]
    save_tables(pipe.scheduler, pipe.unet, sorted([*kept, *chosen], key=lambda each: len(each.timesteps)), pipe.guide)
    runtime.barrier()  # no rank reads what rank 0 writes
    if not runtime.is_main:
        return
    if (folder / SCHEDULER_CONFIG).exists():
        _write(folder / "pipeline.py", pipeline_source())  # first: an older one has no tables
        config = json.loads(pipe.scheduler.to_json_string())
        _write(folder / SCHEDULER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            pipe.save_pretrained(temporary)
            if calibrator.model.record is not None:
                calibrator.model.record.save(temporary)
    runtime.print(f"{folder} samples with calibrated steps for num_inference_steps={', '.join(map(str, numbers))}")


# ---- Comparison ------------------------------------------------------------------------------------------------------


def compare_all(calibrator: Calibrator) -> None:
    """Compare the calibrated sampler with every scheduler of diffusers; see compare.py."""
    config, runtime = calibrator.config, calibrator.runtime
    guidance = guidance_arguments(calibrator.guidance)
    built_in = SETTINGS
    if calibrator.guidance.guidance_scale != 1:  # which they can have as well
        built_in = [dataclasses.replace(each, call={**each.call, **guidance}) for each in SETTINGS]
    own = dataclasses.replace(CALIBRATED, call={**CALIBRATED.call, **guidance})
    path = calibrator.results / COMPARISON

    def measured(first: int, number: int) -> tuple[Measure, Samples]:
        samples = samples_of(calibrator, first, number)
        return measure_of(calibrator, samples), samples

    screenings = [(measured(SCREENED, number), going_on) for number, going_on in SCREENINGS]
    final = measured(COMPARED, config.num_samples)

    records = []
    for number in sorted(config.num_inference_steps):
        fitted = calibrator.tables[number]
        calls = num_calls(fitted.network_timesteps, guidance)
        compared = partial(compare, calibrator.model, calls, fitted=fitted, path=path, runtime=runtime)
        rounds = [built_in]
        for screening, going_on in screenings:
            rounds.append(best_settings(rounds[-1], compared(rounds[-1], *screening), going_on))
        records += compared([*rounds[-1], own], *final)
        if calls >= MANY_CALLS:
            built_in = rounds[1]
    if runtime.is_main:
        lines = [f"# {config.model}: calibrated steps beside the schedulers of diffusers", ""]
        lines += [_about(calibrator), "", *table(records)]
        _write(path.with_suffix(".md"), "\n".join(lines) + "\n")
        if any(record.results for record in records):
            plot(records, path.with_suffix(".png"))
    for line in summary(records):
        runtime.print(line)
    plotted = "and its plot beside it" if summary(records) else "but no setting could be measured"
    runtime.print(f"the comparison: {path.with_suffix('.md')}, {plotted}")


def _about(calibrator: Calibrator) -> str:
    """What the tables below compare."""
    numbers, guidance = sorted(calibrator.config.num_inference_steps), guidance_arguments(calibrator.guidance)
    text = f"Calibrated: {', '.join(map(str, numbers))} steps"
    if guidance:
        arguments = ", ".join(f"{name}={value}" for name, value in guidance.items())
        theirs = "the others are not guided" if calibrator.guidance.guidance_scale == 1 else "and so are the others"
        text += f", guided with {arguments}; {theirs}. A guided step is two network calls"
    return f"{text}. Best built-in: of {len(SETTINGS)} settings of diffusers' schedulers, with at most as many calls."


def samples_of(calibrator: Calibrator, first: int, number: int) -> Samples:
    labels = calibrator.labels(first + np.arange(number))
    return Samples(number, calibrator.config.seed + first, calibrator.config.batch_size, labels)


def measure_of(calibrator: Calibrator, samples: Samples) -> Measure:
    """Distances to those training images that were not fitted to; without images, to the teacher's samples."""
    if calibrator.split is None or calibrator.extractor is None:
        scheduler = calibrator.pipe.scheduler
        steps = min(TEACHER_STEPS, scheduler.num_steps)
        options = {"timestep_spacing": "trailing", **(CLIPPED if scheduler.config.clip_sample else {})}
        plan = make_plan(Setting("teacher", "DPMSolverMultistepScheduler", options), scheduler, steps)
        call = {**plan.call, **guidance_arguments(calibrator.guidance)}
        images = draw(calibrator.pipe, plan.scheduler, call, samples, calibrator.runtime)
        return TeacherDistance(images, f"DPM-Solver++ 2M with {steps} steps")
    real = choose_real_images(calibrator.others(calibrator.split), MAX_REFERENCE_IMAGES, samples.number)
    return FeatureDistances(real, calibrator.extractor, calibrator.cache_dir)


def guidance_arguments(guidance: Guidance) -> dict[str, Any]:
    """Arguments of a call; empty without guidance."""
    default = Guidance()._asdict()
    return {name: value for name, value in guidance._asdict().items() if value != default[name]}


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
