"""THE GUIDE: a weaker version of the network, for autoguidance (Karras et al. 2024, arXiv 2406.02507).

    output = weak + w (strong - weak),    w = autoguidance_scale

What the guide gets wrong, the network gets wrong too, only less; so w > 1 leads away from such errors. The guide is a
network of its own, in the folder guide/ of a saved pipeline. model_index.json does not name it, so that the built-in
classes ignore it.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file

from .labels import CLASS_NAMES
from .loading import WEIGHTS, check_finite, check_network, weight_files

if TYPE_CHECKING:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline

    BuiltIn = BuiltInDDPMPipeline
else:
    BuiltIn = object  # diffusers takes the only class of a file of remote code that is a pipeline

GUIDE = "guide"  # its folder in that of a pipeline
GUIDE_FIELDS = ("in_channels", "out_channels", "num_class_embeds", "class_embed_type", CLASS_NAMES)  # as the network's
HUB_OPTIONS = ("cache_dir", "token", "local_files_only")


def check_guide(guide: Any, unet: UNet2DModel) -> None:
    """Raise ValueError unless the guide takes and gives the same as the network."""
    if not isinstance(getattr(guide, "_orig_mod", guide), UNet2DModel):  # torch.compile puts it there
        raise ValueError(f"guide is a {type(guide).__name__}: give a UNet2DModel, or None")
    for name in GUIDE_FIELDS:
        value, needed = guide.config.get(name), unet.config.get(name)
        if value != needed:
            raise ValueError(f"guide has {name} {value!r}, but the network has {needed!r}: give one with the same")


def load_guide(folder: Path, unet: UNet2DModel) -> UNet2DModel | None:
    """The guide in the folder of a saved pipeline, on the device and in the dtype of the network; None: it has none.

    Raises:
        ValueError: it is not complete, not finite, or not for this network; the message names the file.
    """
    own = folder / GUIDE
    if not own.is_dir():
        return None
    config_file, hint = own / "config.json", ""
    if not config_file.is_file():  # diffusers downloads all weights, but of folders it does not know nothing else
        config_file = folder / "unet" / "config.json"  # a guide that was kept in training has the same
        hint = f" ({own / 'config.json'} is missing: load the model from a full copy, or with the installed package)"
    variants = sorted(path.name.split(".")[1] for path in own.glob(f"{WEIGHTS}.*.safetensors"))
    variant = next((each for each in (None, *variants) if weight_files(own, each, "safetensors")), None)
    try:
        guide, files = check_network(config_file, own, variant, use_safetensors=True)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    guide.load_state_dict({name: each for file in files for name, each in load_file(file).items()}, assign=True)
    check_finite(guide, f"the weights of {own}")
    try:
        check_guide(guide, unet)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    place_guide(guide, unet, guide.device if unet.device.type == "meta" else unet.device)
    return guide.eval()


def fetch_guide_config(name: str, folder: Path, options: Mapping[str, Any]) -> None:
    """Download guide/config.json of a model on the Hub, whose folder diffusers has downloaded, if it can be had.

    Args:
        options: of `from_pretrained`.
    """
    if (folder / GUIDE).is_dir() and not (folder / GUIDE / "config.json").is_file():
        hub = {option: options[option] for option in HUB_OPTIONS if option in options}
        with contextlib.suppress(OSError):  # offline, or it has none
            UNet2DModel.load_config(name, subfolder=GUIDE, revision=folder.name, **hub)  # which downloads it


def place_guide(guide: UNet2DModel, unet: UNet2DModel, device: torch.device) -> None:
    """Move a guide to a device, and cast it to the dtype of the network."""
    torch.nn.Module.to(guide, device=device, dtype=unet.dtype)  # diffusers' own `to` warns of casts


class WithGuide(BuiltIn):
    """The guide of a pipeline: checked when it is set, loaded and saved with the pipeline, moved with its network."""

    _guide: UNet2DModel | None = None

    @property
    def guide(self) -> UNet2DModel | None:
        """A weaker version of the network, for `autoguidance_scale`, or None. It can be set."""
        return self._guide

    @guide.setter
    def guide(self, guide: UNet2DModel | None) -> None:
        if guide is not None:
            check_guide(guide, self.unet)
        self._guide = guide

    def register_to_config(self, **kwargs: Any) -> None:
        """diffusers' loader registers at its end where the pipeline is from: then the guide is loaded.

        That is the one call that it makes for remote code, too.
        """
        super().register_to_config(**kwargs)
        if "_name_or_path" not in kwargs:
            return
        loaded_from = Path(str(self.unet.config.get("_name_or_path")))  # of a model on the Hub: in the cache
        if loaded_from.name == "unet" and (loaded_from.parent / "model_index.json").is_file():
            self.guide = load_guide(loaded_from.parent, self.unet)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `to`, of the guide too."""
        super().to(*args, **kwargs)
        if self.guide is not None and self.unet.device.type != "meta":  # as with sequential offloading
            place_guide(self.guide, self.unet, self.unet.device)
        return self

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pipe`, but the networks are shared, and keep their dtype unless `dtype` is given."""
        if "torch_dtype" not in kwargs:  # the name of dtype until diffusers 0.40
            kwargs.setdefault("dtype", pipeline.dtype)
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe.guide = getattr(pipeline, "guide", None)
        return pipe

    def save_guide(self, folder: Path, variant: str | None) -> None:
        """Save it in the folder of a saved pipeline, or remove that of an earlier save.

        Always as safetensors, and also without the variant: loading takes that if it is there.
        """
        if self.guide is None:
            shutil.rmtree(folder / GUIDE, ignore_errors=True)
            return
        guide: UNet2DModel = getattr(self.guide, "_orig_mod", self.guide)
        for each in {None, variant}:
            guide.save_pretrained(folder / GUIDE, variant=each)
