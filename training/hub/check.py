"""THE LOADING CHECK: a staged folder loads in the three ways and gives the same images.

load_once.py has a process for each way. Only the first of these can import ddpm_pipeline.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from ddpm_pipeline import kernels
from training.hub.files import (
    built_in_limits,
    calibrated_tables,
    class_names,
    has_class_labels,
    scheduler_config,
    unet_config,
)
from training.hub.load_once import WAYS

SCRIPT = Path(__file__).with_name("load_once.py")
START = "start.txt"  # what load_once.py prints before it begins with a way
TOLERANCE = 1e-5  # between images in [0, 1]
NAMES = {"package": "the package", "remote-code": "remote code", "built-in": "the built-in classes"}


class LoadingError(RuntimeError):
    """The staged folder does not load in one of the three ways, or gives other images there."""


def check_loading(folder: Path) -> dict[str, float]:
    """Load a staged folder in the three ways, in fresh processes, and sample two images with one seed.

    Returns:
        For remote code and for the built-in classes, the largest difference from the images of the package, in [0, 1].
    Raises:
        LoadingError: the folder does not load, or the images differ by more than TOLERANCE. The built-in classes may
            differ where they are known to be wrong (built_in_limits).
    """
    images = _sample(folder)
    built_in_is_right = not built_in_limits(folder)
    differences = {}
    for way in [way for way in WAYS if way in images and way != "package"]:
        compared = images["package"] if way != "built-in" else ["images"]  # which have no guide
        if missing := [name for name in compared if name not in images[way]]:
            raise LoadingError(f"there are no {missing[0]} with {NAMES[way]}. Nothing was sent")
        difference = max(abs(images["package"][name] - images[way][name]).max().item() for name in compared)
        must_agree = way != "built-in" or built_in_is_right
        if must_agree and not difference <= TOLERANCE:  # a NaN does not agree either
            raise LoadingError(
                f"the same seed gives other images with {NAMES[way]} than with {NAMES['package']}: they differ by "
                f"{difference:g}, at most {TOLERANCE:g} is allowed. Nothing was sent"
            )
        differences[way] = difference
    return differences


def describe_differences(differences: Mapping[str, float]) -> str:
    """The result of check_loading as one line for the log."""
    described = (f"{NAMES[way]} {255 * difference:.2g} of 255" for way, difference in differences.items())
    return "Loading check, largest difference from the package with the same seed: " + "; ".join(described)


def _sample(folder: Path) -> dict[str, dict[str, Any]]:
    """For each way to load, two images in a numpy array, and two others with the guide of the model, if it has one."""
    unet = unet_config(folder)
    scheduler = scheduler_config(folder)
    calibrated = [len(table["timesteps"]) for table in calibrated_tables(folder)]
    steps = [n for n in range(1, min(10, scheduler["num_train_timesteps"]) + 1) if n not in calibrated]
    options = ["--steps", str(max(steps, default=1))]  # the built-in classes have no calibrated steps
    if unet.get("num_class_embeds") is not None:  # the first class by its name, if it has one, and the last
        names = class_names(unet)
        options += ["--class_labels", json.dumps([names[0] if names else 0, unet["num_class_embeds"] - 1])]
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {kernels.VARIABLE: "0"}  # only the package has them, and they round otherwise
        ways = [way for way in WAYS if way != "built-in" or not has_class_labels(unet)]  # it does not support them
        together = [ways] if sys.platform == "linux" else [[way] for way in ways]  # as load_once.py can
        with open(Path(scratch) / START, "w") as start:
            children = [
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), str(folder), scratch, *some, *options],
                    env=environment, cwd=scratch, stdout=start, stderr=start, start_new_session=True,
                )
                for some in together
            ]  # fmt: skip
        try:
            for child in children:
                child.wait()
        finally:
            for child in children:
                _kill(child)
        return {way: _images_of(way, Path(scratch)) for way in ways}


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """With what it has forked."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()


def _images_of(way: str, scratch: Path) -> dict[str, Any]:
    file = scratch / f"{way}.safetensors"
    if file.exists():
        return load_file(file)
    logs = [
        path.read_text(errors="replace").strip() for path in (scratch / f"{way}.txt", scratch / START) if path.exists()
    ]
    message = next((log.splitlines()[-1] for log in logs if log), "no message")
    raise LoadingError(f"the folder does not load with {NAMES[way]}: {message}. Nothing was sent")
