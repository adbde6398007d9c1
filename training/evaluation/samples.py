"""SAMPLES: the models of a run and their samples, which are saved in shards so that none is drawn twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.calibrated import Guidance, Table, find_table, why_not
from ddpm_pipeline.files import replacing, sha256_of
from ddpm_pipeline.pixels import to_pixels
from training.data.classes import Classes
from training.evaluation.guidance import AUTOGUIDANCE, CLASSIFIER_FREE
from training.progress import is_terminal, progress
from training.run import checkpoint
from training.run.record import RunRecord
from training.run.runtime import Runtime

SHARD_SIZE = 64  # samples per file
WEIGHTS_FILE = Path("unet", "diffusion_pytorch_model.safetensors")  # in the folder of a pipeline


class Model(NamedTuple):
    """A pipeline and its run record.

    Args:
        pipe: a DDPMPipeline, or anything that is called like one.
        weights: "EMA" or "online".
        sha256: of the file of weights.
        scheduler_hash: sha256 of the scheduler's class and configuration.
        record: how the model was trained; None if its folder has no training.json.
    """

    pipe: Any
    weights: str
    sha256: str
    scheduler_hash: str
    record: RunRecord | None


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn: the number of sampling steps, eta from 0 (DDIM) to 1 (DDPM), and guidance.

    Args:
        eta: None: the calibrated table of the model instead.
        guidance_scale: 1: no guidance.
        guidance_interval: timesteps that are guided; None: all.
        autoguidance: the scale is of autoguidance, not of classifier-free guidance.
    """

    num_inference_steps: int
    eta: float | None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    autoguidance: bool = False

    @property
    def guidance(self) -> dict[str, Any]:
        """Arguments of a call of the pipeline; empty without guidance."""
        if self.guidance_scale == 1:
            return {}
        interval = {} if self.guidance_interval is None else {"guidance_interval": self.guidance_interval}
        return {AUTOGUIDANCE if self.autoguidance else CLASSIFIER_FREE: self.guidance_scale, **interval}

    @property
    def guidance_text(self) -> str:
        """Such as ", guidance 2 at 100 <= t < 600"; empty without guidance."""
        at = " at {:g} <= t < {:g}".format(*self.guidance_interval) if self.guidance_interval else ""
        kind = "autoguidance" if self.autoguidance else "guidance"
        return f", {kind} {self.guidance_scale:g}{at}" if self.guidance else ""

    @property
    def eta_text(self) -> str:
        return "calibrated" if self.eta is None else f"eta {self.eta:g}"

    def __str__(self) -> str:
        return f"{self.num_inference_steps} steps, {self.eta_text}{self.guidance_text}"

    def table(self, model: Model) -> Table | None:
        """The calibrated table of a model for this number of steps and this guidance, if it was fitted to it."""
        scheduler = model.pipe.scheduler
        table = find_table(scheduler, self.num_inference_steps, Guidance(**self.guidance))
        return None if table is None or why_not(scheduler, model.pipe.unet, model.pipe.guide, table) else table


# ---- Models ----------------------------------------------------------------------------------------------------------


def load_models(name: str, weights: Sequence[str], revision: str | None = None) -> list[Model]:
    """The EMA weights of a model, and the online weights of the run's newest checkpoint.

    Args:
        name: folder of a run, folder of a saved pipeline, or a name on the Hub.
        weights: "ema", "online" or both. Only a run has online weights; of other models they are left out.
        revision: tag, branch or commit on the Hub.
    Raises:
        ValueError: there is no such model, it has none of these weights, or pipeline/ and the newest checkpoint are of
            different steps.
    """
    run = Path(name)
    is_run = (run / "pipeline").is_dir()
    if run.is_dir() and not is_run and not (run / "model_index.json").is_file():
        raise ValueError(
            f"{run} is neither a saved pipeline nor a finished run with pipeline/: give one of these (to finish a run, "
            "resume it with --max_train_steps set to the step that it has reached)"
        )
    ema = _load_ema(name, run / "pipeline" if is_run else run, revision)
    models = [ema] if "ema" in weights else []
    if "online" in weights and is_run and ema.record is not None:
        models.append(_load_online(run, ema, ema.record.step))
    if not models:
        raise ValueError(f"weights is {','.join(weights)}, but {name} has no checkpoints: give --weights ema")
    return models


def _load_ema(name: str, folder: Path, revision: str | None) -> Model:
    """The model in the folder of a pipeline; if there is no such folder, the one with that name on the Hub.

    Raises:
        ValueError: there is no such model, or a run replaced it while it was read.
    """
    file = folder / WEIGHTS_FILE
    sha256 = sha256_of(file) if file.is_file() else None
    try:
        pipe: Any = DDPMPipeline.from_pretrained(str(folder), **({"revision": revision} if revision else {}))
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(
            f"there is no folder {name} and no such model on the Hub: {str(error).splitlines()[0]}"
        ) from None
    record = RunRecord.load(folder)
    if sha256 is None:
        sha256 = _hash_weights(pipe.unet.state_dict())
    elif sha256_of(file) != sha256:
        raise ValueError(f"{folder} was replaced while it was read: run the same command again")
    return Model(pipe, "EMA", sha256, hash_scheduler(pipe.scheduler), record)


