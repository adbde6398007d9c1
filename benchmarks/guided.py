"""A model guided by a weaker version of itself, beside itself alone: `python benchmarks/guided.py RUN --name NAME`.

At equal network calls for each image, of which a guided step needs two. Solvers of diffusers alone, two of them guided,
with the samples, features and images of the comparison of training/calibrate.py. What is measured is kept in its file
calibration/comparison.json; the result is benchmarks/results/guided-NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import RESULTS, machine, write_json
from benchmarks.few_steps import entry
from ddpm_pipeline.calibrated import Guidance
from training.calibration.calibrator import Calibrator
from training.calibration.compare import Record, cell, compare
from training.calibration.config import CalibrationConfig
from training.calibration.results import COMPARED, COMPARISON, guidance_arguments, measure_of, samples_of
from training.calibration.settings import SETTINGS

GUIDED = ("DPM-Solver++ 2M, Karras", "SDE-DPM-Solver++ 2M")
ALONE = ("DDPM", *GUIDED, "DEIS 3, leading")


def main() -> None:
    parser = argparse.ArgumentParser(description="A guided model beside itself alone, at equal network calls.")
    parser.add_argument("run", help="the folder of a finished run with a guide (train.py --guide_snapshot)")
    parser.add_argument("--calls", type=int, default=50, help="for each image; default: %(default)s")
    parser.add_argument("--autoguidance_scale", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        default=(100, 700),
        help="default: %(default)s",
    )
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--cpu_threads", type=int)
    parser.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args()
    low, high = map(float, args.guidance_interval)
    guidance = Guidance(1.0, args.autoguidance_scale, (low, high))
    options = {"num_samples": args.num_samples, "cpu_threads": args.cpu_threads}
    calibrator = Calibrator(CalibrationConfig(model=args.run, **options))
    calibrator.load_images()
    records = measure(calibrator, args.calls, guidance)
    found = {record.setting: entry(record) for record in records}
    path = RESULTS / f"guided-{args.name}.json"
    write_json(path, {"machine": machine(), **vars(args), "run": Path(args.run).name, "settings": found})
    print(*lines_of(records), f"result: {path}", sep="\n")


def measure(calibrator: Calibrator, calls: int, guidance: Guidance) -> list[Record]:
    """Of the solvers alone and guided, with at most this many network calls; those that cannot sample are left out."""
    by_name = {setting.name: setting for setting in SETTINGS}
    alone = [by_name[name] for name in ALONE]
    guided = [
        dataclasses.replace(by_name[name], name=f"{name}, guided", call=guidance_arguments(guidance)) for name in GUIDED
    ]
    samples = samples_of(calibrator, COMPARED, calibrator.config.num_samples)
    records = compare(
        calibrator.model,
        calls,
        [*alone, *guided],
        measure_of(calibrator, samples),
        samples,
        path=calibrator.results / COMPARISON,
        runtime=calibrator.runtime,
    )
    return [record for record in records if record.results]


def lines_of(records: list[Record]) -> list[str]:
    """A table in Markdown, the nearest first."""
    lines = ["| setting | calls | Frechet distance | kernel distance |", "|---|---|---|---|"]
    for record in sorted(records, key=lambda record: record.results[0].estimate.value):
        distances = " | ".join(cell(result.estimate) for result in record.results)
        lines.append(f"| {record.setting} | {record.num_calls} | {distances} |")
    return lines


if __name__ == "__main__":
    main()
