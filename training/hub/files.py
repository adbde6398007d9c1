"""THE PUBLISHED FOLDER: the names of its files, and what they say about the model without loading it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.progress import quiet_libraries
from training.run.record import SCHEDULER_CONFIG, read_json

if TYPE_CHECKING:
    from ddpm_pipeline.calibrated import Table

ROOT = Path(__file__).resolve().parents[2]  # the checkout, with the card's template and the licence
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HALF_WEIGHTS = "unet/diffusion_pytorch_model.fp16.safetensors"
GUIDE_WEIGHTS = "guide/diffusion_pytorch_model.safetensors"
GUIDE_FILES = ("guide/config.json", GUIDE_WEIGHTS)  # if the model has a guide
HALF_GUIDE_WEIGHTS = "guide/diffusion_pytorch_model.fp16.safetensors"
REMOTE_CODE = "pipeline.py"
MODEL_FILES = ("model_index.json", REMOTE_CODE, SCHEDULER_CONFIG, "unet/config.json", WEIGHTS)
IMAGES = ("samples.png", "trajectory.png")
CARD = "README.md"
OTHERS = (CARD, "config.yaml", "report.json", "LICENSE")
PUBLISHED = (*MODEL_FILES, HALF_WEIGHTS, *GUIDE_FILES, HALF_GUIDE_WEIGHTS, *IMAGES, *OTHERS)  # and nothing else
FORMER_NAMES = {"walk.png": "trajectory.png"}  # of files in runs and repositories from earlier versions
PACKAGE = "ddpm_pipeline"  # in a Space
SPACE_FILES = ("app.py", "requirements.txt", CARD, "LICENSE")  # beside the package


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository on the Hub."""

    type: str  # as the Hub calls it
    content: str  # what we publish there
    option: str  # of publish.py, which names it
    marks: frozenset[str]  # files that tell a repository of ours from others
    names: frozenset[str]  # of files, and of folders with all in them, that a publication replaces

    def holds(self, name: str) -> bool:
        """Whether a publication replaces or deletes this file: others stay."""
        return name in self.names or name.split("/")[0] in self.names


MODEL = RepoKind(
    "model", "a published model", "hub_model_id", frozenset({"model_index.json", REMOTE_CODE}),
    frozenset({*PUBLISHED, *FORMER_NAMES}),
)  # fmt: skip
SPACE = RepoKind(
    "space", "a demo", "space", frozenset({"app.py", f"{PACKAGE}/__init__.py"}), frozenset({*SPACE_FILES, PACKAGE})
)


def list_files(folder: Path) -> list[str]:
    """The paths of all files in a folder, relative to it and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest(folder: Path) -> str:
    """sha256 of the names and contents of all files in a folder, hexadecimal."""
    total = hashlib.sha256()
    for name in list_files(folder):
        total.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def scheduler_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / SCHEDULER_CONFIG)


def calibrated_tables(folder: Path) -> list[dict[str, Any]]:
    """The tables of calibrated steps, see ddpm_pipeline/calibrated.py, as they are saved."""
    tables: list[dict[str, Any]] = (scheduler_config(folder).get("_calibration") or {}).get("tables", [])
    return tables


def tables_for_the_weights(folder: Path) -> tuple[list[Table], str | None]:
    """Those of `calibrated_tables` that are for the model in this folder, and why others are not; None: all are."""
    if not calibrated_tables(folder):
        return [], None
    from ddpm_pipeline import DDPMPipeline, DDPMScheduler  # import torch: not before it is needed
    from ddpm_pipeline.calibrated import fitted_tables

    quiet_libraries()
    pipe: Any = DDPMPipeline.from_pretrained(folder)
    if not isinstance(pipe.scheduler, DDPMScheduler):
        return [], f"they are for a DDPMScheduler, and it has a {type(pipe.scheduler).__name__}"
    return fitted_tables(pipe.scheduler, pipe.unet, pipe.guide)


def unet_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "unet" / "config.json")


def has_class_labels(unet: Mapping[str, Any]) -> bool:
    return unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None


def class_names(unet: Mapping[str, Any]) -> list[str] | None:
    """The names of classes 0, 1, ..., without the null class; None if they are not saved or there are no classes."""
    from ddpm_pipeline.labels import CLASS_NAMES  # imports torch: not before it is needed

    return unet.get(CLASS_NAMES)


def count_parameters(file: Path) -> int:
    """The number of parameters in a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118  not a dict
        return sum(math.prod(shape) for shape in shapes)


def has_current_code(folder: Path) -> bool:
    """Whether pipeline.py is that of this version of the package, not of another one or edited."""
    from ddpm_pipeline.saving import pipeline_source  # imports torch: not before it is needed

    return (folder / REMOTE_CODE).read_text(encoding="utf-8") == pipeline_source()


def built_in_limits(folder: Path) -> list[str]:
    """What diffusers' own classes get wrong with the model in this folder, one sentence each (tests/test_stock.py)."""
    scheduler, unet = scheduler_config(folder), unet_config(folder)
    variance, spacing = scheduler["variance_type"], scheduler["timestep_spacing"]
    instead = "load it in one of the other two ways."
    limits = []
    if has_class_labels(unet):
        limits.append(f"They do not support class labels and cannot sample this model: {instead}")
    if unet["in_channels"] > 4:
        limits.append(f'They cannot make PIL images with {unet["in_channels"]} channels: pass `output_type="np"`.')
    if variance == "fixed_large" and spacing != "leading":
        limits.append(
            "With fewer sampling steps than training timesteps they leave noise in the final image "
            f"(variance_type {variance}, timestep_spacing {spacing}): {instead}"
        )
    if variance in ("fixed_large_log", "learned"):
        limits.append(
            f"They use the logarithm of the variance as the variance (variance_type {variance}), and their samples "
            f"are non-finite: {instead}"
        )
    return limits


def is_hub_id(name: str) -> bool:
    """True for an id on the Hub, "user/name", unless a local folder has that path."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).is_dir()
