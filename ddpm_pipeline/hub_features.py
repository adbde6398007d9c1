"""HUB FEATURES: models of transformers as feature extractors: DINOv2, DINOv3, CLIP, SigLIP, ViT, ConvNeXt and others.

A model is a folder, or a name on the Hub. Its weights must be in safetensors, and no code that comes with it runs.
Images are resized, cropped and normalised as the model's image processor says, but on the device and without rounding
between these steps. The features of an image are

    with a text encoder (CLIP, SigLIP)  its embedding, with length 1: only the direction is trained to mean something
    DINOv2, DINOv3, ViT                 the last layer's CLS token; of a ViT through its pooling layer, if that is saved
    ConvNeXt and others                 the pooled output of the last layer

Distances in the features of two models have names of their own. FD-DINOv2 is the Frechet distance of CLS tokens of
DINOv2 (Stein et al. 2023, arXiv 2306.04675), CMMD the kernel distance of CLIP's embeddings with a Gaussian kernel
(Jayasumana et al. 2024, arXiv 2401.09603; their code, too, has embeddings of length 1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .features import Extractor, to_rgb
from .fidelity import cmmd_kernel, cubic_kernel
from .tensor_cache import FORMAT

CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BATCH_SIZE = 32  # images in the network at a time
LEVELS = 3  # of 255, by which a processor, which rounds to integers twice, may differ from `Preprocessing`
MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers of filters


def load_model(which: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a model of transformers; see `features.make_extractor`.

    Args:
        which: a folder that the model was saved in, or "user/model" or "user/model@revision", with a tag, branch or
            commit, on the Hub. What was loaded from there before is found in its cache without a connection.
    Raises:
        ValueError: transformers is not installed, there is no such model, or it cannot be loaded or used for images.
    """
    if find_spec("transformers") is None:
        raise ValueError(
            f"extractor is {which!r}, but transformers is not installed: pip install -c constraints.txt -e "
            '".[train,eval]"'
        )
    folder, name, commit = _find(which)
    with _quiet():
        prepare = _load_preprocessing(which, folder)
        model, has_pooler = _load_network(which, folder)
    kind = model.config.model_type
    model.to(device)

    def features(x: Tensor) -> Tensor:
        pixels = prepare(to_rgb(x))
        if hasattr(model, "get_image_features"):
            return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        output = model(pixel_values=pixels)
        if not has_pooler:
            return output.last_hidden_state[:, 0]
        if (pooled := getattr(output, "pooler_output", None)) is None:
            raise ValueError(f"the output of {type(model).__name__} is not pooled")
        return pooled.flatten(1)

    def compute(x: Tensor) -> Tensor:
        return torch.cat([features(part) for part in x.split(BATCH_SIZE)])

    _try_out(which, compute, device)
    return Extractor(
        name,
        _hash(folder),
        compute,
        device=device,
        frechet_name="FD-DINOv2" if kind.startswith("dinov2") else "Frechet distance",
        kernel_name="CMMD" if kind == "clip" else "kernel distance",
        kernel=cmmd_kernel if kind == "clip" else cubic_kernel,
        commit=commit,
    )


# ---- Files -----------------------------------------------------------------------------------------------------------


