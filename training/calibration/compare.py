"""COMPARE: calibrated sampling beside the schedulers of diffusers, by the number of network calls for each image."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ddpm_pipeline.calibrated import Table, hash_weights
from ddpm_pipeline.features import Extractor
from ddpm_pipeline.fidelity import Estimate
from ddpm_pipeline.files import replacing
from ddpm_pipeline.pixels import to_pixels
from training.calibration.settings import DDIM, DDPM, Plan, Setting, make_plan
from training.evaluation.measures import Result, compare_features
from training.evaluation.reference import RealImages
from training.evaluation.report import make_figure, save_figure
from training.evaluation.samples import Model
from training.progress import is_terminal, progress
from training.run.runtime import Runtime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ---- Measures --------------------------------------------------------------------------------------------------------


class Measure(Protocol):
    """A function of samples, (N, C, H, W) in [-1, 1]; its name has everything else that the results depend on."""

    name: str

    def __call__(self, samples: Tensor, /) -> list[Result]: ...


class FeatureDistances:
    """Frechet and kernel distance to the reference set, in the features of an extractor."""

    def __init__(self, real: RealImages, extractor: Extractor, cache_dir: Path) -> None:
        self._real, self._extractor, self._cache_dir = real, extractor, cache_dir
        self.name = f"distances, {extractor.name} {extractor.key[:12]}, reference set {real.reference_sha256[:12]}"

    def __call__(self, samples: Tensor) -> list[Result]:
        pixels = to_pixels(samples, self._real.reference.dtype)
        return list(compare_features(pixels, self._real, self._extractor, ("frechet", "kernel"), self._cache_dir))


class TeacherDistance:
    """Root mean squared difference of the pixels from a teacher's images with the same noise: it needs no real images.

    The standard error is to first order: that of the mean square m, over 2 sqrt(m).

    Args:
        images: of the teacher, (N, C, H, W), with the seeds of the samples.
        teacher: its name.
    """

    def __init__(self, images: Tensor, teacher: str) -> None:
        self._images, self.name = images.clamp(-1, 1).double(), f"RMS distance to {teacher}"

    def __call__(self, samples: Tensor) -> list[Result]:
        squares = (samples.clamp(-1, 1) - self._images).square().flatten(1).mean(1)
        rms, error = squares.mean().sqrt().item(), squares.std().item() / math.sqrt(len(squares))
        return [Result("teacher_distance", self.name, Estimate(rms, error / (2 * rms) if rms else 0.0), len(squares))]


# ---- Records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What was measured of a setting with a number of network calls.

    Args:
        setting: its name.
        is_calibrated: whether it is calibrated sampling, not a scheduler of diffusers.
        calls: the number asked for.
        num_calls: of network calls for each image, at most as many; 0 if the setting was skipped.
        inputs: everything that the results depend on.
        results: none if there is a problem.
        problem: why the setting was skipped, or why its samples were not measured.
        seconds: for sampling and measuring.
    """

    setting: str
    is_calibrated: bool
    calls: int
    num_calls: int
    inputs: dict[str, Any]
    results: list[Result]
    problem: str | None
    seconds: float

    @property
    def key(self) -> str:
        return json.dumps(self.inputs, sort_keys=True)

    def result(self, measure: str) -> Result | None:
        return next((result for result in self.results if result.measure == measure), None)


def load_records(path: Path) -> list[Record]:
    """The records that `save_records` has written; none if there is no such file. ValueError: it is damaged."""
    if not path.exists():
        return []
    records = []
    try:
        for saved in json.loads(path.read_text(encoding="utf-8"))["records"]:
            results = [Result(**{**each, "estimate": Estimate(*each["estimate"])}) for each in saved["results"]]
            records.append(Record(**{**saved, "results": results}))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} has no records of a comparison ({error!r}): remove it, or give another file"
        ) from None
    return records


def save_records(path: Path, records: Iterable[Record]) -> None:
    lines = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records)
    with replacing(path) as temporary:
        temporary.write_text(f'{{"records": [\n{lines}\n]}}\n', encoding="utf-8")


