"""The networks that both sides train and sample with, and the floating-point operations of each as torch counts them.

`heads-of-8` is like the default network of diffusers' training script: its attention has heads of dimension 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.unets.unet_2d import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from training.denoiser import make_denoiser

SIDE = 32  # of the images, in pixels
HEADS_OF_8 = "heads-of-8"  # 6.5 M parameters; `small` in earlier results
LITERAL: dict[str, dict[str, Any]] = {
    HEADS_OF_8: {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
}


@dataclass(frozen=True)
class Network:
    """A network and how it is measured on a CPU.

    Args:
        name: one of training/denoiser.py, or of LITERAL.
        batch_size: of training.
        target: how many times as fast our training should be at equal settings.
        seconds: of training that are timed in one launch.
        sampling_batches: numbers of images sampled at once.
        sampling_steps: of each measurement, enough for about a second.
    """

    name: str
    batch_size: int
    target: float
    seconds: float
    sampling_batches: tuple[int, ...]
    sampling_steps: int


NETWORKS = (
    Network("tiny", 32, 1.3, 6, sampling_batches=(1, 16), sampling_steps=25),
    Network(HEADS_OF_8, 16, 1.3, 8, sampling_batches=(16,), sampling_steps=6),
    Network("ddpm-cifar10", 8, 1.2, 12, sampling_batches=(4,), sampling_steps=6),
)


def make_network(name: str, side: int = SIDE) -> UNet2DModel:
    return make_denoiser(LITERAL.get(name, name), height=side, width=side, in_channels=3)


@cache
def count_flop(name: str, side: int = SIDE, *, backward: bool = False) -> int:
    """Floating-point operations for one image: of the forward pass, or of forward and backward pass together.

    Of the plain network, whatever either side computes it with; what is computed twice counts once. As torch counts
    them: 2 for a multiplication and addition.
    """
    with torch.device("meta"):
        unet = UNet2DModel.from_config(make_network(name, side).config)
        x_t, t = torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
    for module in unet.modules():
        if isinstance(module, Attention):
            # Any other one may be a kernel that the counter does not know.
            module.set_processor(AttnProcessor())
    with FlopCounterMode(display=False) as counter:
        prediction = unet(x_t, t).sample
        if backward:
            prediction.sum().backward()
    return int(counter.get_total_flops())
