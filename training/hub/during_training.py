"""The Hub, for a run: may it be written to, publishing beside the training, and weights to begin from.

A run is published by training/publish.py in a process of its own: whatever the Hub does, training goes on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddpm_pipeline import DDPMScheduler

SCRIPT = Path(__file__).parents[1] / "publish.py"
EXIT_CODE = 3  # the model is whole, and is not on the Hub
SECONDS_TO_CHECK = 60


class HubError(RuntimeError):
    """The Hub refuses, or cannot be reached, before anything is trained."""


def check(config: Config) -> None:
    """Raise HubError unless the model can be published at the end, as far as one can know at the beginning.

    The repository is made, private if that is wanted.
    """
    from training.hub import client, push

    try:
        push.check_access(
            client.Hub(SECONDS_TO_CHECK),
            str(config.hub_model_id),
            private=config.hub_private_repo,
            license=config.license,
        )
    except client.HubError as error:
        raise HubError(str(error)) from error


class Pushes:
    """Publishing of a run, in a process beside it while it trains, and once more at its end."""

    def __init__(self, config: Config) -> None:
        self.run = Path(config.output_dir).expanduser()
        self.options = ["--hub_model_id", str(config.hub_model_id)]
        if config.hub_private_repo:
            self.options.append("--hub_private_repo")
        if config.license:
            self.options += ["--license", config.license]
        self._running: subprocess.Popen[str] | None = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Publish what is in pipeline/ now, unless the time before it is not over yet."""
        if self._running is not None and self._running.poll() is None:
            print("The model of the last time is still on its way to the Hub: this one is not published")
            return
        self._finish()
        # A copy, since training may write the next one before the process has so much as begun.
        self._copy = tempfile.TemporaryDirectory()
        copy = Path(self._copy.name, self.run.resolve().name)
        shutil.copytree(self.run / "pipeline", copy / "pipeline")
        quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        self._running = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(copy), *self.options],
            env=quiet,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def end(self) -> None:
        """Leave off, without waiting for the Hub."""
        if self._running is not None:
            self._running.terminate()
        self._finish()

    def last(self) -> int:
        """Publish the finished model: 0, or EXIT_CODE."""
        self._finish()
        command = [os.path.relpath(SCRIPT), str(self.run), *self.options]
        print(f"Publishing: {shlex.join(['python', *command])}", flush=True)
        return EXIT_CODE if subprocess.run([sys.executable, *command]).returncode else 0

    def _finish(self) -> None:
        """Wait for the process, and say it if it failed."""
        if self._running is not None:
            _, errors = self._running.communicate()
            if self._running.returncode:
                first = (errors.strip().splitlines() or [f"it ended with {self._running.returncode}"])[0]
                print(f"WARNING: the model was not published ({first}). The run goes on", file=sys.stderr)
            self._running = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None


def begin_from(name: str, unet: Any, scheduler: DDPMScheduler, say: Callable[[str], object]) -> None:
    """Copy the weights of a saved or published model into `unet`.

    Args:
        name: a folder, or a name on the Hub.
    Raises:
        ValueError: it is no DDPM, or its network has other tensors, or it was trained to predict something else.
    """
    from ddpm_pipeline import DDPMPipeline

    try:
        pipe = DDPMPipeline.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"init_from is {name!r}: {error}") from error
    theirs, ours = pipe.unet.state_dict(), unet.state_dict()
    for tensor in [*ours, *theirs]:
        shapes = [tuple(state[tensor].shape) if tensor in state else None for state in (theirs, ours)]
        if shapes[0] != shapes[1]:
            there, here = ("none" if shape is None else f"{shape}" for shape in shapes)
            raise ValueError(
                f"init_from is {name!r}, whose network is another one: {tensor} has shape {there} there and {here} "
                "here. denoiser and the number of channels must be those that it was trained with"
            )
    for setting, given_by in (
        ("prediction_type", "prediction_type"),
        ("num_train_timesteps", "ddpm_num_steps"),
    ):
        then, now = pipe.scheduler.config[setting], scheduler.config[setting]
        if then != now:
            raise ValueError(
                f"init_from is {name!r}, which was trained with {given_by} {then!r}, and here it is {now!r}: "
                f"give --{given_by} {then}"
            )
    if not pipe.scheduler.alphas_cumprod.allclose(scheduler.alphas_cumprod):
        say(f"WARNING: {name} was trained with another noise schedule than ddpm_beta_schedule says here")
    unet.load_state_dict(theirs)
    say(f"first weights: those of {name}")
