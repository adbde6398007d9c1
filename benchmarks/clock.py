"""Run a training script unchanged, record when its optimizer steps end, and exit after the last timed step.

    clock.py FILE WARM_UP STEPS SECONDS SCRIPT [ARGUMENT ...]

Writes JSON to FILE: "first", when step 1 ended; "begin", when step WARM_UP ended; "steps", how many steps were timed
after that; "end", when the last of them ended. Times are Unix times in seconds. At most STEPS are timed; the first step
that ends more than SECONDS after "begin" is the last.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

FILE, WARM_UP, STEPS, SECONDS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
times: dict[str, float] = {}
step = 0


def now() -> float:
    """Unix time, after waiting for the GPU. For recorded steps only: between them a script may run ahead of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def after_step(*_: Any) -> None:
    global step
    step += 1
    if step == 1:
        times["first"] = now()
    if step == WARM_UP:
        times["begin"] = now()
    late = step > WARM_UP and time.time() > times["begin"] + SECONDS
    if step == WARM_UP + STEPS or late:
        FILE.write_text(json.dumps(times | {"end": now(), "steps": step - WARM_UP}), encoding="utf-8")
        os._exit(0)  # skips the samples and checkpoints at the end of the script


register_optimizer_step_post_hook(after_step)
sys.argv = sys.argv[5:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