def _load_online(run: Path, ema: Model, step: int) -> Model:
    """The online weights of the newest checkpoint.

    Raises:
        ValueError: there is no checkpoint, or it is of another step than pipeline/.
    """
    try:
        path, manifest = checkpoint.find(run, "latest")
    except checkpoint.CheckpointError as error:
        raise ValueError(f"there are no online weights: {error}: give --weights ema") from None
    if manifest["step"] != step:
        raise ValueError(f"{path} is of step {manifest['step']}, pipeline/ of step {step}: give --weights ema")
    unet = type(ema.pipe.unet).from_config(ema.pipe.unet.config)
    unet.load_state_dict(load_file(path / checkpoint.WEIGHTS))
    pipe = DDPMPipeline(unet.eval(), ema.pipe.scheduler)
    pipe.guide = ema.pipe.guide
    return ema._replace(
        pipe=pipe,
        weights="online",
        sha256=manifest["files"][checkpoint.WEIGHTS]["sha256"],
    )


def hash_scheduler(scheduler: Any) -> str:
    """sha256 of its class and configuration, without tables of calibrated steps and other fields with a "_"."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps([type(scheduler).__name__, config], sort_keys=True).encode()).hexdigest()


def _hash_weights(weights: dict[str, Tensor]) -> str:
    """sha256 of weights whose file is not known: of a model on the Hub, or of a guide."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return sha256.hexdigest()


# ---- Samples ---------------------------------------------------------------------------------------------------------


class Shards:
    """The samples of one model and sampler, in files of SHARD_SIZE. A file is complete or missing.

    The name of the folder has everything that the samples depend on, except for their depth: a file with samples of
    another shape or dtype counts as missing.

    Args:
        pixel_dtype: of the saved samples, uint8 or uint16.
        classes: of the data, with the numbers of the model; None: the model has none.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        sampler: SamplerConfig,
        *,
        seed: int,
        precision: str,
        shape: tuple[int, ...],
        pixel_dtype: np.dtype[Any],
        classes: Classes | None = None,
    ) -> None:
        weights = f"{model.weights.lower()}-{model.sha256[:12]}-scheduler-{model.scheduler_hash[:8]}"
        if sampler.eta is None:
            eta = f"calibrated-{hashlib.sha256(repr(sampler.table(model)).encode()).hexdigest()[:8]}"
        else:
            eta = f"eta{sampler.eta:g}"
        settings = f"steps{sampler.num_inference_steps}-{eta}-seed{seed}-{precision}"
        if sampler.guidance:
            interval = "-{:g}-{:g}".format(*sampler.guidance_interval) if sampler.guidance_interval else ""
            guide = f"-auto-{_hash_weights(model.pipe.guide.state_dict())[:8]}" if sampler.autoguidance else ""
            settings += f"{guide}-guidance{sampler.guidance_scale:g}{interval}"
        if classes is not None:
            settings += f"-classes-{hashlib.sha256(repr(classes.counts).encode()).hexdigest()[:8]}"
        self.folder = folder / "samples" / f"{weights}-{settings}"
        self.seed, self.pixel_dtype, self._classes = seed, pixel_dtype, classes
        self._shape = (SHARD_SIZE, *shape)

    def missing(self, num_samples: int) -> list[int]:
        """Indices of the shards that are still missing for this many samples."""
        return [shard for shard in range(-(-num_samples // SHARD_SIZE)) if not self._is_complete(shard)]

    def save(self, shard: int, pixels: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(shard)) as path, open(path, "wb") as file:
            np.save(file, pixels)

    def load(self, num_samples: int) -> np.ndarray:
        """The first samples: (num_samples, C, H, W)."""
        shards = [np.load(self._path(shard)) for shard in range(-(-num_samples // SHARD_SIZE))]
        return np.concatenate(shards)[:num_samples]

    def labels(self, shard: int) -> list[int] | None:
        """The class of each sample, as often as in the data; None for a model without classes."""
        if self._classes is None:
            return None
        return self._classes.of_samples(np.arange(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE))

    def _is_complete(self, shard: int) -> bool:
        try:
            samples = np.load(self._path(shard), mmap_mode="r")
        except (OSError, ValueError):  # missing, or damaged
            return False
        return samples.shape == self._shape and samples.dtype == self.pixel_dtype

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"


def sample(
    model: Model,
    sampler: SamplerConfig,
    shards: Shards,
    num_samples: int,
    *,
    batch_size: int,
    runtime: Runtime,
) -> float:
    """Draw the missing shards, divided among the ranks. Returns the seconds that this took, 0 if none was missing.

    Args:
        batch_size: samples per forward pass; it changes the samples by rounding errors only.
    """
    started = time.monotonic()
    missing = shards.missing(num_samples)
    runtime.barrier()  # no rank may write before all have looked
    own = missing[runtime.rank :: runtime.world_size]
    pipe = model.pipe.to(runtime.device)
    pipe.set_progress_bar_config(leave=False, position=1, disable=not (runtime.is_main and is_terminal()))
    title = f"sampling, {model.weights}, {sampler}"
    for shard in progress(own, title, unit=f" x {SHARD_SIZE}", disable=not runtime.is_main or not own):
        first = shards.seed + shard * SHARD_SIZE
        seeds, labels = list(range(first, first + SHARD_SIZE)), shards.labels(shard)
        images = []
        with runtime.autocast():
            for start in range(0, SHARD_SIZE, batch_size):
                images += pipe(
                    seeds=seeds[start : start + batch_size],
                    **({} if labels is None else {"class_labels": labels[start : start + batch_size]}),
                    num_inference_steps=sampler.num_inference_steps,
                    **({"calibrated": True} if sampler.eta is None else {"eta": sampler.eta}),
                    **sampler.guidance,
                    output_type="latent",
                    return_dict=False,
                    callback_on_step_end=lambda *_: runtime.adapt_threads(),
                )
        shards.save(shard, to_pixels(torch.cat(images), shards.pixel_dtype))
    runtime.barrier()
    return time.monotonic() - started if missing else 0.0
