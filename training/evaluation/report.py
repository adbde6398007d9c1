"""REPORT: what an evaluation writes: report.json, report.md and plots."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ddpm_pipeline import fidelity, visualize
from ddpm_pipeline.features import Extractor, extract_features
from ddpm_pipeline.files import replacing
from ddpm_pipeline.pixels import from_pixels
from training.evaluation.config import EvalConfig
from training.evaluation.explain import in_short, meanings
from training.evaluation.guidance import MEASURES, guidance_table
from training.evaluation.measures import CLASS_ACCURACY, CLASS_IMAGES, ENOUGH_FOR_FRECHET, Curve, Measurement
from training.evaluation.samples import SamplerConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = 2  # of report.json; publishing leaves out a report of another format
PLOTTED = ("frechet_distance", "kernel_distance")  # over the number of sampling steps
PRINTED = (*PLOTTED, "precision", "recall", "accuracy")  # in samples_line
PATH_FIELDS = ("output_dir", "train_data_dir", "dataset_name", "extractor", "cache_dir")  # of EvalConfig


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of report.json.

    Args:
        weights_sha256: of the first measured weights, by default the EMA weights.
        command: the command that writes this report, without paths of this machine.
        warnings: sentences without a full stop.
        guidance: see guidance_effect; None if samples were drawn with one guidance scale.
        curves: the terms of the variational bound over t, for each weights and variance.
        data: the data set.
        reference: description, n and sha256 of the reference set.
        real_data_baseline: description and n of the images of the real-data baseline.
        held_out: description and n of the held-out images.
        extractors: name, key, commit on the Hub and accuracy of each.
        step: optimizer steps of the model's training; None if unknown.
        precision: what the network computes in: float32, bf16 or fp16.
        seconds: duration of the evaluation.
        num_processes: world size.
        device: name of the processor or GPU.
        date: YYYY-MM-DD.
        commit: of this project's code; None outside a git checkout.
        versions: of Python and of the libraries.
    """

    format: int = FORMAT
    weights_sha256: str
    command: str
    measurements: list[Measurement]
    warnings: list[str]
    guidance: dict[str, Any] | None
    curves: list[Curve]
    data: str
    reference: dict[str, Any]
    real_data_baseline: dict[str, Any]
    held_out: dict[str, Any]
    extractors: list[dict[str, Any]]
    step: int | None
    precision: str
    seconds: float
    num_processes: int
    device: str
    date: str
    commit: str | None
    versions: dict[str, str]


