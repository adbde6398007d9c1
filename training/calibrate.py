"""Calibrate a sampler of few steps: `accelerate launch training/calibrate.py runs/mine [--num_inference_steps 5,10]`.

It fits the numbers of a sampler with few steps to the network, on all processes, and saves them in
scheduler_config.json as soon as a number of steps is done: from then on `pipe(num_inference_steps=10)` uses them. In
the end it compares the sampler with every scheduler of diffusers: calibration/comparison.md with a plot beside it.

Finished tables and samples of the comparison are kept in calibration/, so the same command continues after them.

Exit codes: 0 done; 2 a mistake in the command, or the model or its data cannot be read; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.calibration.config import CalibrationConfig, parse
from training.command_line import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(arguments)
    return exit_code("calibrate.py", lambda: calibrate(config), config.output_dir or config.model, "Finished tables")


def calibrate(config: CalibrationConfig) -> None:
    """Fit the tables of a model, save them in its scheduler, and compare.

    Raises:
        ValueError: the config does not fit the model or its data, or a library is missing.
        OSError: the model or its data cannot be read, or a result cannot be written.
    """
    # Only now: torch and diffusers take seconds to import.
    from ddpm_pipeline.cpu import importing

    with importing():
        from training.calibration import results
        from training.calibration.calibrator import Calibrator
        from training.run import runtime

    calibrator = Calibrator(config)
    calibrator.load_images()
    calibrator.fit(lambda: results.save(calibrator))
    if config.compare:
        results.compare_all(calibrator)
    calibrator.runtime.barrier()
    runtime.leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
