"""SIGTERM, SIGUSR1 and Ctrl-C: the step that runs is finished, a checkpoint is written, and the run ends with 143.

A signal only sets a flag, which the loop asks for after each step; there is no other safe place. A second one ends the
process at once. Before the loop begins and after it has ended nothing can be lost, so there the first one ends it.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from training.run.runtime import launched_alone

EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell says it of a process that SIGTERM ended
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
# One `kill` of a process group reaches a process twice: itself, and by torchrun, which passes its own on.
SAME_SIGNAL = 1.0  # seconds


class Stop:
    """Takes the signals while it is a context; `asked` says whether one came.

    `accelerate launch` with one process does not pass signals on and leaves its child alone when it dies: that is
    taken for a signal too.
    """

    def __init__(self) -> None:
        self.in_loop = False
        self._came_at: float | None = None
        self._parent = os.getppid() if launched_alone() else None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # torchrun ends the others as soon as one process has ended: that must not change their exit code.
            signal.signal(number, signal.SIG_IGN if self.asked() else handler)

    def asked(self) -> bool:
        """Shall the run end?"""
        return self._came_at is not None or (self._parent is not None and os.getppid() != self._parent)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.in_loop:
            raise SystemExit(EXIT_CODE)
        if self._came_at is None:
            self._came_at = now
        elif now - self._came_at > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
