"""Solvers and corrections of the network's errors, one by one: `python benchmarks/solvers.py RUN --name NAME`.

DPM-Solver++ of orders 1 (DDIM) and 2 without noise, with the noise of DDPM and with that noise in the middle of the
process only; each as it is and with optimal variance, and those of order 1 with epsilon scaling, with as many steps as
asked for (ddpm_pipeline/solver_tables.py). Beside it DDPM with twice as many, and the table of the model for this
number, if it has one.

Frechet distances with the samples, features and images of the comparison of training/calibrate.py, and the sum of
squares that a calibration would choose by, from other noises and training images. The result is
benchmarks/results/solvers-NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import RESULTS, machine, write_json
from ddpm_pipeline.calibrated import Table, find_table, save_tables, with_tables
from ddpm_pipeline.calibration import Trial
from ddpm_pipeline.solver_tables import (
    dpm_solver_table,
    plateau,
    trailing_times,
    with_epsilon_scales,
    with_noise,
    with_optimal_variance,
)
from training.calibration.calibrator import Calibrator
from training.calibration.compare import draw
from training.calibration.config import CalibrationConfig
from training.calibration.results import COMPARED, guidance_arguments, measure_of, samples_of
from training.progress import progress

NAMES = {1: "DDIM", 2: "DPM-Solver++ 2M"}
NOISES = ("", ", noise of DDPM", ", noise in the middle")


def main() -> None:
    parser = argparse.ArgumentParser(description="Solvers and corrections of the network's errors, one by one.")
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--extractor", default="classifier", help="as for training/calibrate.py")
    parser.add_argument("--autoguidance_scale", type=float, default=1.0)
    parser.add_argument("--num_images", type=int, default=256, help="of the sum of squares and of epsilon scaling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args()
    calibrator = Calibrator(
        CalibrationConfig(
            model=args.run,
            num_inference_steps=(args.num_inference_steps,),
            num_samples=args.num_samples,
            extractor=args.extractor,
            num_images=args.num_images,
            autoguidance_scale=args.autoguidance_scale,
            seed=args.seed,
        )
    )
    calibrator.load_images()
    found = rows(calibrator, args.num_inference_steps)
    result = {"machine": machine(), **vars(args), "run": Path(args.run).name, "rows": found}
    path = RESULTS / f"solvers-{args.name}.json"
    write_json(path, result)
    print(*lines_of(found), f"result: {path}", sep="\n")


def rows(calibrator: Calibrator, num_steps: int) -> list[dict[str, Any]]:
    """A row for each solver, with the sum of squares and the distances."""
    pipe, runtime = calibrator.pipe, calibrator.runtime
    samples = samples_of(calibrator, COMPARED, calibrator.config.num_samples)
    measure = measure_of(calibrator, samples)
    start = dpm_solver_table(pipe.scheduler, trailing_times(pipe.scheduler, num_steps))
    trial = calibrator.trial(3, calibrator.config.num_images, start._replace(guidance=calibrator.guidance))
    found = []
    for name, table in progress(list(named_tables(calibrator, trial, num_steps).items()), "solvers"):
        scheduler = with_tables(pipe.scheduler, None)
        table = table._replace(guidance=calibrator.guidance)
        save_tables(scheduler, pipe.unet, [table], pipe.guide)
        call = {"num_inference_steps": len(table.timesteps), "calibrated": True}
        images = draw(pipe, scheduler, {**call, **guidance_arguments(calibrator.guidance)}, samples, runtime)
        distances = {each.measure: list(each.estimate) for each in measure(images)}
        found.append(
            {"name": name, "steps": len(table.timesteps), "sum_of_squares": trial.of(table).value(), **distances}
        )
        print(*lines_of(found[-1:])[2:], flush=True)
    return found


def named_tables(calibrator: Calibrator, trial: Trial, num_steps: int) -> dict[str, Table]:
    scheduler = calibrator.pipe.scheduler
    tables: dict[str, Table] = {}
    for order, name in NAMES.items():
        plain = dpm_solver_table(scheduler, trailing_times(scheduler, num_steps), order)
        etas = [0.0] * num_steps, [1.0] * num_steps, plateau(plain, scheduler)
        for noise, of_steps in zip(NOISES, etas):
            table = with_noise(plain, scheduler, of_steps)
            errors = calibrator.errors(trial.of(table).run)
            tables[name + noise] = table
            tables[f"{name}{noise}, optimal variance"] = with_optimal_variance(table, errors.x_0_variances)
            if order == 1:  # of which it is exact
                tables[f"{name}{noise}, epsilon scaling"] = with_epsilon_scales(table, scheduler, errors.epsilon_scales)
    twice = dpm_solver_table(scheduler, trailing_times(scheduler, 2 * num_steps), 1)
    tables["DDPM, twice the steps"] = with_noise(twice, scheduler, [1.0] * 2 * num_steps)
    if (fitted := find_table(scheduler, num_steps, calibrator.guidance)) is not None:
        tables["calibrated"] = fitted
    return tables


def lines_of(found: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| solver | steps | sum of squares | Frechet distance | kernel distance |", "|---|---|---|---|---|"]
    for row in found:
        distances = [
            "{:.3g} &plusmn; {:.2g}".format(*row[measure]) for measure in ("frechet_distance", "kernel_distance")
        ]
        lines.append(f"| {row['name']} | {row['steps']} | {row['sum_of_squares']:.3g} | {' | '.join(distances)} |")
    return lines


if __name__ == "__main__":
    main()
