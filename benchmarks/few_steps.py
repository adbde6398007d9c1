"""Collect comparisons of calibrate.py: `python benchmarks/few_steps.py runs/mnist runs/cifar [--name NAME]`.

For each run and number of network calls: the schedulers of diffusers at their best setting, DDIM, DDPM, and calibrated
steps, without and with a guide. Prints a table for each run, and writes benchmarks/results/few-steps-NAME.json and a
plot beside it. It measures nothing: run `training/calibrate.py` first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import RESULTS, machine, write_json
from ddpm_pipeline.fidelity import Estimate
from training.calibration.compare import Record, best_built_in, cell, load_records, ratio
from training.calibration.results import COMPARISON, FOLDER
from training.calibration.settings import DDIM, DDPM
from training.evaluation.report import make_figure

BEST, CALIBRATED, GUIDED = "best built-in", "calibrated", "calibrated, guided"
COLUMNS = (BEST, DDIM.name, DDPM.name, CALIBRATED, GUIDED)
FRECHET = "frechet_distance"
MEASURES = (FRECHET, "kernel_distance")


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect comparisons of calibrated steps.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that were calibrated and compared")
    parser.add_argument("--name", default="all", help="of the results")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "models": {}}
    for run in args.runs:
        records = load_records(run / FOLDER / COMPARISON)
        rows = collect(records)
        if not rows:
            parser.error(f"{run / FOLDER / COMPARISON} has no comparison: run training/calibrate.py first")
        results["models"][run.name] = rows
        print(f"## {run.name}", "", *lines_of(rows), "", sep="\n")
    path = RESULTS / f"few-steps-{args.name}.json"
    write_json(path, results)
    plot(results["models"], path.with_suffix(".png"))
    print(f"results: {path}, and a plot beside it")


def collect(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each number of calls, of the records with the most samples."""
    most = max((record.inputs["num_samples"] for record in records if record.results), default=0)
    chosen = [record for record in records if record.results and record.inputs["num_samples"] == most]
    rows = []
    for calls in sorted({record.calls for record in chosen}):
        of_calls = [record for record in chosen if record.calls == calls]
        if (best := best_built_in(of_calls, FRECHET, calls)) is None:
            continue
        named = {record.setting: record for record in of_calls if record.setting in (DDIM.name, DDPM.name)}
        named[BEST] = best
        for record in of_calls:
            if record.is_calibrated:
                guidance = record.inputs["setting"]["call"].get("autoguidance_scale", 1.0)
                named[CALIBRATED if guidance == 1 else GUIDED] = record
        rows.append(
            {"calls": calls, "num_samples": most} | {name: entry(named[name]) for name in COLUMNS if name in named}
        )
    return rows


def entry(record: Record) -> dict[str, Any]:
    """What was measured of a setting: value and standard error of each measure, and the real-data baseline."""
    of = {result.measure: result for result in record.results}
    values = {name: list(of[name].estimate) for name in MEASURES}
    baseline = {name: of[name].real_data_baseline for name in MEASURES}
    setting = record.inputs["setting"]
    options = {"call": setting["call"], "options": setting["options"]}
    return {"setting": record.setting, "calls": record.num_calls, **options, **values, "real_data_baseline": baseline}


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table in Markdown: Frechet distances, and the ratio of the best calibrated one to the best built-in one."""
    lines = ["| calls | " + " | ".join(COLUMNS) + " | its setting | ratio |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        cells = [cell(Estimate(*row[name][FRECHET]) if name in row else None) for name in COLUMNS]
        lines.append(f"| {row['calls']} | " + " | ".join(cells) + f" | {row[BEST]['setting']} | {best_ratio(row)} |")
    return lines


def best_ratio(row: dict[str, Any]) -> str:
    own = [Estimate(*row[name][FRECHET]) for name in (CALIBRATED, GUIDED) if name in row]
    if not own:
        return ""
    found = ratio(min(own), Estimate(*row[BEST][FRECHET]))
    return "" if found is None else f"{found.value:.2f} &plusmn; {found.standard_error:.2f}"


def plot(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each model: Frechet distance against network calls."""
    figure, _ = make_figure(len(models))
    for axes, (model, rows) in zip(figure.axes, models.items()):
        for name in COLUMNS:
            points = [(row[name]["calls"], *row[name][FRECHET]) for row in rows if name in row]
            if points:
                calls, values, errors = zip(*points)
                axes.errorbar(calls, values, errors, marker="o", capsize=3, label=name)
        axes.axhline(rows[-1][BEST]["real_data_baseline"][FRECHET], color="gray", linestyle="--", label="real images")
        axes.set(title=model, xscale="log", yscale="log", xlabel="network calls for each image")
        axes.set_xticks([row["calls"] for row in rows], [str(row["calls"]) for row in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Frechet distance")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLUMNS) + 1)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