# ---- Sampling and measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Which samples are drawn. Image i has the seed `seed` + i, so every setting starts from the same noise.

    Args:
        batch_size: images per forward pass; it changes the samples by rounding errors only.
        labels: of the images; None: the model has no classes.
    """

    number: int
    seed: int
    batch_size: int = 64
    labels: Sequence[int] | None = None


def compare(
    model: Model,
    calls: int,
    settings: Sequence[Setting],
    measure: Measure,
    samples: Samples,
    *,
    fitted: Table | None = None,
    path: Path,
    runtime: Runtime,
) -> list[Record]:
    """Measure each setting with this number of network calls: the same records on all ranks.

    Args:
        fitted: the table for the settings that sample at one.
        path: the file of all records, replaced after each. A setting that it has samples of is not drawn again.
    Raises:
        ValueError: this file is damaged.
    """
    known = {record.key: record for record in runtime.in_turn(lambda: load_records(path))}
    records = []
    with warnings.catch_warnings():
        for known_problem in ("timestep_spacing=.leading", "some pixels are non-finite"):
            warnings.filterwarnings("ignore", known_problem)
        for setting in progress(settings, f"{calls} calls, {samples.number} samples", disable=not runtime.is_main):
            plan, record = _prepare(model, calls, setting, fitted, measure, samples, runtime)
            if plan is not None:
                found = known.get(record.key, record)
                is_known = found.num_calls > 0  # what was skipped is tried again
                record = found if is_known else _measured(model, plan, record, measure, samples, runtime)
            records.append(record)
            if known.get(record.key) != record:
                known[record.key] = record
                if runtime.is_main:
                    save_records(path, known.values())
    return records


def _prepare(
    model: Model,
    calls: int,
    setting: Setting,
    fitted: Table | None,
    measure: Measure,
    samples: Samples,
    runtime: Runtime,
) -> tuple[Plan | None, Record]:
    """How a setting samples, and a record without results; without a plan it says why it was skipped."""
    is_guided = setting.guidance.get("autoguidance_scale", 1) != 1
    inputs = {
        "guide": hash_weights(model.pipe.guide, torch.float32) if is_guided else None,
        "calls": calls, "setting": dataclasses.asdict(setting), "table": None, "measure": measure.name,
        "weights": model.sha256, "scheduler": model.scheduler_hash, "precision": runtime.mixed_precision,
        "num_samples": samples.number, "seed": samples.seed, "labels": samples.labels and list(samples.labels),
    }  # fmt: skip
    record = Record(setting.name, setting.is_calibrated, calls, 0, inputs, [], None, 0.0)
    try:
        plan = make_plan(setting, model.pipe.scheduler, calls, fitted)
    except Exception as error:  # some options of diffusers end in an IndexError with some noise schedules
        return None, dataclasses.replace(record, problem=_one_line(error))
    inputs["table"] = plan.table and plan.table._asdict()
    return plan, record


def _measured(model: Model, plan: Plan, record: Record, measure: Measure, samples: Samples, runtime: Runtime) -> Record:
    started = time.monotonic()
    try:
        images = draw(model.pipe, plan.scheduler, plan.call, samples, runtime)
    except Exception as error:  # this scheduler cannot sample from this model
        if record.is_calibrated:
            raise
        return dataclasses.replace(record, problem=_one_line(error))
    results, problem = _measure(measure, images, runtime)
    seconds = runtime.broadcast(round(time.monotonic() - started, 1))
    return dataclasses.replace(record, num_calls=plan.num_calls, results=results, problem=problem, seconds=seconds)


@torch.no_grad()
def draw(pipe: Any, scheduler: Any, call: Mapping[str, Any], samples: Samples, runtime: Runtime) -> Tensor:
    """The samples, (N, C, H, W) on the CPU. The ranks divide the batches, and all of them get all samples.

    Args:
        scheduler: in place of that of the pipeline, which keeps its own.
        call: further arguments of a call of the pipeline.
    Raises:
        ValueError: the scheduler cannot sample from this model; on all ranks.
    """
    pipe = copy.copy(pipe.to(runtime.device))
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(leave=False, position=1, disable=not (runtime.is_main and is_terminal()))
    starts = range(0, samples.number, samples.batch_size)
    batches = [range(start, min(start + samples.batch_size, samples.number)) for start in starts]
    parts = []
    with runtime.together(), runtime.autocast():
        for batch in batches[runtime.rank :: runtime.world_size]:
            labels = {} if samples.labels is None else {"class_labels": [samples.labels[i] for i in batch]}
            (images,) = pipe(
                seeds=[samples.seed + i for i in batch],
                **labels,
                **call,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=lambda *_: runtime.adapt_threads(),
            )
            parts.append((batch.start, images.cpu()))
    in_order = sorted(runtime.gather_objects(parts), key=lambda part: part[0])
    return torch.cat([images for _, images in in_order])


def _measure(measure: Measure, images: Tensor, runtime: Runtime) -> tuple[list[Result], str | None]:
    """What rank 0 measures, or why it does not."""
    if non_finite := int((~images.flatten(1).isfinite().all(1)).sum()):
        return [], f"{non_finite} of {len(images)} samples are non-finite"
    results: list[Result] = []
    try:
        with runtime.together():
            results = measure(images) if runtime.is_main else []
    except ValueError as error:  # all samples are equal
        return [], _one_line(error)
    return runtime.broadcast(results), None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__} {text}".strip()


# ---- Table and plot --------------------------------------------------------------------------------------------------


def best_settings(settings: Sequence[Setting], records: Iterable[Record], number: int) -> list[Setting]:
    """DDIM, DDPM and those with the smallest values of the first measure; of a setting and itself clipped, one."""
    values = {record.setting: record.results[0].estimate.value for record in records if record.results}
    ranked = sorted((each.name for each in settings if each.name in values), key=values.__getitem__)
    best = {name.removesuffix(", clipped"): name for name in reversed(ranked)}  # the better of the two
    chosen = {DDIM.name, DDPM.name, *sorted(best.values(), key=values.__getitem__)[:number]}
    return [each for each in settings if each.name in chosen]


def best_built_in(records: Iterable[Record], measure: str, calls: int) -> Record | None:
    """The record with the smallest value of the schedulers of diffusers, with this number of calls."""
    values = [
        (result.estimate.value, i, record)
        for i, record in enumerate(records)
        if record.calls == calls and not record.is_calibrated and (result := record.result(measure))
    ]
    return min(values)[2] if values else None


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate | None:
    """With a standard error to first order, as of independent values; None unless the denominator is above 0."""
    if denominator.value <= 0:
        return None
    value = numerator.value / denominator.value
    relative = [error / of for of, error in (numerator, denominator) if error and of]
    return Estimate(value, abs(value) * math.hypot(*relative))


def table(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: for each measure a table of the best settings and one of all; then what was left out."""
    lines: list[str] = []
    for first in _first_results(records):
        lines += [f"## {_title(first)}", "", *_best_settings(records, first.measure), ""]
        if first.real_data_baseline is not None:
            lines += [f"Real-data baseline: {first.real_data_baseline:.4g}.", ""]
        lines += [*_all_settings(records, first.measure), ""]
    problems: dict[str, list[str]] = {}
    for record in records:
        if record.problem is not None:
            problems.setdefault(record.problem, []).append(f"{record.setting} ({record.calls})")
    if problems:
        lines += ["## Left out", "", "Settings, with the number of calls, and the reason:", ""]
        lines += [f"- {', '.join(names)}: {problem}" for problem, names in problems.items()]
    return lines


