"""DENOISER: diffusers' UNet2DModel for images of any size, and its initial weights.

`tiny`, `small`, `base` and `large` are families: a rule makes the network from the size of the images. The U-net halves
an image between its levels until the shorter side is 4, 5 or 6 pixels, so an image of twice the size has one level
more, a narrow one at the top, and costs about twice as much instead of four times. `save_pretrained` writes a plain
UNet2DModel, which diffusers loads by itself.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.models.unets.unet_2d import UNet2DModel

from training.data.sizes import Rule, halvings, nearest_size
from training.messages import some

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_pipeline import DDPMScheduler

HEAD_CHANNELS = 64  # of an attention head, as Dhariwal and Nichol 2021 found best
ATTENTION_PIXELS = 16 * 16  # a level with more has no attention, whose cost grows with the square of their number
TIME_LEVEL = 3  # the time embedding has 4 times the channels of this one of `Family.widths`, at every size
MIN_GROUP_CHANNELS = 4  # with one channel per group, GroupNorm removes the brightness of the image as a whole
EXAMPLE = "google/ddpm-celebahq-256"  # a UNet2DModel on the Hub


@dataclass(frozen=True)
class Family:
    """Networks for images of all sizes.

    Args:
        widths: channels of the levels, from the lowest resolution up: for square images those with sides of 4, 8, 16,
            32, 64, 128 and 256 pixels. Levels above have the last width.
        layers_per_block: residual blocks of a level on the way down; on the way up there is one more.
    """

    widths: tuple[int, ...]
    layers_per_block: int


# The widths fall as the resolution rises such that each doubling of the side doubles the operations: docs/training.md
# has them. Most are multiples of 32, as the vectors of processors are; on a CPU a width of 12 takes as long as 16.
FAMILIES = {
    "tiny": Family((112, 64, 32, 16, 16, 16, 8), layers_per_block=1),
    "small": Family((192, 128, 128, 96, 64, 32, 32), layers_per_block=1),
    "base": Family((256, 256, 256, 128, 96, 64, 48), layers_per_block=2),
    "large": Family((448, 448, 384, 256, 192, 128, 96), layers_per_block=2),
}

PRESETS: dict[str, dict[str, Any]] = {
    # 35.7 M parameters, 12.5 GFLOP: Ho et al. 2020, appendix B, configured as google/ddpm-cifar10-32.
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

# What these names meant before the families. Only for checkpoints of that time, which do not hold their network.
FORMER: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (16, 32, 64, 96),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 32,
    },
    "small": {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}

CLASSES = "class_embedding.weight"  # (classes, time_embedding_dim)

# Fields of a UNet2DModel that follow from the data, not from the architecture.
OF_THE_DATA = ("sample_size", "in_channels", "out_channels", "class_embed_type", "num_class_embeds")

Denoiser = str | Mapping[str, Any]  # a name in FAMILIES or PRESETS, or the fields of a UNet2DModel


def make_denoiser(
    denoiser: Denoiser,
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
        denoiser: one of FAMILIES or PRESETS, or what `find_network` returns.
        height, width: size of the images in pixels.
        in_channels: channels of the images.
        out_channels: channels of the prediction; None: in_channels.
        num_class_embeds: number of class labels to condition on; None: unconditional.
        dropout: probability in [0, 1); None: the denoiser's.
    Raises:
        ValueError: unknown name, a size that the network cannot halve often enough, or a number out of range.
    """
    check_size(denoiser, height, width)
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
        **_architecture(denoiser, height, width) | ({} if dropout is None else {"dropout": float(dropout)}),
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        num_class_embeds=num_class_embeds,
    )


def _architecture(denoiser: Denoiser, height: int, width: int) -> dict[str, Any]:
    """Fields of a UNet2DModel for images of this size, without those of OF_THE_DATA."""
    if isinstance(denoiser, str):
        return PRESETS[denoiser] if denoiser in PRESETS else _of_family(FAMILIES[denoiser], height, width)
    return {name: value for name, value in denoiser.items() if name not in OF_THE_DATA}


