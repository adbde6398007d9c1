"""Run a training script unchanged, record when its optimizer steps end, and stop it after the last timed step.

    clock.py FILE TIMING SCRIPT [ARGUMENT ...]

TIMING is the JSON of `Timing`. Writes JSON to FILE: "first", when step 1 ended; "begin", when the warm-up ended;
"steps", how many steps were timed after that; "end", when the last of them ended. Times are Unix times in seconds.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class Timing:
    """Which steps of a script are timed.

    Args:
        warm_up: steps before the first timed one.
        warm_up_seconds: shortest time from the first step to the first timed one.
        steps: at most so many are timed.
        seconds: the first step that ends this long after the warm-up is the last.
    """

    warm_up: int
    steps: int
    seconds: float
    warm_up_seconds: float = 0.0


class Clock:
    """A hook after each optimizer step, of any optimizer.

    Args:
        on_end: called with the times after the last timed step.
        on_begin: called when the warm-up has ended.
        on_last: called after the last timed step, before waiting for the GPU.
    """

    def __init__(
        self,
        timing: Timing,
        on_end: Callable[[dict[str, float]], None],
        on_begin: Callable[[], None] | None = None,
        on_last: Callable[[], None] | None = None,
    ) -> None:
        self.timing, self.on_end, self.on_begin, self.on_last = timing, on_end, on_begin, on_last
        self.step, self.begin = 0, 0  # steps so far, and at the end of the warm-up
        self.times: dict[str, float] = {}

    def __call__(self, *_: Any) -> None:
        timing, times = self.timing, self.times
        self.step += 1
        if self.step == 1:
            times["first"] = now()
        if "begin" not in times:
            if self.step >= timing.warm_up and time.time() >= times["first"] + timing.warm_up_seconds:
                self.begin = self.step
                times["begin"] = now()
                if self.on_begin is not None:
                    self.on_begin()
        elif self.step == self.begin + timing.steps or time.time() > times["begin"] + timing.seconds:
            if self.on_last is not None:
                self.on_last()
            end = now()
            self.on_end(times | {"end": end, "steps": self.step - self.begin})
        if timing.steps == 0 and "begin" in times:
            self.on_end(times | {"end": times["begin"], "steps": 0})


def now() -> float:
    """Unix time, after waiting for the GPU. For recorded steps only: between them a script may run ahead of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


class Finished(BaseException):
    """Raised in a script after its last timed step. No Exception, which the script might handle."""


def run_script(
    script: Path,
    arguments: Sequence[object],
    timing: Timing,
    on_begin: Callable[[], None] | None = None,
    on_last: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The times of a script that runs in this process, and ends there after its last timed step."""
    result: dict[str, float] = {}

    def end(times: dict[str, float]) -> None:
        result.update(times)
        raise Finished

    handle = register_optimizer_step_post_hook(Clock(timing, end, on_begin, on_last))
    argv, path = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [str(script), *map(str, arguments)], str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Finished:
        return result
    except SystemExit as error:
        raise RuntimeError(f"{script.name} ended with code {error.code} before its last timed step") from error
    finally:
        handle.remove()
        sys.argv, sys.path[:] = argv, path
    raise RuntimeError(f"{script.name} ended before its last timed step")


def main() -> None:
    file, timing = Path(sys.argv[1]), Timing(**json.loads(sys.argv[2]))

    def end(times: dict[str, float]) -> None:
        file.write_text(json.dumps(times), encoding="utf-8")
        os._exit(0)  # skips the samples and checkpoints at the end of the script

    register_optimizer_step_post_hook(Clock(timing, end))
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
