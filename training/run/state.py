"""STATE: how far a run is, in optimizer steps and in training time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


class Clock:
    """Training time in seconds. Time inside `paused()`, for sampling and validation, does not count.

    Args:
        seconds_before: training time before the run was resumed.
    Attributes:
        pauses, paused_seconds: how often it was paused, and how long in all.
    """

    def __init__(self, seconds_before: float = 0.0) -> None:
        self._before = seconds_before
        self.pauses, self.paused_seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start or the resume."""
        return time.monotonic() - self._start

    @property
    def total_seconds(self) -> float:
        return self._before + self.seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        paused_at = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - paused_at
            self._start += seconds
            self.pauses, self.paused_seconds = self.pauses + 1, self.paused_seconds + seconds


@dataclass
class TrainingState:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    saved_step: int = 0  # step of the newest checkpoint
    owes_validation: bool = False  # a signal came before the validation of this step
    skipped: int = 0  # steps without an update of the weights
    clock: Clock = field(default_factory=Clock)
