"""PUBLISHING DURING TRAINING: write access is checked first, then training/publish.py runs in a background process.

Whatever the Hub does, training continues.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from training.config import Config
from training.hub.client import HubClient

SCRIPT = Path(__file__).parents[1] / "publish.py"
EXIT_CODE = 3  # the Hub failed; what was trained is complete
ACCESS_CHECK_SECONDS = 60


def check_access(config: Config) -> None:
    """Check before training that the model can be published, and create the repository.

    Raises:
        HubError: the Hub refused, failed or could not be reached.
    """
    from training.hub import push

    push.check_access(
        HubClient(ACCESS_CHECK_SECONDS),
        str(config.hub_model_id),
        private=config.hub_private_repo,
        license=config.license,
    )


class BackgroundPublisher:
    """Publishes pipeline/ in a background process during training, and in the foreground at the end."""

    def __init__(self, config: Config) -> None:
        self.run = Path(config.output_dir).expanduser()
        self.options = ["--hub_model_id", str(config.hub_model_id)]
        if config.hub_private_repo:
            self.options.append("--hub_private_repo")
        if config.license:
            self.options += ["--license", config.license]
        self._process: subprocess.Popen[str] | None = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Publish the current pipeline/ in the background, unless the previous publication is still running."""
        if self._process is not None and self._process.poll() is None:
            print("The previous publication is still running: this model is not published.")
            return
        self._finish()
        # A copy, because training may replace pipeline/ before the process has read it.
        self._copy = tempfile.TemporaryDirectory()
        copy = Path(self._copy.name, self.run.resolve().name)
        shutil.copytree(self.run / "pipeline", copy / "pipeline")
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(copy), *self.options],
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def cancel(self) -> None:
        """Terminate a running publication, without waiting for the Hub."""
        if self._process is not None:
            self._process.terminate()
        self._finish()

    def publish_final(self) -> int:
        """Publish the finished model. Returns 0, or EXIT_CODE if that failed."""
        self._finish()
        command = [os.path.relpath(SCRIPT), str(self.run), *self.options]
        print(f"Publishing: {shlex.join(['python', *command])}", flush=True)
        return EXIT_CODE if subprocess.run([sys.executable, *command]).returncode else 0

    def _finish(self) -> None:
        """Wait for the background process, and warn if it failed."""
        if self._process is not None:
            _, errors = self._process.communicate()
            if self._process.returncode:
                reason = (errors.strip().splitlines() or [f"exit code {self._process.returncode}"])[0]
                print(f"WARNING: the model was not published ({reason}). Training continues.", file=sys.stderr)
            self._process = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None
