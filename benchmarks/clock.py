"""Run a training script as it is and note when its optimizer steps end; the script ends with the last one wanted.

    clock.py FILE WARM_UP STEPS SECONDS SCRIPT [ARGUMENT ...]

FILE gets JSON: when step 1 ended, when the last of WARM_UP steps did (time of day, in seconds), how many steps came
after that, and when the last one of these ended. They are STEPS, or fewer: the first to end after SECONDS is the last.
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
seen: dict[str, float] = {}
step = 0


def now() -> float:
    """A GPU is waited for, but only at the steps whose time is wanted: a script may run ahead of it between them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def after_step(*_: Any) -> None:
    global step
    step += 1
    if step == 1:
        seen["first"] = now()
    if step == WARM_UP:
        seen["begin"] = now()
    late = step > WARM_UP and time.time() > seen["begin"] + SECONDS
    if step == WARM_UP + STEPS or late:
        FILE.write_text(json.dumps(seen | {"end": now(), "steps": step - WARM_UP}), encoding="utf-8")
        os._exit(0)  # neither the samples nor the model that a script would go on to make are wanted


register_optimizer_step_post_hook(after_step)
sys.argv = sys.argv[5:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
