"""LOADING: checks of a saved folder before anything in it is loaded.

diffusers' loader trusts a folder: it samples from weights that lack a tensor, runs pickled code in a .bin file, and
allocates as much memory as a configuration asks for. These checks read only JSON and the headers of safetensors files:
which classes are named, the value of every field, and whether the file has every tensor of the network with its shape.
No code in the folder runs and no weight is read; the error names what is wrong.
"""

import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError, safe_open

from .scheduling_ddpm import MAX_TRAIN_TIMESTEPS, DDPMScheduler, check_int

MAX_JSON_BYTES = 10 * 2**20  # a configuration has a few thousand; the longest trained_betas have 3 million
MAX_SIDE, MAX_CHANNELS, MAX_BLOCKS, MAX_LAYERS = 2**16, 2**16, 16, 64  # far above any trained U-Net
FLOATS = ("F64", "F32", "F16", "BF16")
# Attention's tensor names in diffusers before 0.15, which its loader still accepts.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_FIELDS = {"tensor_format"}  # in configurations from 2022, unused since


def check_folder(folder: Path, *, variant: str | None = None, skip: Collection[str] = ()) -> None:
    """Check a saved pipeline before it is loaded.

    Args:
        folder: contains model_index.json, unet/ and scheduler/.
        variant: variant of the weights, such as fp16 in diffusion_pytorch_model.fp16.safetensors.
        skip: components that are not loaded from the folder.
    Raises:
        ValueError: the folder is not a complete DDPM; the message names the file and the field or tensor.
        OSError: a file cannot be read.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file() and (folder / "pipeline" / index_file.name).is_file():
        raise FileNotFoundError(f"{index_file} is missing: {folder} is the folder of a run, load {folder / 'pipeline'}")
    index = _read_json(index_file)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{index_file}: _class_name is {_quoted(index.get('_class_name'))}: it must be a string")
    entries = {name: entry for name, entry in index.items() if not name.startswith("_")}
    if entries.keys() != {"unet", "scheduler"}:
        raise ValueError(f"{index_file} lists {_quoted(sorted(entries))}: it must list a unet and a scheduler")
    for name, entry in entries.items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise ValueError(f"{index_file}: {name} is {_quoted(entry)}: it must be [library, class]")
    if "unet" not in skip:
        if entries["unet"] != ["diffusers", "UNet2DModel"]:
            raise ValueError(
                f'{index_file}: unet is {_quoted(entries["unet"])}: it must be ["diffusers", "UNet2DModel"]'
            )
        _check_unet(folder / "unet", variant)
    if "scheduler" not in skip:
        library, name = entries["scheduler"]
        kind = getattr(diffusers, name, None) if library == "diffusers" and name.endswith("Scheduler") else None
        if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
            raise ValueError(
                f'{index_file}: scheduler is {_quoted(entries["scheduler"])}: it must be ["diffusers", a scheduler]'
            )
        _check_scheduler(folder / "scheduler" / "scheduler_config.json", kind)


def check_finite(unet: torch.nn.Module, where: str) -> None:
    """Raise ValueError if a weight is non-finite: every sample would be black, without an error."""
    nonfinite = [name for name, tensor in unet.state_dict().items() if not tensor.isfinite().all()]
    if nonfinite:
        raise ValueError(f"{where}: non-finite values in {_listed(nonfinite)}")


def _check_scheduler(file: Path, kind: type) -> None:
    config = _read_json(file)
    # A scheduler that was created from another class's configuration keeps the fields that only that class has.
    kinds = [kind, *kind._get_compatibles()]  # type: ignore[attr-defined]  # SchedulerMixin has it
    known = {name for each in kinds for name in inspect.signature(each.__init__).parameters}
    _check_fields(file, config, known)
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and 0 < len(betas) <= MAX_TRAIN_TIMESTEPS):
        raise ValueError(
            f"{file}: trained_betas is {_quoted(betas)}: give null or a list of 1 to {MAX_TRAIN_TIMESTEPS} numbers"
        )
    try:
        check_int("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, MAX_TRAIN_TIMESTEPS)
        if kind.__name__ == "DDPMScheduler":
            DDPMScheduler.from_config(config)  # cheap now that the sizes are limited, and it checks every field
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _check_unet(folder: Path, variant: str | None) -> None:
    file = folder / "config.json"
    config = _read_json(file)
    _check_fields(file, config, set(inspect.signature(UNet2DModel.__init__).parameters))
    sides = _as_list(config.get("sample_size"))
    limits: list[tuple[str, Any, int]] = [("sample_size", side, MAX_SIDE) for side in sides]
    for name in ("in_channels", "out_channels"):
        limits.append((name, config.get(name, 3), MAX_CHANNELS))
    widths = _as_list(config.get("block_out_channels", (224, 448, 672, 896)))
    limits.append(("the number of block_out_channels", len(widths), MAX_BLOCKS))
    limits += [("block_out_channels", width, MAX_CHANNELS) for width in widths]
    limits.append(("layers_per_block", config.get("layers_per_block", 2), MAX_LAYERS))
    if config.get("num_class_embeds") is not None:
        limits.append(("num_class_embeds", config["num_class_embeds"], 2**31))
    try:
        for name, value, most in limits:
            check_int(name, value, 1, most)
        with torch.device("meta"):  # tensors with shapes but no memory
            unet = UNet2DModel.from_config(config)
    except Exception as error:  # whatever a constructor raises
        raise ValueError(f"{file}: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}

    saved, files = {}, _weight_files(folder, variant)
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is not a dict
                    header = tensors.get_slice(name)
                    saved[_current_name(name)] = (tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from None
    where = files[0] if len(files) == 1 else folder
    if missing := expected.keys() - saved.keys():
        raise ValueError(f"{where} lacks {_listed(sorted(missing))}")
    if unexpected := saved.keys() - expected.keys():
        raise ValueError(f"{where} has {_listed(sorted(unexpected))}, but the network of config.json does not")
    for name, (shape, dtype) in saved.items():
        if shape != expected[name]:
            raise ValueError(f"{where}: {name} has shape {shape}, but {expected[name]} in the network of config.json")
        if dtype not in FLOATS:
            raise ValueError(f"{where}: {name} has dtype {dtype}: weights must be one of {', '.join(FLOATS)}")


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    base = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    single = folder / f"{base}.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob(f"{base}-*-of-*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.*") if path.suffix in (".bin", ".pt", ".safetensors"))
        message = f"{folder} has no {single.name}" + (f", only {', '.join(others)}" if others else "")
        raise ValueError(f"{message}; pickled weights (.bin) are not read, since unpickling runs code")
    return files


def _current_name(name: str) -> str:
    """The current name of a tensor: `mid_block.attentions.0.query.weight` is an old one."""
    match = re.fullmatch(rf"(.*attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.(weight|bias)", name)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _check_fields(file: Path, config: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(name for name in config if not name.startswith("_") and name not in known | OLD_FIELDS)
    if unknown:
        version = config.get("_diffusers_version")
        origin = f"; it was saved by diffusers {version}" if version else ""
        raise ValueError(
            f"{file} has the field {_quoted(unknown[0])}, which diffusers {diffusers.__version__} does not know{origin}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {size} bytes: a configuration may have at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains {_quoted(content)}: it must be a JSON object")
    return content


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _quoted(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more tensors" if len(names) > 5 else "")
