"""LOG: configuration, metrics and sample images of a run. A log that cannot be written does not end training."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ddpm_pipeline.files import replacing
from training.config import Config

if TYPE_CHECKING:
    from PIL import Image

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
METRICS_OF_NEW_RUN = ".metrics.jsonl.new"  # while the folder still has those of an earlier run
PROJECT = "ddpm-pipeline"  # the project or experiment of wandb and other trackers


class Log:
    """config.yaml, metrics.jsonl and samples/ in the folder of a run, and the trackers of `report_to`.

    A new run in the folder of an earlier one leaves that run's config.yaml and metrics.jsonl in place until it writes a
    checkpoint, and then keeps them beside its own: config.1.yaml, metrics.1.jsonl.

    Args:
        after_step: the step after which the run resumes: entries of later steps are removed from metrics.jsonl.
        enabled: False on all ranks but rank 0: nothing is written.
    """

    def __init__(self, folder: Path, config: Config, *, after_step: int = 0, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self._config = config.as_dict() | {"resume_from_checkpoint": None}  # so that config.yaml starts a new run
        self._tracker_names = list(config.trackers)
        self._trackers: dict[str, Any] = {}
        self._after_step = after_step
        self._warned: set[str] = set()
        self._file: IO[str] | None = None
        self.has_earlier_files = False
        if not enabled:
            return
        new = folder / METRICS_OF_NEW_RUN
        self.has_earlier_files = not after_step and any((folder / name).exists() for name in (CONFIG, METRICS))
        with self._never_fatal("sample images", OSError):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        with self._never_fatal("metrics", OSError):
            new.unlink(missing_ok=True)
            if not self.has_earlier_files:
                _remove_later_steps(folder / METRICS, after_step)
            self._file = (new if self.has_earlier_files else folder / METRICS).open("a", encoding="utf-8")
        if not self.has_earlier_files:
            self._write_config()

    def replace_earlier_files(self) -> None:
        """After the first checkpoint of this run: move the files of an earlier one aside, this run's into place."""
        if not (self.enabled and self.has_earlier_files):
            return
        self.has_earlier_files = False
        with self._never_fatal("metrics", OSError):
            for i in itertools.count(1):
                kept = [self.folder / name.replace(".", f".{i}.") for name in (CONFIG, METRICS)]
                if not any(path.exists() for path in kept):
                    break
            for name, path in zip((CONFIG, METRICS), kept):
                if (self.folder / name).exists():
                    (self.folder / name).rename(path)
            if self._file is not None:
                self._file.close()  # Windows does not rename an open file
                (self.folder / METRICS_OF_NEW_RUN).rename(self.folder / METRICS)
                self._file = (self.folder / METRICS).open("a", encoding="utf-8")
        self._write_config()

    def _write_config(self) -> None:
        import yaml

        with self._never_fatal(CONFIG, OSError), replacing(self.folder / CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(self._config, sort_keys=False), encoding="utf-8")

    def metrics(self, step: int, **values: float) -> None:
        if not self.enabled:
            return
        with self._never_fatal("metrics", OSError):
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
        if step > 1:  # importing tensorboard takes a second, so the first step is reported before it
            for name, tracker in self._started_trackers():
                with self._never_fatal(f"the {name} log", Exception):
                    tracker.log(values, step=step)

    def sample_images(self, step: int, grid: Image.Image) -> None:
        """Save a grid of samples as samples/step-NNNNNN.png and send it to the trackers."""
        self.save_image(grid, f"step-{step:06d}.png")
        for name, tracker in self._started_trackers() if self.enabled else []:
            if not hasattr(tracker, "log_images"):
                continue
            with self._never_fatal(f"the {name} log", Exception):
                if name == "tensorboard":
                    import numpy as np

                    pixels = np.atleast_3d(np.asarray(grid))[None]
                    tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({"samples": [grid]}, step=step)

    def save_image(self, image: Image.Image, name: str) -> None:
        """Save an image in samples/."""
        if self.enabled:
            with self._never_fatal("sample images", OSError):
                image.save(self.folder / "samples" / name)

    def close(self) -> None:
        if not self.enabled:
            return
        with self._never_fatal("metrics", OSError):
            if self._file is not None:
                self._file.close()
        for name, tracker in self._trackers.items():
            with self._never_fatal(f"the {name} log", Exception):
                tracker.finish()

    def _started_trackers(self) -> list[tuple[str, Any]]:
        """accelerate's trackers, by name. The first call starts them, and leaves out those that do not start."""
        while self._tracker_names:
            name = self._tracker_names.pop(0)
            with self._never_fatal(f"the {name} log", Exception):
                self._trackers[name] = self._start(name)
        return list(self._trackers.items())

    def _start(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":  # into the folder tensorboard/; a resumed run hides the steps that it repeats
            tracker = tracker_class("tensorboard", str(self.folder), purge_step=self._after_step + 1)
            tracker.start()
            return tracker
        folder = [str(self.folder)] if tracker_class.requires_logging_directory else []
        tracker = tracker_class(PROJECT, *folder)
        tracker.start()
        tracker.store_init_configuration(self._config)
        return tracker

    @contextlib.contextmanager
    def _never_fatal(self, what: str, kind: type[Exception]) -> Iterator[None]:
        """Turn an error of this kind into a warning, once for each `what`."""
        try:
            yield
        except kind as error:
            if what not in self._warned:
                self._warned.add(what)
                reason = getattr(error, "strerror", None) or error
                print(f"WARNING: cannot write {what} of {self.folder}: {reason}. Training continues.", file=sys.stderr)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to is {','.join(names)!r}, and {name} is not installed: pip install {name}, or choose from "
                f"{', '.join([*available, 'none'])}"
            )


def _remove_later_steps(path: Path, step: int) -> None:
    """Remove the lines after this step from a file of metrics, if it exists."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for an incomplete line, left by a run that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
