"""When things go wrong: a checkpoint of another run, a number that is none, too little memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.run.checkpoint import CheckpointError


class OutOfMemoryError(RuntimeError):
    """The message says which settings need less."""


def check_same_run(
    path: Path, manifest: dict[str, Any], config: Config, global_batch: int, num_images: int, source: str
) -> None:
    """Raise CheckpointError if a checkpoint has another network, walk, seed, global batch or other pictures."""
    then = manifest["config"]
    names = ("denoiser", "seed", "random_flip", "ddpm_num_steps", "ddpm_beta_schedule", "prediction_type")
    compared = [(name, then[name], getattr(config, name)) for name in names]
    compared.append(("a global batch of", manifest["global_batch"], global_batch))
    compared.append(("the number of pictures", manifest["num_images"], num_images))
    compared.append(("the pictures", manifest["source"], source))
    for what, before, now in compared:
        if before != now:
            raise CheckpointError(
                f"{path} was trained with {what} {before!r}, now it is {now!r}: set it back, or give the other "
                "run an output_dir of its own"
            )


@contextmanager
def memory_explained(config: Config, step: int, saved: int) -> Iterator[None]:
    """Too little memory within becomes OutOfMemoryError, which says what needs less and changes nothing of the run."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size, passes = config.train_batch_size, config.gradient_accumulation_steps
        factor = next((n for n in range(2, size + 1) if size % n == 0), None)
        less = "train_batch_size is 1 already: give a smaller resolution or denoiser"
        if factor:
            less = (
                f"--train_batch_size {size // factor} --gradient_accumulation_steps {passes * factor} needs less and "
                "keeps the global batch"
            )
        raise OutOfMemoryError(f"there is not enough memory for step {step}: {less}. {last(saved)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU; on a CPU a RuntimeError of its allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def suspects(shown: list[tuple[Tensor, Tensor, Tensor]], batches: Any, step: int) -> list[int]:
    """Which pictures of this process have an error that is not finite; all, if it is in the gradient alone.

    Args:
        shown: places in the global batch, predictions and targets, of each forward pass of this process.
    """
    bad = [place[~(out.float() - target).square().flatten(1).mean(1).isfinite().cpu()] for place, out, target in shown]
    chosen = torch.cat(bad) if sum(map(len, bad)) else torch.cat([place for place, _, _ in shown])
    return [int(i) for i in batches.indices(step, chosen)]


def named(accelerator: Any, mine: list[int], data: Any) -> str:
    """Number and name of the pictures that the processes suspect."""
    from accelerate.utils import gather_object

    indices = set(gather_object(mine) if accelerator.num_processes > 1 else mine)
    return ", ".join(f"{i} ({data.name(i)})" for i in sorted(indices))


def last(saved: int) -> str:
    return f"The checkpoint after step {saved} is whole." if saved else "There is no checkpoint yet."


def part() -> None:
    """Leave the other processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads need Python's lock to let go of their last tensors, and this thread has it while it waits for
        # them to end: without a pause one run in twenty hangs here for ever.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
