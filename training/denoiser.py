"""The network eps_theta(x_t, t): diffusers' UNet2DModel with settings by name, and the way it does attention.

A U-net halves the picture once between each two neighbours in `block_out_channels`, and doubles it as often on the way
back: three entries, two halvings, so height and width must be multiples of 4. What `save_pretrained` writes is a plain
UNet2DModel, which loads wherever diffusers is.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

PRESETS: dict[str, dict[str, Any]] = {
    # 1.8 M parameters, four sizes of the picture, thin where it is large: minutes on a CPU. Groups of 4 channels and
    # more, since in a group of one channel GroupNorm takes away how bright the picture is as a whole.
    "tiny": {
        "block_out_channels": (16, 32, 64, 96),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 32,
    },
    # 6.5 M parameters, 9 GFLOP.
    "small": {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # 35.7 M parameters, 37 GFLOP: Ho et al. 2020, appendix B, with the settings of google/ddpm-cifar10-32.
    "ddpm-cifar10": {
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
        "attention_head_dim": None,  # one head
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}


def make_denoiser(
    name: str,
    *,
    height: int,
    width: int,
    in_channels: int,
    out_channels: int | None = None,
    num_class_embeds: int | None = None,
    dropout: float | None = None,
) -> UNet2DModel:
    """An untrained network in float32, on the CPU, its weights drawn from torch's global generator.

    Args:
        name: one of PRESETS.
        height, width: of the images, in pixels.
        in_channels: of the images.
        out_channels: of the output; None: as many as go in.
        num_class_embeds: how many class labels the network is told; None: it is told none.
        dropout: probability in [0, 1); None: the preset's.
    Raises:
        ValueError: unknown name, a size that cannot be halved as often as this network does, or a number out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"the network is {name!r}: give one of {', '.join(PRESETS)}")
    settings = PRESETS[name]
    check_size(name, height, width)
    out_channels = in_channels if out_channels is None else out_channels
    for what, value in (
        ("in_channels", in_channels),
        ("out_channels", out_channels),
        ("num_class_embeds", 1 if num_class_embeds is None else num_class_embeds),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} is {value!r}: give an int of at least 1")
    if dropout is not None and not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}: give a probability, at least 0 and below 1")
    return UNet2DModel(
        **settings | ({} if dropout is None else {"dropout": float(dropout)}),
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        num_class_embeds=num_class_embeds,
    )


def check_size(name: str, height: int, width: int) -> None:
    """Raise ValueError if pictures of this size cannot be halved as often as the network `name` halves them."""
    multiple = 2 ** (len(PRESETS[name]["block_out_channels"]) - 1)
    for side, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % multiple:
            near = "x".join(str(max(1, round(size / multiple)) * multiple) for size in (height, width))
            raise ValueError(
                f"{side} is {value!r}: {name} halves it, so give a positive multiple of {multiple}, such as "
                f"--resolution {near}"
            )


def choose_attention(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Set the way attention is computed that is the fast one there; the result is the same up to rounding.

    In bfloat16 on the CPU, softmax(q k^T / sqrt(d)) v as two matrix products; elsewhere the fused kernel, which in
    float32 on the CPU is the faster one. Not a part of the model's configuration: nothing of it is saved.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: what the network computes in, as set by autocast.
    """
    plain = device_type == "cpu" and dtype == torch.bfloat16
    processor: Any = AttnProcessor() if plain else AttnProcessor2_0()
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
