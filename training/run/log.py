"""What a run writes down: settings, metrics, pictures. Training goes on when the disk is full of them."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.config import Config


class Log:
    """config.yaml, metrics.jsonl, tensorboard/ and samples/ of a run, written by the main process.

    Lines of steps after `after_step`, where the run resumes, are taken out again.
    """

    def __init__(self, folder: Path, config: Config, after_step: int) -> None:
        import yaml

        self.folder = folder
        self._writer: Any = None
        self._file: Any = None
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        settings = config.as_dict() | {"resume_from_checkpoint": None}  # so that the file starts a run of its own
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if after_step and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= after_step]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._purge_step = after_step + 1
        self._warned: set[str] = set()

    def metrics(self, step: int, **values: float) -> None:
        with self._harmless("metrics"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if step > 1:  # not before the first step is done: tensorboard takes a second to import
            with self._harmless("tensorboard"):
                for name, value in values.items():
                    self._tensorboard().add_scalar(name, value, step)

    def picture(self, step: int, image: Any) -> None:
        import numpy as np

        self.save(image, f"step-{step:06d}.png")
        array = np.asarray(image)
        with self._harmless("tensorboard"):
            layout = "HW" if array.ndim == 2 else "HWC"
            self._tensorboard().add_image("samples", array, step, dataformats=layout)

    def save(self, image: Any, name: str) -> None:
        with self._harmless("pictures"):
            image.save(self.folder / "samples" / name)

    def close(self) -> None:
        with self._harmless("metrics"):
            self._file.close()
        if self._writer is not None:
            with self._harmless("tensorboard"):
                self._writer.close()

    @contextlib.contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """A log that cannot be written is told of once, and training goes on: it is worth more."""
        try:
            yield
        except OSError as error:
            if what not in self._warned:
                self._warned.add(what)
                why = f"{what} in {self.folder} cannot be written: {error.strerror or error}"
                print(f"WARNING: {why}. Training goes on", file=sys.stderr)

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        return self._writer


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a half one, which a run left that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
