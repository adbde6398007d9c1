"""FAILURES: a checkpoint of another run, a non-finite loss or gradient, too little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddpm_pipeline.decode import parse_colour
from ddpm_pipeline.pixels import height_width
from training.config import FIRST_OPTIMIZER
from training.messages import some
from training.run.checkpoint import CheckpointError
from training.run.record import data_set

if TYPE_CHECKING:
    from training.config import Config
    from training.data.batches import Batches
    from training.data.image_set import ImageSet
    from training.plan import Passes


class OutOfMemoryError(RuntimeError):
    """The message says which options need less memory."""


class ForwardPass(NamedTuple):
    """One micro-batch of this rank: indices in the global batch (B,), prediction and target (B, C, H, W)."""

    indices: Tensor
    prediction: Tensor
    target: Tensor


def check_same_run(
    path: Path,
    manifest: dict[str, Any],
    config: Config,
    global_batch: int,
    num_images: int,
    source: str,
    data_digest: str | None = None,
    labels_digest: str | None = None,
) -> None:
    """Raise CheckpointError if a checkpoint has another network, diffusion process or optimizer, another seed, global
    batch or other data.

    Images with the same digest are the same, whatever the name of their folder is now.
    """
    names = [
        "denoiser", "seed", "random_flip", "random_vertical_flip", "random_rotate90", "ddpm_num_steps",
        "ddpm_beta_schedule", "prediction_type", "background", "center_crop", "class_conditional", "dropout",
        "optimizer", "init_from",
    ]  # fmt: skip
    if config.class_conditional:
        names += ["label_dropout", "balance_classes"]
    digest_before = manifest.get("data_digest")  # older checkpoints have none
    if digest_before is None:
        names.append("resolution")
    # A checkpoint that is older than a setting was trained as its default says, but for that of the optimizer.
    before = {name: getattr(type(config), name) for name in (*names, "variance_type")}
    before |= {"optimizer": FIRST_OPTIMIZER} | manifest["config"]
    compared = [(name, before[name], getattr(config, name)) for name in names]
    compared.append(("global batch", manifest["global_batch"], global_batch))
    compared.append(("number of images", manifest["num_images"], num_images))
    variances = before["variance_type"], config.variance_type
    if "learned_range" in variances:  # then the network has channels for it
        compared.append(("variance_type", *variances))
    if digest_before is None or data_digest is None or digest_before != data_digest:
        compared.append(("data set", data_set(manifest["source"]), data_set(source)))
        if digest_before is not None and data_digest is not None:  # a data set may have the same name
            compared.append(("images with sha256", digest_before[:12], data_digest[:12]))
    if labels_digest is not None and (labels_before := manifest.get("labels_digest")) is not None:
        compared.append(("labels with sha256", labels_before[:12], labels_digest[:12]))
    for name, trained, now in compared:
        if _meaning(name, trained) != _meaning(name, now):
            back = f" (--global_batch_size {trained})" if name == "global batch" else ""
            steps = before.get("validation_steps")
            if name == "number of images" and (steps == 0) != (config.validation_steps == 0):  # with 0 none is held out
                back = f" (--validation_steps {'null' if steps is None else steps})"
            raise CheckpointError(
                f"{path} was trained with {name} {trained!r}, but now it is {now!r}: change it back{back}, or start a "
                "new run in another output_dir"
            )


def _meaning(setting: str, value: Any) -> Any:
    """white is #fff, and a resolution of 32 is 32x32."""
    if setting == "background":
        return parse_colour(value)
    return height_width(value) if setting == "resolution" and value is not None else value


@contextmanager
def explain_out_of_memory(config: Config, passes: Passes, step: int, saved: int) -> Iterator[None]:
    """Turn running out of memory in this context into OutOfMemoryError, which suggests settings that need less.

    Args:
        step: the optimizer step in progress.
        saved: the step of the newest checkpoint; 0: there is none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch_size, accumulation = passes.batch_size, passes.number
        divisor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)
        if divisor is None:
            advice = "train_batch_size is 1 already: use a smaller resolution or denoiser"
        else:
            advice = (
                f"use {flags_of_passes(config, batch_size // divisor, accumulation * divisor)}, which needs less and "
                "keeps the global batch"
            )
        raise OutOfMemoryError(f"Out of memory at step {step}: {advice}. {describe_saved(saved)}") from error


def flags_of_passes(config: Config, batch_size: int, number: int) -> str:
    """The flags for so many forward passes of so many images on each rank."""
    accumulation = "" if config.global_batch_size else f" --gradient_accumulation_steps {number}"
    return f"--train_batch_size {batch_size}{accumulation}"


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU torch has its own exception; on a CPU its allocator raises a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def suspect_images(passes: list[ForwardPass], batches: Batches, step: int) -> list[int]:
    """Indices into the data set: this rank's images with a non-finite squared error, or all of them if it has none.

    Args:
        passes: of this rank, in the failing step.
        step: optimizer steps done before this one.
    """
    nonfinite = [
        index[~(prediction.float() - target).square().flatten(1).mean(1).isfinite().cpu()]
        for index, prediction, target in passes
    ]
    suspects = torch.cat(nonfinite) if sum(map(len, nonfinite)) else torch.cat([index for index, _, _ in passes])
    return [int(i) for i in batches.indices(step, suspects)]


def describe_images(indices: Iterable[int], data: ImageSet) -> str:
    """Index and name of the images, sorted and without repeats: "12 (cat/3.png), 40 (dog/7.png)"."""
    return some([f"{i} ({data.name(i)})" for i in sorted(set(indices))])


def describe_nonfinite(step: int, loss: float, grad_norm: float, learning_rate: float, images: str) -> str:
    """What is non-finite at `step`. `loss` is of this rank, `grad_norm` of all; `images` is from `describe_images`."""
    quantity = "gradient" if math.isfinite(loss) else "loss"
    return (
        f"{quantity} is non-finite at step {step} (loss {loss:g}, gradient norm {grad_norm:g}, learning "
        f"rate {learning_rate:g}): images {images}"
    )


def describe_saved(saved: int) -> str:
    """Whether there is a checkpoint to resume from; `saved` is the step of the newest one, 0 if there is none."""
    return f"The checkpoint after step {saved} is intact." if saved else "There is no checkpoint yet."
