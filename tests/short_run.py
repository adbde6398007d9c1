"""Short runs of the scripts in training/: options of a run of a few seconds, and two ways to start a script."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from training.run import checkpoint

TRAINING = Path(__file__).parents[1] / "training"

# A U-net with every kind of block: most of the time of a short run with "tiny" is spent in the network.
SMALLEST = str(Path(__file__).with_name("smallest_network.json"))
NETWORK = json.loads(Path(SMALLEST).read_text(encoding="utf-8"))
# 6 steps of train.py.
SHORT_RUN = {
    "denoiser": SMALLEST,
    "ddpm_num_steps": 20,
    "prediction_type": "epsilon",
    "random_flip": True,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # a gradient that is 0 up to rounding, which varies, must not make Adam take a full step
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "mixed_precision": "no",
    "cpu_threads": 1,
    "tune": "off",
    "logging_steps": 1,
}


def flags(options):
    """{"a": 1} as command-line arguments: ["--a=1"]."""
    return [f"--{name}={value}" for name, value in options.items()]


@contextlib.contextmanager
def fresh_accelerate(cpu=True):
    """Inside, accelerate uses the CPU; afterwards it has forgotten the run, so that this process can start another."""
    with pytest.MonkeyPatch.context() as patch:
        if cpu:
            patch.setenv("ACCELERATE_USE_CPU", "true")
        try:
            yield patch
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def run_here(script, arguments, cpu=True):
    """Run a script of training/ in this process, which has imported everything: its exit code."""
    with fresh_accelerate(cpu) as patch:
        patch.setattr(sys, "argv", [str(TRAINING / script), *arguments])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(TRAINING / script), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code
    return 0


class Interruption(Exception):
    """In place of the death of a process."""


@contextlib.contextmanager
def dying_after(step):
    """Inside, a run ends with an Interruption after its checkpoint of this step, and has to."""
    save = checkpoint.save

    def save_and_die(output_dir, at_step, **parts):
        save(output_dir, at_step, **parts)
        if at_step == step:
            raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Interruption):
            yield


def run_in_child(launcher, script, arguments, cwd=None, expected=0):
    """Run a script of training/ in a new process: its output, if it exits with the expected code.

    Args:
        launcher: arguments of Python before the script, such as `-m torch.distributed.run`.
        script: name of a file in training/, or None if the launcher names a module itself.
    The process and its children are killed after ten minutes: on a busy machine they take long to start.
    """
    child = subprocess.Popen(
        [sys.executable, *launcher, *([str(TRAINING / script)] if script else []), *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=600)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == expected, output
    return output


def run_on_two(script, arguments):
    """Run a script of training/ in two processes as under torchrun, forked from one that has imported it.

    Returns its output.
    """
    from tests.faults.child import Run, killed_at_end

    with (
        tempfile.TemporaryDirectory() as folder,
        killed_at_end(Run(arguments, Path(folder) / "log.txt", world_size=2, script=script)) as run,
    ):
        codes = run.wait(600)
        assert codes == [0, 0], run.text()
        return run.text()
