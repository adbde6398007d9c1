"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from training.hub.card import built_in_limits
from training.hub.stage import ROOT, _read

TOLERANCE = 1e-5  # between the ways to load, of pictures in [0, 1]


class LoadingError(RuntimeError):
    """The staged folder does not load, or not to the same pictures in every way."""


# Each way in a process of its own: without the package, it cannot be imported there.
LOAD = """
import sys
way, folder, package, out, steps, labels = sys.argv[1:]
if way == "package":
    sys.path.insert(0, package)
else:
    sys.modules["ddpm_pipeline"] = None
import diffusers, torch
from safetensors.torch import save_file
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
if way == "package":
    from ddpm_pipeline import DDPMPipeline
    pipe = DDPMPipeline.from_pretrained(folder)
else:
    more = {"custom_pipeline": "pipeline", "trust_remote_code": True} if way == "remote code" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **more)
pipe.set_progress_bar_config(disable=True)
more = {"class_labels": [int(label) for label in labels.split()]} if labels else {}
generator = torch.Generator().manual_seed(0)
images = pipe(2, generator, num_inference_steps=int(steps), output_type="np", **more).images
save_file({"images": torch.from_numpy(images).contiguous()}, out)
"""


def check_loading(folder: Path) -> dict[str, float]:
    """Load a staged folder in the three ways, each in a fresh process, and draw two pictures from one seed.

    Returns:
        For each pair of ways, the largest difference of their pictures, in [0, 1].
    Raises:
        LoadingError: one does not load, or they differ by more than TOLERANCE. That the built-in classes differ is no
            error where they are known to be wrong (built_in_limits).
    """
    unet = _read(folder / "unet" / "config.json")
    labels = ""
    if unet.get("num_class_embeds") is not None:
        labels = f"0 {unet['num_class_embeds'] - 1}"
    steps = min(10, _read(folder / "scheduler" / "scheduler_config.json")["num_train_timesteps"])
    ways = ["package", "remote code"] + (["built-in"] if not labels else [])
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        children = {}
        for way in ways:
            out = Path(scratch) / f"{way}.safetensors"
            command = [sys.executable, "-c", LOAD, way, str(folder), str(ROOT), str(out), str(steps), labels]
            children[way] = (
                out,
                subprocess.Popen(command, env=environment, cwd=scratch, text=True, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE),
            )  # fmt: skip
        images = {}
        try:
            for way, (out, child) in children.items():
                _, errors = child.communicate()
                if child.returncode:
                    last = (errors.strip().splitlines() or ["no message"])[-1]
                    raise LoadingError(f"the folder does not load with the {way}: {last}")
                images[way] = load_file(out)["images"]
        finally:
            for _, child in children.values():
                child.kill()
    faithful = not built_in_limits(folder)
    differences = {}
    for one, other in (("package", "remote code"), ("package", "built-in")):
        if other in images:
            differences[f"{one}, {other}"] = (images[one] - images[other]).abs().max().item()
            required = faithful or other != "built-in"
            if required and not differences[f"{one}, {other}"] <= TOLERANCE:  # a NaN is no agreement either
                raise LoadingError(
                    f"loaded with the {one} and with the {other} it draws other pictures from one seed: they differ by "
                    f"{differences[f'{one}, {other}']:g}, where {TOLERANCE:g} is allowed. Nothing was sent"
                )
    return differences


def told(differences: Mapping[str, float]) -> str:
    """The differences of check_loading in words, in steps of 8-bit pixels."""
    return "; ".join(f"{pair}: pictures differ by {255 * number:.2g} of 255" for pair, number in differences.items())
