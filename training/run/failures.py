"""FAILURES: a checkpoint of another run, non-finite losses and gradients, too little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.run.checkpoint import CheckpointError


class OutOfMemoryError(RuntimeError):
    """The message says which options need less memory."""


def check_same_run(
    path: Path, manifest: dict[str, Any], config: Config, global_batch: int, num_images: int, source: str
) -> None:
    """Raise CheckpointError if a checkpoint has another network, diffusion process, seed, global batch or data set."""
    names = ("denoiser", "seed", "random_flip", "ddpm_num_steps", "ddpm_beta_schedule", "prediction_type")
    compared = [(name, manifest["config"][name], getattr(config, name)) for name in names]
    compared.append(("global batch", manifest["global_batch"], global_batch))
    compared.append(("number of images", manifest["num_images"], num_images))
    # After the first ";" come notes, and their wording changes between versions.
    compared.append(("data set", manifest["source"].partition(";")[0], source.partition(";")[0]))
    for name, before, now in compared:
        if before != now:
            raise CheckpointError(
                f"{path} was trained with {name} {before!r}, but now it is {now!r}: change it back, or start a new run "
                "in another output_dir"
            )


@contextmanager
def explain_out_of_memory(config: Config, step: int, saved: int) -> Iterator[None]:
    """Running out of memory inside becomes OutOfMemoryError, which names smaller settings. The run is left as it is.

    Args:
        step: the optimizer step in progress.
        saved: the step of the newest checkpoint; 0: there is none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
        divisor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)
        if divisor is None:
            advice = "train_batch_size is 1 already, so use a smaller resolution or denoiser"
        else:
            advice = (
                f"--train_batch_size {batch_size // divisor} --gradient_accumulation_steps {accumulation * divisor} "
                "needs less and keeps the global batch"
            )
        raise OutOfMemoryError(f"Out of memory at step {step}: {advice}. {describe_saved(saved)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; on a CPU a RuntimeError of its allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def suspect_images(passes: list[tuple[Tensor, Tensor, Tensor]], batches: Any, step: int) -> list[int]:
    """Images of this rank with a non-finite squared error; all of its images if only the gradient is non-finite.

    Args:
        passes: for each forward pass the indices in the global batch, the prediction and the target.
        batches: maps indices in the global batch to images, as training/data/batches.py does.
        step: optimizer steps done before this one.
    Returns:
        Indices into the data set.
    """
    nonfinite = [
        index[~(prediction.float() - target).square().flatten(1).mean(1).isfinite().cpu()]
        for index, prediction, target in passes
    ]
    suspects = torch.cat(nonfinite) if sum(map(len, nonfinite)) else torch.cat([index for index, _, _ in passes])
    return [int(i) for i in batches.indices(step, suspects)]


def describe_images(indices: Iterable[int], data: Any) -> str:
    """Index and name of each image, once: "12 (cat/3.png), 40 (dog/7.png)"."""
    return ", ".join(f"{i} ({data.name(i)})" for i in sorted(set(indices)))


def describe_nonfinite(step: int, loss: float, grad_norm: float, learning_rate: float, images: str) -> str:
    """What is non-finite at `step`. `loss` is that of this rank, `grad_norm` of all; `images` as `describe_images`."""
    quantity = "gradient" if math.isfinite(loss) else "loss"
    return (
        f"{quantity} is non-finite at step {step} (loss {loss:g}, gradient norm {grad_norm:g}, learning "
        f"rate {learning_rate:g}): images {images}"
    )


def describe_saved(saved: int) -> str:
    """Which checkpoint to resume from, if any: the one after step `saved`."""
    return f"The checkpoint after step {saved} is intact." if saved else "There is no checkpoint yet."
