"""Choose how long the weights are averaged: `accelerate launch training/choose_ema.py runs/mine [--ema 0.03,0.07]`.

For a run of train.py --post_hoc_ema. It reconstructs an average of each length from the snapshots in ema/, draws
samples with it and with the model as it is, on all processes and with the same seeds, and measures their Frechet
distance to training images. The best average becomes the model: pipeline/ gets its weights, and the former ones stay in
pipeline-last/, unless that is there already.

Samples are kept in evaluation/, so the same command continues where it was stopped.

Exit codes: 0 done; 2 a mistake in the command, or the run or its data cannot be read; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.command_line import exit_code
from training.evaluation.config import ChoiceConfig, parse_choice


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_choice(arguments)
    return exit_code("choose_ema.py", lambda: choose_ema(config), config.run, "Finished samples")


def choose_ema(config: ChoiceConfig) -> None:
    """Measure averages of these lengths, and make the best one the model.

    Raises:
        ValueError: the config does not fit the run or its data, or the run has no snapshots.
        OSError: the run or its data cannot be read, or the model cannot be written.
    """
    # Only now: torch and diffusers take seconds to import.
    from ddpm_pipeline.cpu import importing

    with importing():
        from training.evaluation.ema_choice import Choice
        from training.run import runtime

    choice = Choice(config)
    choice.measure()
    choice.save()
    choice.release()
    choice.runtime.barrier()
    runtime.leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
