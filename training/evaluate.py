"""Evaluate a model: `accelerate launch training/evaluate.py runs/mnist [--num_samples 5000 ...]`.

It draws samples on all processes, compares them with training images, measures the bits per dimension of held-out
images, and writes report.json, the only source of the numbers on a published model card, with report.md and plots
beside it. Every distance has a real-data baseline: the same distance between two sets of real images.

Samples are kept in evaluation/, and later evaluations reuse them. The report is replaced each time: give all the
metrics that it should contain.

Exit codes: 0 done; 2 a mistake in the command, or the model or its data cannot be read; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.command_line import exit_code
from training.evaluation.config import EvalConfig, check_installed, parse


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(arguments)
    return exit_code("evaluate.py", lambda: evaluate(config), config.output_dir or config.model, "Finished samples")


def evaluate(config: EvalConfig) -> None:
    """Measure a model and write its report.

    Raises:
        ValueError: the config does not fit the model or its data, or a library is missing.
        OSError: the model or its data cannot be read, or the report cannot be written.
    """
    check_installed(config)
    # Only now: torch and diffusers take seconds to import.
    from ddpm_pipeline.cpu import importing

    with importing():
        from training.evaluation.evaluator import Evaluator
        from training.run import runtime

    evaluator = Evaluator(config)
    evaluator.remove_plots()
    real = evaluator.load_images()
    extractors = evaluator.make_extractors(real)
    measurements = evaluator.measure_samples(real, extractors)
    held_out_measurements, curves = evaluator.measure_held_out(real)
    evaluator.write_report(real, extractors, measurements + held_out_measurements, curves)
    evaluator.runtime.barrier()
    runtime.leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