def summary(records: Sequence[Record]) -> list[str]:
    """A line for each number of calls: the first measure of calibrated sampling, and of the others at their best."""
    lines = []
    for first in _first_results(records)[:1]:
        for calls in dict.fromkeys(record.calls for record in records):
            estimates, best = _estimates(records, first.measure, calls), best_built_in(records, first.measure, calls)
            own = [record.setting for record in records if record.is_calibrated and record.setting in estimates]
            names = dict.fromkeys([*own, *([] if best is None else [best.setting]), DDIM.name, DDPM.name])
            texts = [f"{name} {_plain(estimates[name])}" for name in names if name in estimates]
            lines.append(f"{calls} calls, {first.name}: {', '.join(texts)}")
    return lines


def _best_settings(records: Sequence[Record], measure: str) -> list[str]:
    calibrated = list(dict.fromkeys(record.setting for record in records if record.is_calibrated))
    columns = ["calls", "best built-in", "its setting", DDIM.name, DDPM.name]
    columns += [column for name in calibrated for column in (name, f"{name} / best built-in")]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for calls in dict.fromkeys(record.calls for record in records):
        estimates = _estimates(records, measure, calls)
        best = best_built_in(records, measure, calls)
        name = "" if best is None else best.setting
        cells = [str(calls), cell(estimates.get(name)), name]
        cells += [cell(estimates.get(other.name)) for other in (DDIM, DDPM)]
        for own in calibrated:
            both = own in estimates and name in estimates
            cells += [cell(estimates.get(own)), cell(ratio(estimates[own], estimates[name]) if both else None)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _all_settings(records: Sequence[Record], measure: str) -> list[str]:
    """A line for each setting, a column for each number of calls; what made fewer calls says how many."""
    numbers = list(dict.fromkeys(record.calls for record in records))
    lines = ["| setting | " + " | ".join(f"{calls} calls" for calls in numbers) + " |"]
    lines.append("|---" * (1 + len(numbers)) + "|")
    cells: dict[str, dict[int, str]] = {}
    for record in records:
        if (result := record.result(measure)) is not None:
            fewer = f" ({record.num_calls} calls)" if record.num_calls < record.calls else ""
            cells.setdefault(record.setting, {})[record.calls] = cell(result.estimate) + fewer
    for setting, row in cells.items():
        lines.append(f"| {setting} | " + " | ".join(row.get(calls, "") for calls in numbers) + " |")
    return lines


def _first_results(records: Sequence[Record]) -> list[Result]:
    """One result of each measure."""
    first: dict[str, Result] = {}
    for record in records:
        for result in record.results:
            first.setdefault(result.measure, result)
    return list(first.values())


def _estimates(records: Sequence[Record], measure: str, calls: int) -> dict[str, Estimate]:
    """By the name of the setting."""
    return {
        record.setting: result.estimate
        for record in records
        if record.calls == calls and (result := record.result(measure))
    }


def _title(result: Result) -> str:
    features = f", features of the {result.extractor}" if result.extractor else ""
    return f"{result.name[0].upper()}{result.name[1:]}{features}, {result.n} samples"


def cell(estimate: Estimate | None) -> str:
    """Value and standard error for a table in Markdown."""
    return "" if estimate is None else _plain(estimate).replace("+-", "&plusmn;")


def _plain(estimate: Estimate) -> str:
    error = "" if estimate.standard_error is None else f" +- {estimate.standard_error:.2g}"
    return f"{estimate.value:.4g}{error}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot each measure over the number of network calls, the main settings in colour; of a single number, a line for
    each setting."""
    firsts = _first_results(records)
    figure, _ = make_figure(len(firsts))
    draw_panel = _plot_measure if len({record.calls for record in records}) > 1 else _plot_ranking
    for axes, first in zip(figure.axes, firsts):
        draw_panel(axes, records, first)
    save_figure(figure, figure.axes, path)


def _plot_measure(axes: Axes, records: Sequence[Record], first: Result) -> None:
    calls = sorted({record.calls for record in records})
    best = [best_built_in(records, first.measure, number) for number in calls]
    main = {"best built-in": _points([record for record in best if record is not None], first.measure)}
    label: str | None = "other built-in settings"
    for name in dict.fromkeys(record.setting for record in records):
        own = [record for record in records if record.setting == name]
        points = _points(own, first.measure)
        if name in (DDIM.name, DDPM.name) or own[0].is_calibrated:
            main[name] = points
        elif points:
            numbers, estimates = zip(*points)
            axes.plot(
                numbers,
                [each.value for each in estimates],
                "o-",
                color="lightgray",
                markersize=2,
                linewidth=0.8,
                label=label,
            )
            label = None  # of all gray lines
    for name, points in main.items():
        if points:
            numbers, estimates = zip(*points)
            values, errors = zip(*estimates)
            axes.errorbar(numbers, values, [error or 0 for error in errors], marker="o", capsize=3, label=name)
    lowest = [estimate.value for points in main.values() for _, estimate in points]
    highest = max(lowest)
    if first.real_data_baseline is not None:
        axes.axhline(first.real_data_baseline, color="gray", linestyle="--", label="real-data baseline")
        lowest.append(first.real_data_baseline)
    axes.set_ylabel(f"{first.name},\n{first.extractor}" if first.extractor else first.name)
    axes.set(xscale="log", xlabel="network calls for each image")
    axes.set_ylim(min(0.0, 1.1 * min(lowest)), 1.1 * highest)  # gray lines may leave the plot
    axes.set_xticks(calls, [f"{number}" for number in calls])
    axes.minorticks_off()


def _plot_ranking(axes: Axes, records: Sequence[Record], first: Result) -> None:
    rows = [(r.estimate, record) for record in records if (r := record.result(first.measure)) is not None]
    rows.sort(key=lambda row: row[0].value, reverse=True)
    for is_calibrated, label in ((False, None), (True, "calibrated")):
        places = [place for place, (_, record) in enumerate(rows) if record.is_calibrated == is_calibrated]
        if places:
            values, errors = zip(*(rows[place][0] for place in places))
            axes.errorbar(values, places, xerr=[error or 0 for error in errors], fmt="o", label=label)
    if first.real_data_baseline is not None:
        axes.axvline(first.real_data_baseline, color="gray", linestyle="--", label="real-data baseline")
    axes.set_yticks(range(len(rows)), [record.setting for _, record in rows])
    axes.set(xlim=(min(0.0, axes.get_xlim()[0]), None), ylim=(-2.5, len(rows) - 0.5))  # with room for the legend
    axes.set_xlabel(f"{first.name},\n{first.extractor}" if first.extractor else first.name)
    axes.set_title(f"{records[0].calls} network calls for each image", fontsize="medium")


def _points(records: Iterable[Record], measure: str) -> list[tuple[int, Estimate]]:
    """Number of calls and estimate, ascending."""
    return sorted((record.num_calls, r.estimate) for record in records if (r := record.result(measure)) is not None)