def _of_family(family: Family, height: int, width: int) -> dict[str, Any]:
    """The network of a family for images of a size that it can halve.

    A level has attention if it has at most 16 x 16 pixels, whatever its shape, and as many channels as one head.
    """
    num_levels = halvings(height, width) + 1
    last = len(family.widths) - 1
    widths = tuple(family.widths[min(i, last)] for i in reversed(range(num_levels)))
    attention = [
        (height >> i) * (width >> i) <= ATTENTION_PIXELS and channels >= HEAD_CHANNELS
        for i, channels in enumerate(widths)
    ]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attention),
        "up_block_types": tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)),
        "layers_per_block": family.layers_per_block,
        "attention_head_dim": HEAD_CHANNELS,
        "time_embedding_dim": 4 * family.widths[TIME_LEVEL],
        # the channels of every layer are a sum of widths
        "norm_num_groups": min(32, math.gcd(*widths) // MIN_GROUP_CHANNELS),
    }


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def size_rule(denoiser: Denoiser | None) -> Rule:
    """Which sizes of images this network, or a family that is not chosen yet, can take: for `nearest_size`."""
    if denoiser is None or (isinstance(denoiser, str) and denoiser not in PRESETS):
        return None
    fields = PRESETS[denoiser] if isinstance(denoiser, str) else denoiser
    return int(2 ** (len(fields["block_out_channels"]) - 1))


def check_size(denoiser: Denoiser | None, height: int, width: int) -> None:
    """Raise ValueError if there is no such network, or it cannot halve this size as often as it needs to.

    Args:
        denoiser: None: a family.
    """
    if isinstance(denoiser, str) and denoiser not in FAMILIES | PRESETS:
        raise ValueError(f"denoiser is {denoiser!r}: give one of {', '.join(FAMILIES | PRESETS)}, or a configuration")
    for side, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{side} is {value!r}: give an integer of at least 1")
    near = nearest_size(size_rule(denoiser), height, width)
    if near != (height, width):
        name = f"the denoiser {denoiser!r}" if isinstance(denoiser, str) else "the network"
        raise ValueError(
            f"the size is {height}x{width}, which {name} cannot halve as often as it needs to: give --resolution "
            f"{near[0]}x{near[1]}"
        )


# ---- Networks of other models ----------------------------------------------------------------------------------------


def find_network(
    denoiser: str,
    manifest: Mapping[str, Any] | None = None,
    init_from: str | None = None,
    *,
    num_steps: int = 1,
    log: Callable[[str], object] = print,
) -> Denoiser | None:
    """What `--denoiser` means, for `make_denoiser`; None if that is to be found by a trial.

    Args:
        denoiser: "auto", one of FAMILIES or PRESETS; else the folder of a pipeline or network, its config.json, or a
            model on the Hub.
        manifest: of the checkpoint that a run continues from: its network is the one.
        init_from: the model whose network "auto" takes, a folder or a name on the Hub.
        num_steps: T, which a learned time embedding must have vectors for.
        log: called with the network of init_from if it is taken.
    Raises:
        ValueError: it cannot be found or read, or is not the configuration of a UNet2DModel that can be trained here.
    """
    if manifest is not None and denoiser in ("auto", manifest["config"].get("denoiser", denoiser)):
        network = manifest.get("network") or FORMER.get(denoiser)  # a former checkpoint has no network
        if network is not None:
            return network
    if denoiser in FAMILIES | PRESETS:
        return denoiser
    setting, name = ("init_from", init_from) if denoiser == "auto" else ("denoiser", denoiser)
    if name is None:
        return None
    import torch

    from ddpm_pipeline.loading import read_json, unet_on_meta

    file = _config_file(setting, name)
    config = read_json(file)
    try:
        if not config.keys() & {"_class_name", "block_out_channels"}:  # else all would be diffusers' defaults
            raise ValueError(f"{file} has neither _class_name nor block_out_channels")
        if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
            raise ValueError(f"{file} is of a {kind}")
        if config.get("time_embedding_type") == "fourier":
            raise ValueError(f"{file}: time_embedding_type is 'fourier', which is for continuous noise levels")
        unet = unet_on_meta(file, {field: value for field, value in config.items() if field not in OF_THE_DATA})
        if unet.config["time_embedding_type"] == "learned" and unet.config["num_train_timesteps"] < num_steps:
            raise ValueError(
                f"{file}: learned time embedding has num_train_timesteps {unet.config['num_train_timesteps']}, less "
                f"than --ddpm_num_steps {num_steps}"
            )
        x_t = torch.zeros(1, 3, *nearest_size(size_rule(network_of(unet)), 64, 64), device="meta")
        unet(x_t, torch.zeros(1, dtype=torch.int64, device="meta"))
    except Exception as error:  # whatever a block raises
        raise ValueError(
            f"{setting} is {name!r}, which cannot be trained here ({error}): give a UNet2DModel, such as {EXAMPLE}"
        ) from None
    if setting == "init_from":
        side = config.get("sample_size")
        size = (
            "" if side is None else ", trained at {} x {}".format(*(side if isinstance(side, list) else (side, side)))
        )
        log(f"denoiser: that of {name} ({unet.num_parameters() / 1e6:.1f} M parameters{size})")
    return network_of(unet)


