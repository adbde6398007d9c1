"""DENOISER: presets of diffusers' UNet2DModel, and its initial weights.

The U-net halves the resolution between neighbouring entries of `block_out_channels`: three entries, two halvings, so
height and width must be multiples of 4. `save_pretrained` writes a plain UNet2DModel, which diffusers loads by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.models.unets.unet_2d import UNet2DModel

if TYPE_CHECKING:
    from ddpm_pipeline import DDPMScheduler

PRESETS: dict[str, dict[str, Any]] = {
    # 1.8 M parameters, four resolutions, few channels at the high ones: trains in minutes on a CPU. Every group has 4
    # channels or more: with one channel per group GroupNorm removes the brightness of the image as a whole.
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
    # 35.7 M parameters, 37 GFLOP: Ho et al. 2020, appendix B, configured as google/ddpm-cifar10-32.
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
    """An untrained network in float32, on the CPU. Its weights are drawn from torch's global generator.

    Args:
        name: one of PRESETS.
        height, width: size of the images in pixels.
        in_channels: channels of the images.
        out_channels: channels of the prediction; None: in_channels.
        num_class_embeds: number of class labels to condition on; None: unconditional.
        dropout: probability in [0, 1); None: the preset's.
    Raises:
        ValueError: unknown name, a size that the network cannot halve often enough, or a number out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"denoiser is {name!r}: give one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    check_size(name, height, width)
    out_channels = in_channels if out_channels is None else out_channels
    for what, value in (
        ("in_channels", in_channels),
        ("out_channels", out_channels),
        ("num_class_embeds", 1 if num_class_embeds is None else num_class_embeds),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} is {value!r}: give an integer of at least 1")
    if dropout is not None and not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}: give a probability in [0, 1)")
    return UNet2DModel(
        **preset | ({} if dropout is None else {"dropout": float(dropout)}),
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        num_class_embeds=num_class_embeds,
    )


def check_size(name: str, height: int, width: int) -> None:
    """Raise ValueError if the network `name` cannot halve this size as often as it needs to."""
    multiple = 2 ** (len(PRESETS[name]["block_out_channels"]) - 1)
    for side, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % multiple:
            near = "x".join(str(max(1, round(size / multiple)) * multiple) for size in (height, width))
            raise ValueError(
                f"{side} is {value!r}: the denoiser {name!r} needs a positive multiple of {multiple}, such as "
                f"--resolution {near}"
            )


def load_initial_weights(name: str, unet: UNet2DModel, scheduler: DDPMScheduler, log: Callable[[str], object]) -> None:
    """Copy the weights of a saved or published model into `unet`.

    Args:
        name: folder of the model, or its name on the Hub.
        unet: a network of the same architecture.
        scheduler: the noise schedule to train with.
        log: called with what was loaded, and with a warning if the model was trained with another noise schedule.
    Raises:
        ValueError: it cannot be loaded; or its architecture, prediction type or number of diffusion timesteps differ.
            `unet` is unchanged.
    """
    from ddpm_pipeline import DDPMPipeline
    from ddpm_pipeline.decode import parse_colour
    from ddpm_pipeline.images import background_of

    try:
        pipe = DDPMPipeline.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    except OSError as error:
        raise ValueError(f"init_from is {name!r}: {error}") from error
    weights, target = pipe.unet.state_dict(), unet.state_dict()
    for tensor_name in [*target, *weights]:
        shapes = [tuple(state[tensor_name].shape) if tensor_name in state else None for state in (weights, target)]
        if shapes[0] != shapes[1]:
            preset = find_preset(pipe.unet.config)
            fix = f"--denoiser {preset}" if preset else "the denoiser that it was trained with"
            raise ValueError(
                f"init_from is {name!r}, which has another architecture: {tensor_name} has shape {shapes[0]} there and "
                f"{shapes[1]} here. Give {fix}, and images with {pipe.unet.config['in_channels']} channels"
            )
    for field, option in (("prediction_type", "prediction_type"), ("num_train_timesteps", "ddpm_num_steps")):
        trained_with, value = pipe.scheduler.config[field], scheduler.config[field]
        if trained_with != value:
            raise ValueError(
                f"init_from is {name!r}, which was trained with {option} {trained_with!r}, but now it is {value!r}: "
                f"give --{option} {trained_with}"
            )
    if not pipe.scheduler.alphas_cumprod.allclose(scheduler.alphas_cumprod):
        log(f"WARNING: {name} was trained with another noise schedule than this ddpm_beta_schedule")
    if parse_colour(background_of(pipe.unet)) != parse_colour(background_of(unet)):
        log(
            f"WARNING: {name} was trained with the background {background_of(pipe.unet)}, but now it is "
            f"{background_of(unet)} (--background)"
        )
    unet.load_state_dict(weights)
    log(f"initial weights: {name}")


def find_preset(config: Mapping[str, Any]) -> str | None:
    """The preset that a UNet2DModel with this configuration was made from, or None."""
    fields = ("block_out_channels", "down_block_types", "up_block_types")
    for name, preset in PRESETS.items():
        if all(tuple(config[field]) == preset[field] for field in fields):
            return name
    return None