def _find(which: str) -> tuple[Path, str, str | None]:
    """The folder of a model, its name and, on the Hub, its commit; the folder of the Hub's cache has its name."""
    folder, commit = Path(which).expanduser(), None
    name = folder.resolve().name
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        name, at, revision = which.partition("@")
        if at and not revision:
            raise ValueError(f"extractor is {which!r}: give a tag, branch or commit after the @, or leave it out")
        try:
            path = snapshot_download(name, revision=revision or None, allow_patterns=[*CONFIGS, *WEIGHTS])
        except Exception as error:  # of many types: no such model or revision, no permission, no connection
            raise ValueError(
                f"extractor is {which!r}: there is no folder of this name, and the Hub has no such model, or cannot "
                f"be reached ({_first_line(error)})"
            ) from None
        folder = Path(path)
        commit = folder.name
    if not (folder / CONFIGS[0]).is_file():
        raise ValueError(f"extractor is {which!r}, which has no config.json: give a model of transformers")
    if not any(folder.glob(WEIGHTS[0])) and not any(folder.glob(WEIGHTS[1])):
        raise ValueError(
            f"extractor is {which!r}, which has no {WEIGHTS[0]}: weights are read from safetensors alone. The Hub "
            "offers other weights converted as a pull request: give user/model@refs/pr/NUMBER"
        )
    for config in CONFIGS:
        try:
            if (folder / config).is_file():
                dict(json.loads((folder / config).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"extractor is {which!r}, whose {config} is damaged: {_first_line(error)}") from None
    return folder, name, commit


def _hash(folder: Path) -> str:
    """SHA-256 of the files that the features depend on."""
    sha256 = hashlib.sha256(f"{FORMAT} transformers".encode())
    for path in sorted(path for pattern in (*CONFIGS, *WEIGHTS) for path in folder.glob(pattern)):
        with open(path, "rb") as file:
            sha256.update(f" {path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return sha256.hexdigest()


# ---- The network -----------------------------------------------------------------------------------------------------


def _load_network(which: str, folder: Path) -> tuple[Any, bool]:
    """The network in float32, and False if it has a pooling layer whose weights are not saved."""
    from transformers import AutoModel

    try:
        with torch.random.fork_rng(devices=[]):  # weights that the files lack are random numbers
            model, info = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # of many types: damaged files, an unknown kind of model, code of its own
        raise ValueError(f"extractor is {which!r}, which cannot be loaded: {_first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    lacking = [name for name in missing if not name.startswith("pooler.")]
    if lacking:
        raise ValueError(f"extractor is {which!r}, whose weights lack {len(lacking)} tensors, such as {lacking[0]}")
    return model.eval(), not missing


def _try_out(which: str, compute: Any, device: torch.device | str) -> None:
    """Raise ValueError unless the model gives one vector for an image."""
    image = torch.linspace(0, 1, 3 * 32 * 32, device=device).view(1, 3, 32, 32)
    try:
        with torch.no_grad():
            features = compute(image)
    except Exception as error:  # whatever a model of texts or of sounds raises
        raise ValueError(f"extractor is {which!r}, which gives no features of images: {_first_line(error)}") from None
    if not features.isfinite().all():
        raise ValueError(f"extractor is {which!r}, whose features are non-finite: its weights may be damaged")


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor does, in floats: resize with antialiasing, crop the middle, normalise.

    Args:
        size: height and width to resize to, or the length of the shorter side.
        crop: height and width of what is kept; None: everything.
        mode: of torch's interpolate.
        factor: from pixels in [0, 1] to those that mean and std belong to; 1 in almost all models.
        mean, std: of each channel, (3,).
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    mode: str
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what the network takes."""
        size = self.size
        if isinstance(size, int):
            shorter = min(x.shape[2:])
            size = int(size * x.shape[2] / shorter), int(size * x.shape[3] / shorter)
        antialias = self.mode != "nearest-exact"
        # As Pillow does: rows first, then columns, and what is outside the range after each is lost.
        for shape in ((x.shape[2], size[1]), size):
            if tuple(x.shape[2:]) != shape:
                x = F.interpolate(x, size=shape, mode=self.mode, antialias=antialias).clamp(0, 1)
        if self.crop is not None:
            height, width = self.crop
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            x = x[:, :, top : top + height, left : left + width]
        mean, std = (torch.tensor(each, device=x.device)[:, None, None] for each in (self.mean, self.std))
        return (x * self.factor - mean) / std


def _load_preprocessing(which: str, folder: Path) -> Preprocessing:
    """That of the model's image processor, which is tried on an image to see that it does nothing else."""
    from transformers import AutoImageProcessor, ViTImageProcessorPil
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(folder)
        # DINOv3's own processor needs torchvision. It does what that of ViT does, with all settings in its file.
        is_dinov3 = str(settings.get("image_processor_type")).startswith("DINOv3ViT")
        processor = (ViTImageProcessorPil if is_dinov3 else AutoImageProcessor).from_pretrained(folder)
        preprocessing = _preprocessing_of(processor)
        image = (np.arange(40 * 56 * 3) * 7919 % 256).astype(np.uint8).reshape(40, 56, 3)
        expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"])
        actual = preprocessing(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    except Exception as error:  # of many types: no such file, a processor that is unknown, needs a library or settings
        raise ValueError(
            f"extractor is {which!r}, whose image processor cannot be used: {_first_line(error)}"
        ) from None
    allowed = LEVELS / 255 * preprocessing.factor / min(preprocessing.std)
    if actual.shape != expected.shape or (actual - expected).abs().max() > allowed:
        raise ValueError(
            f"extractor is {which!r}, whose {type(processor).__name__} does not only resize, crop and normalise: give "
            "a model with another processor"
        )
    return preprocessing


def _preprocessing_of(processor: Any) -> Preprocessing:
    size, side = processor.size, processor.size.get("shortest_edge")
    crop = None
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size["height"], processor.crop_size["width"]
    if (crop_pct := getattr(processor, "crop_pct", None)) is not None and side is not None:
        if side < 384:  # ConvNeXt: up to this size it resizes to more and crops
            side, crop = int(side / crop_pct), (side, side)
        else:
            size, side = {"height": side, "width": side}, None
    to_size = (size["height"], size["width"]) if side is None else side
    if not processor.do_resize or processor.resample not in MODES:
        allowed = ", ".join(map(str, MODES))
        raise ValueError(
            f"do_resize is {processor.do_resize} and resample {processor.resample}: they must be True and one of "
            f"{allowed}"
        )
    normalised = processor.do_normalize
    return Preprocessing(
        size=to_size,
        crop=crop,
        mode=MODES[processor.resample],
        factor=255 * processor.rescale_factor if processor.do_rescale else 255.0,
        mean=tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0),
    )


# ---- Messages --------------------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: what is wrong is checked here."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, had_bars, hub_had_none = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # those of the Hub, too
        if hub_had_none:
            disable_progress_bars()
