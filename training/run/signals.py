"""SIGNALS: on SIGTERM, SIGUSR1 or Ctrl-C the run finishes its step, writes a checkpoint and exits with code 143.

A signal only sets a flag. The training loop reads it after each step, because only then is the state consistent. A
second signal ends the process at once. Outside the loop there is nothing to lose, so the first signal ends it.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from training.run.runtime import launched_alone

EXIT_CODE = 128 + signal.SIGTERM  # 143: what a shell reports for a process that SIGTERM ended
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
# Seconds in which further signals are copies of the first: a signal to the process group reaches a process directly and
# once more through torchrun, which forwards its own.
REPEAT_WINDOW = 1.0


class StopSignal:
    """A context that handles the signals; `requested()` tells whether one has arrived.

    `accelerate launch` with one process neither forwards signals nor ends its child when it dies, so the death of the
    launcher counts as a signal too.

    Attributes:
        in_loop: set by the training loop while it runs.
    """

    def __init__(self) -> None:
        self.in_loop = False
        self._first_at: float | None = None
        self._parent = os.getppid() if launched_alone() else None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            # torchrun signals the other processes as soon as one has ended: that must not change their exit code.
            signal.signal(number, signal.SIG_IGN if self.requested() else handler)

    def requested(self) -> bool:
        """Whether the run should end."""
        return self._first_at is not None or (self._parent is not None and os.getppid() != self._parent)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.in_loop:
            raise SystemExit(EXIT_CODE)
        if self._first_at is None:
            self._first_at = now
        elif now - self._first_at > REPEAT_WINDOW:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
