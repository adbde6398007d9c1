"""Samples with ours or with diffusers' DDPMPipeline, on request: a process of its own for each side.

    sampler.py SIDE FOLDER PRECISION BATCH STEPS THREADS

SIDE is `ours`, `ours_keeping_memory` or `peer`. For each line on its standard input, the name of a variant, it draws
BATCH images with STEPS sampling steps and prints the seconds that took. The first line that it prints says that it is
ready. Side by side in one process, what one side sets for its process would change the other's times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of the peer: diffusers cannot return the images of a bf16 network, since numpy has no bf16. Either autocast is around
# a float32 network, or the network is bf16 and the conversion at the end goes through float32. The faster one counts.
VARIANTS = {"no": ("float32",), "bf16": ("autocast", "weights")}


def make_sampler(
    side: str, folder: Path, precision: str, batch_size: int, steps: int, device: str = "cpu"
) -> Callable[[str], NDArray[np.float32]]:
    """A function of the variant that draws images, (B, H, W, C) in [0, 1]. Ours has one variant, ""."""
    variants = VARIANTS[precision] if side == "peer" else ("",)
    pipes: dict[str, Any] = {}
    for variant in variants:
        in_bf16 = precision == "bf16" and variant != "autocast"
        pipes[variant] = load_pipeline(side, folder).to(device, torch.bfloat16 if in_bf16 else torch.float32)
        pipes[variant].set_progress_bar_config(disable=True)

    def sample(variant: str) -> NDArray[np.float32]:
        pipe, generator = pipes[variant], torch.Generator().manual_seed(0)
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=variant == "autocast")
        with autocast, torch.no_grad(), patch.object(Tensor, "numpy", numpy_of_float):
            images: NDArray[np.float32] = pipe(
                batch_size=batch_size, generator=generator, num_inference_steps=steps, output_type="np"
            ).images
        return images

    return sample


def load_pipeline(side: str, folder: Path) -> Any:
    if side == "peer":
        from diffusers import DDPMPipeline as BuiltIn

        return BuiltIn.from_pretrained(str(folder))
    from ddpm_pipeline import DDPMPipeline

    if side == "ours_keeping_memory":  # as `python -m ddpm_pipeline` and our training do in their own process
        from ddpm_pipeline.cpu import keep_memory

        keep_memory()
    return DDPMPipeline.from_pretrained(str(folder))


PLAIN_NUMPY = Tensor.numpy


def numpy_of_float(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.numpy`, with bfloat16 converted to float32."""
    return PLAIN_NUMPY(tensor.float() if tensor.dtype == torch.bfloat16 else tensor, *args, **kwargs)


def main() -> None:
    side, folder, precision = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    batch_size, steps, threads = map(int, sys.argv[4:])
    torch.set_num_threads(threads)
    sample = make_sampler(side, folder, precision, batch_size, steps)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        images = sample(line.strip())
        seconds = time.perf_counter() - start
        assert images.shape[0] == batch_size and np.isfinite(images).all()
        print(seconds, images.mean(), flush=True)


if __name__ == "__main__":
    main()
