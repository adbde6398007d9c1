"""Short runs of the scripts in training/: how the tests start them, and what train.py is asked for."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

TRAINING = Path(__file__).parents[1] / "training"

# Global batch 4 of 10 pictures, 6 steps.
SHORT_RUN = {
    "denoiser": "tiny",
    "ddpm_num_steps": 20,
    "random_flip": True,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # Adam makes steps of full length of gradients that are 0 but for rounding, which differs
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "mixed_precision": "no",
    "cpu_threads": 1,
    "logging_steps": 1,
}


def run_here(script, words):
    """Run a script of training/ in this process, which has imported everything: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", [str(TRAINING / script), *words])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(TRAINING / script), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return 0


def run_in_child(launcher, script, words, cwd=None, expected=0):
    """Run it with the launcher in a process of its own, and end it with all its children after two minutes.

    Returns what it printed; its exit code must be the expected one.
    """
    child = subprocess.Popen(
        [sys.executable, *launcher, str(TRAINING / script), *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == expected, output
    return output