def write(output_dir: Path, folder: Path, report: Report) -> None:
    """Write report.json and report.md into output_dir, replacing each at once, and plots into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = [*plot_distances(folder, report.measurements), *plot_guidance(folder, report.measurements)]
    plots += plot_bound(folder, report.curves)
    if (folder / "nearest.png").is_file():
        plots.append("nearest.png")
    for name, text in (
        ("report.md", markdown(report, [f"{folder.name}/{plot}" for plot in plots])),
        ("report.json", json.dumps(dataclasses.asdict(report), indent=2) + "\n"),
    ):
        with replacing(output_dir / name) as path:
            path.write_text(text, encoding="utf-8")


def command_line(config: EvalConfig) -> str:
    """The command line for this config. Of a path outside the current folder only the last component is kept."""
    command = ["accelerate", "launch", "training/evaluate.py", _shareable(config.model, "runs/")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model" or value == field.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if field.name in PATH_FIELDS:
            values = tuple(map(_shareable, values))
        texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in values]
        if field.name == "extractor":  # may hold commas, and is repeated instead
            command += [part for text in texts for part in ("--extractor", text)]
        else:
            command += [f"--{field.name}", ",".join(texts)]
    return shlex.join(command)


def _shareable(path: str, parent: str = "") -> str:
    folder = Path(path).expanduser()
    return parent + folder.name if folder.is_absolute() or ".." in folder.parts else path


def samples_line(weights: str, sampler: SamplerConfig, measurements: Sequence[Measurement]) -> str:
    """One line with the main measurements of one sampler."""
    printed = [m for m in measurements if m.measure in PRINTED]
    groups = []
    for extractor in dict.fromkeys(m.extractor for m in printed):
        values = ", ".join(f"{m.name} {m.value:.4g}" for m in printed if m.extractor == extractor)
        groups.append(f"{values} ({extractor})")
    return f"{weights}, {sampler}: " + ("; ".join(groups) or "sampled")


def held_out_line(measurement: Measurement) -> str:
    """One line about a measurement of held-out images."""
    value = f"{measurement.value:.3f} +- {measurement.standard_error:.3f}"
    return f"{measurement.weights}, {measurement.name}: {value}, {measurement.n} images"


# ---- report.md -------------------------------------------------------------------------------------------------------


def markdown(report: Report, plots: Sequence[str]) -> str:
    """The text of report.md: a table for each extractor, one for bits per dimension, and the plots."""
    baseline = report.real_data_baseline
    lines = [
        "# Evaluation",
        "",
        f"`{report.command}`, {report.date}, {report.seconds / 60:.1f} minutes on {report.num_processes} x "
        f"{report.device}, {report.precision}.",
        "",
        f"Data: {report.data}. Reference set: {report.reference['description']}. Real-data baseline: {baseline['n']} "
        f"{baseline['description']}, measured as if they were samples.",
    ]
    if summary := in_short(report.measurements, report.guidance):
        lines += ["", f"**In short:** {summary}"]
    lines += [f"\n> {warning}." for warning in report.warnings]
    lines += [
        f"\nThe {extractor['name']} has an accuracy of {extractor['accuracy']:.1%} on images that it was not trained "
        "on. Its features show what separates its classes; they may miss other differences."
        for extractor in report.extractors
        if extractor["accuracy"] is not None
    ]
    lines += [
        f"\nThe features of {extractor['name']} are those of its commit `{extractor['commit']}` on the Hub."
        for extractor in report.extractors
        if extractor["commit"] is not None
    ]
    of_samples = [m for m in report.measurements if m.sampler is not None and m.class_name is None]
    for extractor in dict.fromkeys(m.extractor for m in of_samples):
        lines += _samples_table(extractor, [m for m in of_samples if m.extractor == extractor])
    if report.guidance is not None:
        extractor = report.guidance["extractor"]
        features = f"; distances are in features of the {extractor}" if extractor else ""
        lines += ["", "## Guidance", "", f"With the first weights, steps and eta{features}.", ""]
        lines += guidance_table(report.guidance)
    lines += _classes_table([m for m in report.measurements if m.class_name is not None and m.primary])
    if of_held_out := [m for m in report.measurements if m.sampler is None]:
        lines += ["", "## Bits per dimension of held-out images", "", "| weights | measure | images | value |",
                  "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {m.weights} | {m.name} | {m.n} | {_with_error(m)} |" for m in of_held_out]
    measures = list(dict.fromkeys(m.measure for m in report.measurements))
    lines += ["", "## What the measures mean", "", *meanings(measures)]
    lines += ["", "Two distances are comparable only with the same extractor, reference set and number of samples."]
    lines += [f"\n![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n".join(lines) + "\n"


def _samples_table(extractor: str | None, measurements: Sequence[Measurement]) -> list[str]:
    """A table with a line for each sampler, and one for the real-data baseline."""
    names = list(dict.fromkeys(m.name for m in measurements))
    lines = [
        "",
        f"## {extractor or 'Pixels, channel by channel'}",
        "",
        "| weights | sampler | steps | samples | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for m in measurements:
        rows.setdefault((m.weights, m.sampler, m.num_inference_steps, m.n), {})[m.name] = _with_error(m)
    for key, values in rows.items():
        lines.append("| " + " | ".join([*map(str, key), *(values.get(name, "") for name in names)]) + " |")
    baseline = {m.name: m.real_data_baseline for m in measurements}
    lines.append("| real-data baseline | | | | " + " | ".join(_number(baseline[name]) for name in names) + " |")
    return lines


def _classes_table(measurements: Sequence[Measurement]) -> list[str]:
    """A table with a line for each class and extractor, or nothing."""
    if not measurements:
        return []
    names = list(dict.fromkeys(m.name for m in measurements))
    lines = [
        "",
        "## Within each class",
        "",
        f"How often the samples of a class are recognised, if there are {CLASS_ACCURACY}, and their distances to the "
        f"images of the class in the reference set, with the first sampler. A distance needs {CLASS_IMAGES} images in "
        f"both, and a Frechet distance, which is mostly bias with fewer, {ENOUGH_FOR_FRECHET}.",
        "",
        "| class | extractor | samples | " + " | ".join(f"{name} | real-data baseline" for name in names) + " |",
        "|---" * (3 + 2 * len(names)) + "|",
    ]
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for m in measurements:
        cell = f"{_with_error(m)} | {_number(m.real_data_baseline)}"
        rows.setdefault((m.class_name, m.extractor, m.n), {})[m.name] = cell
    for key, values in rows.items():
        lines.append("| " + " | ".join([*map(str, key), *(values.get(name, " | ") for name in names)]) + " |")
    return lines


def _with_error(m: Measurement) -> str:
    return _number(m.value) if m.standard_error is None else f"{_number(m.value)} &plusmn; {m.standard_error:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# ---- Images and plots ------------------------------------------------------------------------------------------------


def nearest_grid(
    samples: np.ndarray, reference: np.ndarray, extractor: Extractor, cache_dir: Path, count: int = 12
) -> Image.Image:
    """The `count` samples that are closest to a reference image, each above that image."""
    features = extract_features(extractor, samples)
    distance, index = fidelity.nearest(features, extract_features(extractor, reference, cache_dir=cache_dir))
    closest = distance.argsort()[:count]
    pixels = np.concatenate([samples[closest.numpy()], reference[index[closest].numpy()]])
    return visualize.grid(from_pixels(pixels), columns=len(closest))


def plot_distances(folder: Path, measurements: Sequence[Measurement]) -> list[str]:
    """Plot the distances over the number of sampling steps, in features of the first extractor.

    Returns:
        The names of the files; none if there is only one number of steps.
    """
    names = []
    for measure in PLOTTED:
        chosen = [m for m in measurements if m.measure == measure]
        chosen = [m for m in chosen if m.extractor == chosen[0].extractor]
        steps = sorted({m.num_inference_steps for m in chosen if m.num_inference_steps is not None})
        if len(steps) < 2:
            continue
        figure, axes = make_figure()
        _plot_over(axes, chosen, "num_inference_steps")
        axes.set(xscale="log", xlabel="number of sampling steps")
        axes.set_xticks(steps, [f"{number}" for number in steps])
        axes.minorticks_off()
        names.append(save_figure(figure, [axes], folder / f"{measure}.png"))
    return names


def plot_guidance(folder: Path, measurements: Sequence[Measurement]) -> list[str]:
    """Plot distances, in features of the first extractor, and accuracy over the guidance scale.

    Returns:
        The name of the file; none if there is only one scale.
    """
    panels = []
    for measure in MEASURES:
        chosen = [m for m in measurements if m.measure == measure]
        chosen = [m for m in chosen if m.extractor == chosen[0].extractor]
        if len({m.guidance_scale for m in chosen}) > 1:
            panels.append(chosen)
    if not panels:
        return []
    figure, *_ = make_figure(len(panels))
    for axes, chosen in zip(figure.axes, panels):
        _plot_over(axes, chosen, "guidance_scale")
        axes.set(
            xlabel="guidance scale", xticks=sorted({m.guidance_scale for m in chosen if m.guidance_scale is not None})
        )
    return [save_figure(figure, figure.axes, folder / "guidance.png")]


def _plot_over(axes: Axes, measurements: Sequence[Measurement], over: str) -> None:
    """Values and standard errors over num_inference_steps or guidance_scale, a line for all else, and the baseline."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for m in measurements:
        label = f"{m.weights}, " + ("calibrated" if m.eta is None else f"eta {m.eta:g}")
        if over == "guidance_scale":
            label += f", {m.num_inference_steps} steps"
        elif m.guidance_scale != 1:
            label += f", guidance {m.guidance_scale:g}"
        lines.setdefault(label, []).append((getattr(m, over), m.value, m.standard_error or 0))
    for label, points in lines.items():
        numbers, values, errors = zip(*sorted(points))
        axes.errorbar(numbers, values, errors, marker="o", capsize=3, label=label)
    first = measurements[0]
    lowest = [m.value for m in measurements]
    if first.real_data_baseline is not None:
        axes.axhline(first.real_data_baseline, color="gray", linestyle="--", label="real-data baseline")
        lowest.append(first.real_data_baseline)
    axes.set_ylabel(f"{first.name},\n{first.extractor}")
    if first.measure != "accuracy":  # which has no need of its 0
        axes.set_ylim(bottom=min(0.0, 1.1 * min(lowest)))