def network_of(unet: UNet2DModel) -> dict[str, Any]:
    """All fields of a network, for `make_denoiser`."""
    return {name: unet.config[name] for name in inspect.signature(UNet2DModel.__init__).parameters if name != "self"}


def _config_file(setting: str, name: str) -> Path:
    """config.json of the network that this setting names."""
    allowed = "the folder of a pipeline, or user/model on the Hub"
    if setting == "denoiser":
        allowed = f"auto, {', '.join(FAMILIES | PRESETS)}, config.json of a UNet2DModel, {allowed}"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    files = ("unet/config.json", "config.json")  # the second in the folder of a network, and of a pipeline of 2022
    if path.is_dir():
        for file in files:
            if (path / file).is_file():
                return path / file
        if (path / "pipeline").is_dir():
            allowed = str(path / "pipeline")
        raise ValueError(f"{setting} is {name!r}, a folder without config.json of a UNet2DModel: give {allowed}")
    reason = "no such file or folder"
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        for file in files:
            try:
                return Path(hf_hub_download(name, file))
            except (OSError, HFValidationError) as error:  # also if this computer is offline
                reason = str(error.__cause__ or error).strip().splitlines()[0]
    raise ValueError(f"{setting} is {name!r} ({reason}): give {allowed}")


# ---- Initial weights -------------------------------------------------------------------------------------------------


def _from_the_bottom(unet: UNet2DModel, other: UNet2DModel) -> dict[str, Tensor]:
    """The weights of a network, named as in another one that may have more or fewer levels: a level has the number of
    the one with the same size of images, if the lowest levels of both have the same."""
    shift = len(other.config["block_out_channels"]) - len(unet.config["block_out_channels"])

    def name_there(name: str) -> str:  # the lowest level is the last of down_blocks, but the first of up_blocks
        return re.sub(r"^down_blocks\.(\d+)", lambda match: f"down_blocks.{int(match[1]) + shift}", name)

    return {name_there(name): tensor for name, tensor in unet.state_dict().items()}


def _by_name(unet: UNet2DModel, other: UNet2DModel) -> Tensor:
    """The class embeddings of a network in the order of the classes of another one, whose own remain for new classes.
    Without names on both sides, those of the network as they are."""
    from ddpm_pipeline.labels import class_names_of, null_class

    weights: Tensor = unet.state_dict()[CLASSES]
    there, here = class_names_of(unet), class_names_of(other)
    if there is None or here is None:
        return weights
    embeddings = other.state_dict()[CLASSES].clone()
    pairs = [(i, there.index(name)) for i, name in enumerate(here) if name in there]
    nulls = null_class(other), null_class(unet)
    for i, j in [*pairs, *([nulls] if None not in nulls else [])]:
        embeddings[i] = weights[j]
    return embeddings


def load_initial_weights(name: str, unet: UNet2DModel, scheduler: DDPMScheduler, log: Callable[[str], object]) -> None:
    """Copy the weights of a saved or published model into `unet`: each tensor with the same place and shape in both.

    Args:
        name: folder of the model, or its name on the Hub.
        unet: a network of the same or a similar architecture; tensors that do not fit keep their values.
        scheduler: the noise schedule to train with.
        log: called with what was loaded and what does not fit, and with a warning if the model was trained with another
            noise schedule.
    Raises:
        ValueError: it cannot be loaded; less than half of the parameters fit; or its prediction type or number of
            diffusion timesteps differ. `unet` is unchanged.
    """
    from ddpm_pipeline import DDPMPipeline
    from ddpm_pipeline.decode import parse_colour
    from ddpm_pipeline.images import background_of

    try:
        pipe = DDPMPipeline.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    except OSError as error:
        raise ValueError(f"init_from is {name!r}: {error}") from error
    weights, target = _from_the_bottom(pipe.unet, unet), unet.state_dict()
    if CLASSES in weights and CLASSES in target:
        weights[CLASSES] = _by_name(pipe.unet, unet)
    fitting = {key: tensor for key, tensor in weights.items() if key in target and tensor.shape == target[key].shape}
    new = [key for key in target if key not in fitting]
    share = sum(tensor.numel() for tensor in fitting.values()) / sum(tensor.numel() for tensor in target.values())
    if share < 0.5:
        raise ValueError(
            f"init_from is {name!r}, which has another architecture: only {share:.0%} of the parameters fit, and not "
            f"{some(new)}: give --denoiser {name}"
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
    unet.load_state_dict(target | fitting)
    remark = f"; {len(new)} of {len(target)} tensors do not fit and begin untrained: {some(new)}" if new else ""
    log(f"initial weights: {name}{remark}")
