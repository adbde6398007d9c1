"""GRADIENTS: how the processes of a run average their gradients: DistributedDataParallel, with exact resuming.

While the backward pass goes on, DDP sends the gradients that are ready, in buckets. Where an element lies in its bucket
decides in which order more than two processes add it up, so a run has the same buckets in all its steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from accelerate import DistributedDataParallelKwargs

    from training.plan import ImageShape
    from training.run.runtime import Runtime


def ddp_settings() -> DistributedDataParallelKwargs:
    """What accelerate's `prepare` makes of a model. Gradients are views of the buckets: no second copy in memory."""
    from accelerate import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def compress(model: Any) -> None:
    """Let the processes send the gradients of a wrapped model in bf16, half as many bytes."""
    # A lambda: DDP compares annotations, which are strings here.
    model.register_comm_hook(distributed.get_world_size(), lambda size, bucket: _average_in_bf16(size, bucket))


def _average_in_bf16(world_size: int, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """sum_r bf16(g_r / world size) of the gradients g_r of all ranks r, with the 8 bits of bf16 in each addition.

    As torch's `bf16_compress_hook`, which refuses CPUs.
    """
    gradients = bucket.buffer()
    compressed = (gradients / world_size).to(torch.bfloat16)
    done = distributed.all_reduce(compressed, async_op=True).get_future()
    return done.then(lambda future: gradients.copy_(future.value()[0]))


def settle_buckets(
    model: torch.nn.Module, unet: Any, image_shape: ImageShape, batch_size: int, runtime: Runtime
) -> None:
    """Let DDP arrange its buckets before the first step, by a pass whose gradients are dropped.

    DDP arranges them anew after the first backward pass of a process, in the order in which gradients became ready.
    Without this, the first step of a resumed run adds up in another order than that step of an undisturbed run.

    Args:
        model: `unet`, wrapped.
        image_shape: (C, H, W).
        batch_size: of the passes to come, for which a compiled model is then ready.
    """
    from training.tune import random_inputs

    if runtime.world_size == 1:
        return
    x_t, t, labels = random_inputs(unet, image_shape, batch_size, runtime.device)
    model(x_t, t, class_labels=labels, return_dict=False)[0].sum().backward()
    unet.zero_grad()
