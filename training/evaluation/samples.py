"""The models of a run and the samples they draw, kept so that none is drawn twice: for training/evaluate.py."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.pixels import to_pixels
from training.run import checkpoint
from training.run.runtime import dtype

SHARD = 64  # samples in a file; a whole one is made or none


class Model(NamedTuple):
    """A pipeline, and what is known of how it was trained."""

    pipe: Any
    weights: str  # "EMA" or "raw"
    sha256: str
    walk: str  # sha256 of the scheduler's class and settings
    trained: dict[str, Any]  # what training.json holds, if there is one


class Setting(NamedTuple):
    """How samples are drawn."""

    num_inference_steps: int
    eta: float


def load_models(name: str, weights: list[str], revision: str | None = None) -> list[Model]:
    """The averaged weights of a model, and those of the last checkpoint beside it.

    Args:
        name: folder of a run, or of a saved pipeline, or a name on the Hub.
        weights: "ema", "raw"; a model that is no run has only the first.
    Raises:
        ValueError: there is no such model, or the last checkpoint is not of the step that the averaged weights are of.
    """
    run = Path(name)
    is_run = (run / "pipeline").is_dir()
    if run.is_dir() and not is_run and not (run / "model_index.json").is_file():
        raise ValueError(
            f"{run} has no pipeline/ and is no saved pipeline: give the folder of a run that has ended (to end one, "
            "resume it with --max_train_steps set to the step it has reached)"
        )
    folder = run / "pipeline" if is_run else run
    try:
        pipe: Any = DDPMPipeline.from_pretrained(str(folder), **({"revision": revision} if revision else {}))
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(
            f"there is no folder {name}, and no such model on the Hub: {str(error).splitlines()[0]}"
        ) from None
    record = folder / "training.json"
    trained = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else _digest(pipe.unet.state_dict())
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    words = json.dumps([type(pipe.scheduler).__name__, settings], sort_keys=True)
    walk = hashlib.sha256(words.encode()).hexdigest()
    models = [Model(pipe, "EMA", digest, walk, trained)]
    if "raw" in weights and is_run and trained:
        try:
            path, manifest = checkpoint.find(run, "latest")
        except checkpoint.CheckpointError as error:
            raise ValueError(f"there are no raw weights: {error}: give --weights ema") from None
        if manifest["step"] != trained["step"]:
            raise ValueError(
                f"{path} is of step {manifest['step']}, pipeline/ of step {trained['step']}: give --weights ema"
            )
        unet = type(pipe.unet).from_config(pipe.unet.config)
        unet.load_state_dict(load_file(path / checkpoint.WEIGHTS))
        digest = manifest["files"][checkpoint.WEIGHTS]["sha256"]
        models.append(Model(DDPMPipeline(unet.eval(), pipe.scheduler), "raw", digest, walk, trained))
    found = [model for model in models if model.weights.lower() in weights]
    if not found:
        raise ValueError(f"weights are {','.join(weights)}, but {name} is no run with checkpoints: give --weights ema")
    return found


def _digest(weights: dict[str, Tensor]) -> str:
    """Of weights whose file is not at hand."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return total.hexdigest()


class Shards:
    """The samples of one model and setting, in files of SHARD each, by whom and whenever they are made."""

    def __init__(self, folder: Path, model: Model, setting: Setting, seed: int, precision: str) -> None:
        steps, eta = setting
        name = f"{model.weights.lower()}-{model.sha256[:12]}-walk-{model.walk[:8]}"
        self.folder = folder / "samples" / f"{name}-steps{steps}-eta{eta:g}-seed{seed}-{precision}"
        self.seed = seed

    def missing(self, number: int) -> list[int]:
        return [k for k in range(-(-number // SHARD)) if not self._is_whole(k)]

    def save(self, k: int, pixels: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(k).with_suffix(f".tmp-{os.getpid()}")
        with open(temporary, "wb") as file:
            np.save(file, pixels)
        temporary.replace(self._file(k))

    def load(self, number: int) -> np.ndarray:
        """(number, C, H, W)."""
        return np.concatenate([np.load(self._file(k)) for k in range(-(-number // SHARD))])[:number]

    def _is_whole(self, k: int) -> bool:
        try:
            return len(np.load(self._file(k), mmap_mode="r")) == SHARD
        except (OSError, ValueError):  # missing, or damaged
            return False

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:05d}.npy"


def sample(
    model: Model,
    setting: Setting,
    shards: Shards,
    number: int,
    *,
    pixel_type: np.dtype[Any],
    batch_size: int,
    processes: Any,
) -> float:
    """Make the shards that are missing, each process its part; the seconds it took.

    Args:
        pixel_type: uint8 or uint16, of what is kept.
        batch_size: samples at once; which ones they are does not depend on it, but for rounding.
        processes: an Accelerator.
    """
    began = time.monotonic()
    missing = shards.missing(number)
    processes.wait_for_everyone()  # before one of them makes some
    mine = missing[processes.process_index :: processes.num_processes]
    device, computes_in = processes.device, dtype(processes)
    pipe = model.pipe.to(device)
    pipe.set_progress_bar_config(leave=False, position=1, disable=not processes.is_main_process)
    title = f"sampling, {model.weights}, {setting.num_inference_steps} steps, eta {setting.eta:g}"
    for k in tqdm(mine, title, unit=f" x {SHARD}", disable=not processes.is_main_process or not mine):
        seeds = list(range(shards.seed + k * SHARD, shards.seed + (k + 1) * SHARD))
        drawn = []
        with torch.autocast(device.type, computes_in, enabled=computes_in != torch.float32):
            for start in range(0, SHARD, batch_size):
                drawn += pipe(
                    seeds=seeds[start : start + batch_size],
                    num_inference_steps=setting.num_inference_steps,
                    eta=setting.eta,
                    output_type="latent",
                    return_dict=False,
                )
        shards.save(k, to_pixels(torch.cat(drawn), pixel_type))
    processes.wait_for_everyone()
    return time.monotonic() - began if missing else 0.0
