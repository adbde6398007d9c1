"""What a measurement leaves: report.json, report.md, and plots. See training/evaluate.py for what is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_pipeline.pixels import from_pixels

Row = dict[str, Any]

PLOTTED = ("frechet_distance", "kernel_distance")  # against the number of steps


def write(output_dir: Path, folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.md into output_dir, plots into folder; the first whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = [*plot_quality(folder, report["measurements"]), *plot_bound(folder, report["curves"])]
    if (folder / "nearest.png").is_file():
        plots.append("nearest.png")
    replace(output_dir / "report.md", markdown(report, [f"{folder.name}/{name}" for name in plots]))
    replace(output_dir / "report.json", json.dumps(report, indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def line(found: Sequence[Row], about: Row) -> str:
    """One setting in one line, for whoever waits."""
    head = f"{about['weights']}, {about['num_inference_steps']} steps, eta {about['eta']:g}"
    shown = [row for row in found if row["measure"] in ("frechet_distance", "kernel_distance", "precision", "recall")]
    of_each = []
    for extractor in dict.fromkeys(row["extractor"] for row in shown):
        values = ", ".join(f"{row['name']} {row['value']:.4g}" for row in shown if row["extractor"] == extractor)
        of_each.append(f"{values} ({extractor})")
    return f"{head}: " + "; ".join(of_each or ["sampled"])


def markdown(report: dict[str, Any], plots: Sequence[str]) -> str:
    """Tables: one of each extractor with a line for each sampler, and one of the bits."""
    rows: list[Row] = report["measurements"]
    minutes = report["seconds"] / 60
    lines = ["# What was measured", "", f"`{report['command']}`, {report['date']}, {minutes:.1f} minutes on "
             f"{report['num_processes']} x {report['device']}, {report['precision']}.", "",
             f"Data: {report['data']}. Reference: {report['reference']['words']}. Floor: {report['floor']['n']} "
             f"{report['floor']['words']} measured as if they were samples."]  # fmt: skip
    lines += [f"\n> {warning}." for warning in report["warnings"]]
    lines += [
        f"\nThe {one['name']} is right about {one['accuracy']:.1%} of pictures it did not learn from. It sees "
        "what tells its classes apart, and may be blind to the rest."
        for one in report["extractors"]
        if one["accuracy"] is not None
    ]
    drawn = [row for row in rows if row["sampler"] is not None]
    for extractor in dict.fromkeys(row["extractor"] for row in drawn):
        of_it = [row for row in drawn if row["extractor"] == extractor]
        names = list(dict.fromkeys(row["name"] for row in of_it))
        lines += [
            "",
            f"## {extractor or 'Pixels, channel by channel'}",
            "",
            "| weights | sampler | steps | samples | " + " | ".join(names) + " |",
            "|---" * (4 + len(names)) + "|",
        ]
        for key in dict.fromkeys(_key(row) for row in of_it):
            values = {row["name"]: _value(row) for row in of_it if _key(row) == key}
            lines.append("| " + " | ".join([*map(str, key), *(values.get(name, "") for name in names)]) + " |")
        floors = {row["name"]: row["floor"] for row in of_it}
        lines.append("| real pictures | | | | " + " | ".join(_number(floors[name]) for name in names) + " |")
    in_bits = [row for row in rows if row["sampler"] is None]
    if in_bits:
        lines += ["", "## Bits per dimension of held-out pictures", "", "| weights | measure | images | value |",
                  "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {row['weights']} | {row['name']} | {row['n']} | {_value(row)} |" for row in in_bits]
    lines += [
        "",
        "A distance compares with another one only if extractor, reference and number of samples are the same.",
    ]
    lines += [f"\n![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[Any, ...]:
    return row["weights"], row["sampler"], row["num_inference_steps"], row["n"]


def _value(row: Row) -> str:
    value = _number(row["value"])
    return value if row["standard_error"] is None else f"{value} &plusmn; {row['standard_error']:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# ---- Pictures --------------------------------------------------------------------------------------------------------


def nearest_picture(
    pixels: np.ndarray, reference: np.ndarray, extractor: Any, cache_dir: Path, number: int = 12
) -> Image.Image:
    """The samples that are nearest to a training picture, and below each that picture."""
    from ddpm_pipeline import fidelity, visualize
    from ddpm_pipeline.features import extract_features

    features = extract_features(extractor, pixels)
    distance, index = fidelity.nearest(features, extract_features(extractor, reference, cache_dir=cache_dir))
    closest = distance.argsort()[:number]
    both = np.concatenate([pixels[closest.numpy()], reference[index[closest].numpy()]])
    return visualize.grid(from_pixels(both), columns=len(closest))


def plot_quality(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Distances against the number of steps, if there is more than one number; the names of the files."""
    made = []
    for measure in PLOTTED:
        of_it = [row for row in rows if row["measure"] == measure]
        if len({row["num_inference_steps"] for row in of_it}) < 2:
            continue
        figure, axes = _figure()
        extractor = of_it[0]["extractor"]
        of_it = [row for row in of_it if row["extractor"] == extractor]
        for weights, eta in dict.fromkeys((row["weights"], row["eta"]) for row in of_it):
            chosen = sorted(
                (row for row in of_it if (row["weights"], row["eta"]) == (weights, eta)),
                key=lambda row: row["num_inference_steps"],
            )
            axes.errorbar(
                [row["num_inference_steps"] for row in chosen],
                [row["value"] for row in chosen],
                [row["standard_error"] or 0 for row in chosen],
                marker="o",
                capsize=3,
                label=f"{weights}, eta {eta:g}",
            )
        if of_it[0]["floor"] is not None:
            axes.axhline(of_it[0]["floor"], color="gray", linestyle="--", label="real pictures")
        axes.set(xscale="log", xlabel="steps of the walk home", ylabel=f"{of_it[0]['name']}, {extractor}")
        values = [row[name] for row in of_it for name in ("value", "floor") if row[name] is not None]
        axes.set_ylim(bottom=min(0.0, *(1.1 * value for value in values)))
        steps = sorted({row["num_inference_steps"] for row in of_it})
        axes.set_xticks(steps, [f"{number}" for number in steps])
        axes.minorticks_off()
        made.append(_saved(figure, axes, folder / f"{measure}.png"))
    return made


def plot_bound(folder: Path, curves: Sequence[Row]) -> list[str]:
    """The terms of the bound against t, and what is seen of the picture against what is sent of it."""
    if not curves:
        return []
    figure, axes = _figure()
    for curve in curves:
        label = f"{curve['weights']}, {curve['variance_type']}"
        axes.plot([0, *curve["t"]], [curve["decoder"], *curve["step"]], marker=".", label=label)
    axes.set(
        yscale="log",
        xscale="symlog",
        xlim=(0, None),
        xlabel="t; at 0 the decoder",
        ylabel="bits per dimension of one step",
    )
    made = [_saved(figure, axes, folder / "bound.png")]
    figure, axes = _figure()
    for curve in curves:
        found = curve["rate_distortion"]
        axes.plot(found["rate"], found["distortion"], marker=".", label=f"{curve['weights']}, {curve['variance_type']}")
    axes.set(xlabel="bits per dimension sent", ylabel="root mean squared error, of 255", ylim=(0, None))
    return [*made, _saved(figure, axes, folder / "rate_distortion.png")]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no screen, no global state

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    return figure, figure.subplots()


def _saved(figure: Any, axes: Any, path: Path) -> str:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path.name