def plot_bound(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """Plot the terms of the variational bound over t, and distortion over rate. Returns the names of the files."""
    if not curves:
        return []
    figure, axes = make_figure()
    for curve in curves:
        label = f"{curve['weights']}, {curve['variance_type']}"
        axes.plot([0, *curve["t"]], [curve["decoder"], *curve["kl"]], marker=".", label=label)
    axes.set(
        yscale="log", xscale="symlog", xlim=(0, None), xlabel="t (at 0: the decoder)",
        ylabel="bits per dimension of one timestep",
    )  # fmt: skip
    names = [save_figure(figure, [axes], folder / "bound.png")]
    figure, axes = make_figure()
    for curve in curves:
        progressive = curve["rate_distortion"]
        label = f"{curve['weights']}, {curve['variance_type']}"
        axes.plot(progressive["rate"], progressive["distortion"], marker=".", label=label)
    axes.set(xlabel="rate, bits per dimension", ylabel="distortion, RMS error of 255", ylim=(0, None))
    return [*names, save_figure(figure, [axes], folder / "rate_distortion.png")]


def make_figure(panels: int = 1) -> tuple[Figure, Axes]:
    """A figure with panels side by side, and the first of them."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(6.4 if panels == 1 else 4.8 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0, 0]


def save_figure(figure: Figure, panels: Sequence[Axes], path: Path) -> str:
    """Save it with a grid and a legend in each panel. Returns the name of the file."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path.name
