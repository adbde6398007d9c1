"""PROGRESS: a bar on a terminal; elsewhere, such as in a log file, at most a line a minute."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

INTERVAL = 60.0  # seconds between two lines


def progress(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: int | None = None,
    *,
    unit: str = "it",
    disable: bool = False,
    leave: bool = True,
    initial: int = 0,
) -> Any:
    """A tqdm over `iterable`, or one to `update()`; each argument means what it means there.

    Where standard error is not a terminal, what takes longer than a minute prints a line a minute and one at the end.
    What knows better than the mean speed how long it takes sets `seconds_left` of the bar.
    """
    kind = Bar if is_terminal() else Lines
    return kind(iterable, desc and f"{desc}: ", total, unit=unit, disable=disable, leave=leave, initial=initial)


def is_terminal() -> bool:
    """Whether standard error is a terminal, where a bar can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def quiet_libraries() -> None:
    """Without a terminal, turn off the bars of libraries too, for downloads and for the parts of a model."""
    if is_terminal():
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets, imported late, reads it then
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bar()
    disable_progress_bars()


class Bar(tqdm):
    """A tqdm whose time left can be set."""

    seconds_left: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        if self.seconds_left is None:
            return values
        given = self.bar_format or "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        left = tqdm.format_interval(self.seconds_left)
        return values | {"bar_format": given.replace("{remaining}", "{left}"), "left": left}


class Lines(Bar):
    """A tqdm that prints lines: no bar, no carriage returns and no movements of the cursor."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, mininterval=INTERVAL, delay=INTERVAL, **options)
        counts = "{n_fmt}/{total_fmt}{unit}, {percentage:.0f}%" if self.total else "{n_fmt}{unit}"
        self.bar_format = "{desc}" + counts + " [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        self._printed_at = getattr(self, "start_t", 0.0)  # a disabled tqdm has no start

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called whenever a bar would be redrawn."""
        if self._time() - self._printed_at >= INTERVAL:
            self._print()

    def close(self) -> None:
        if not getattr(self, "disable", True):
            if self._time() - self.start_t >= INTERVAL:
                self._print()
            self.delay = math.inf  # tqdm leaves a bar alone that was never shown
        super().close()

    def _print(self) -> None:
        self._printed_at = self._time()
        self.fp.write(f"{self}\n")
        self.fp.flush()
