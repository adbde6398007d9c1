"""LOADING: checks of a saved folder before anything in it is loaded.

diffusers' loader trusts a folder: it samples from weights that lack a tensor, and allocates as much memory as a
configuration asks for. These checks read JSON, the headers of safetensors files, and of .bin files what PyTorch reads
without running code: which classes are named, the value of every field, and whether every tensor of the network is
there with its shape. No code in the folder runs; the error names what is wrong.
"""

import inspect
import json
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError, safe_open

from .betas import MAX_TRAIN_TIMESTEPS
from .calibrated import load_tables
from .scheduling_ddpm import OLD_FIELDS, DDPMScheduler, check_int, fields_without_effect, known_fields

MAX_JSON_BYTES = 10 * 2**20  # a configuration has a few thousand; the longest trained_betas have 3 million
MAX_SIDE, MAX_CHANNELS, MAX_BLOCKS, MAX_LAYERS = 2**16, 2**16, 16, 64  # far above any trained U-Net
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model"
# Attention's tensor names in diffusers before 0.15, which its loader still accepts.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_folder(
    folder: Path, *, variant: str | None = None, skip: Collection[str] = (), use_safetensors: bool | None = None
) -> bool | None:
    """Check a saved pipeline before it is loaded.

    Args:
        folder: contains model_index.json, unet/ and scheduler/, or the files of these two directly, as in 2022.
        variant: variant of the weights, such as fp16 in diffusion_pytorch_model.fp16.safetensors.
        skip: components that are not loaded from the folder.
        use_safetensors: whether the weights must be safetensors, or .bin; None: safetensors if there are any.
    Returns:
        use_safetensors, resolved, unless the network is skipped.
    Raises:
        ValueError: the folder is not a complete DDPM; the message names the file and the field or tensor.
        OSError: a file cannot be read.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file() and (folder / "pipeline" / index_file.name).is_file():
        raise FileNotFoundError(f"{index_file} is missing: {folder} is the folder of a run, load {folder / 'pipeline'}")
    index = read_json(index_file)
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
        unet_folder = component_folder(folder, "unet")
        _, files = check_network(unet_folder / "config.json", unet_folder, variant, use_safetensors)
        use_safetensors = files[0].suffix == ".safetensors"
    if "scheduler" not in skip:
        library, name = entries["scheduler"]
        kind = getattr(diffusers, name, None) if library == "diffusers" and name.endswith("Scheduler") else None
        if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
            raise ValueError(
                f'{index_file}: scheduler is {_quoted(entries["scheduler"])}: it must be ["diffusers", a scheduler]'
            )
        _check_scheduler(component_folder(folder, "scheduler") / "scheduler_config.json", kind)
    return use_safetensors


def component_folder(folder: Path, name: str) -> Path:
    """Where diffusers looks for a component: in its folder or, if there is none, beside model_index.json."""
    return folder / name if (folder / name).is_dir() else folder


def check_finite(unet: torch.nn.Module, where: str) -> None:
    """Raise ValueError if a weight is non-finite: every sample would be black, without an error."""
    nonfinite = [name for name, tensor in unet.state_dict().items() if not tensor.isfinite().all()]
    if nonfinite:
        raise ValueError(f"{where}: non-finite values in {_listed(nonfinite)}")


def _check_scheduler(file: Path, kind: type) -> None:
    config = read_json(file)
    _check_fields(file, config, known_fields(kind) | (OLD_FIELDS if kind.__name__ == "DDPMScheduler" else set()))
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and 0 < len(betas) <= MAX_TRAIN_TIMESTEPS):
        raise ValueError(
            f"{file}: trained_betas is {_quoted(betas)}: give null or a list of 1 to {MAX_TRAIN_TIMESTEPS} numbers"
        )
    try:
        check_int("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, MAX_TRAIN_TIMESTEPS)
        if kind.__name__ == "DDPMScheduler":
            scheduler: Any = DDPMScheduler.from_config(config)  # cheap with limited sizes; it checks every field
            load_tables(scheduler)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def unet_on_meta(file: Path, config: Mapping[str, Any]) -> UNet2DModel:
    """The network of a configuration, with shapes but no memory.

    Args:
        file: where the configuration is from, for messages.
    Raises:
        ValueError: not a configuration of a UNet2DModel, or far larger than any trained one.
    """
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
        with torch.device("meta"):
            unet: UNet2DModel = UNet2DModel.from_config(config)
    except Exception as error:  # whatever a constructor raises
        raise ValueError(f"{file}: {error}") from None
    return unet


def check_network(
    config_file: Path, folder: Path, variant: str | None, use_safetensors: bool | None
) -> tuple[UNet2DModel, list[Path]]:
    """The network of a configuration, without memory, and the files in a folder that have all of its weights.

    Raises:
        ValueError, OSError: as `check_folder`.
    """
    unet = unet_on_meta(config_file, read_json(config_file))
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}

    files, use_safetensors = _find_weights(folder, variant, use_safetensors)
    headers = _checked_headers if use_safetensors else _bin_headers
    saved = {_current_name(name): header for file in files for name, header in headers(file).items()}
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
    if not use_safetensors:
        warnings.warn(
            f"{where}: these weights are in the format of pickle, of which only tensors are read and no code runs; "
            "save the pipeline again to get safetensors",
            stacklevel=4,
        )
    return unet, files


def _find_weights(folder: Path, variant: str | None, use_safetensors: bool | None) -> tuple[list[Path], bool]:
    """The files with the weights, and whether they are safetensors."""
    for wanted in (True, False) if use_safetensors is None else (use_safetensors,):
        suffix = "safetensors" if wanted else "bin"
        if files := weight_files(folder, variant, suffix):
            return files, wanted
    others = sorted(path.name for path in folder.glob("*.*") if path.suffix in (".bin", ".pt", ".safetensors"))
    name = f"{WEIGHTS}{variant_tag(variant)}.{'bin' if use_safetensors is False else 'safetensors'}"
    message = f"{folder} has no {name}" + (f", only {_listed(others, 'files')}" if others else "")
    if use_safetensors and any(other.endswith(".bin") for other in others):
        message += "; give use_safetensors=None to read .bin, of which only tensors are read and no code runs"
    raise ValueError(message)


def weight_files(folder: Path, variant: str | None, suffix: str) -> list[Path]:
    """The files that diffusers loads of a format: those in its index or, if there is none, the single one.

    Raises:
        ValueError: the index names a file that is not there.
    """
    single = folder / f"{WEIGHTS}{variant_tag(variant)}.{suffix}"
    index = weight_index(folder, variant, suffix)
    if not index.is_file():
        shards = sorted(folder.glob(f"{WEIGHTS}{variant_tag(variant)}-*-of-*.{suffix}"))
        return [single] if single.is_file() else shards
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is {_quoted(weight_map)}: it must name the file of each tensor")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        advice = f": remove the index if {single.name} was saved later" if single.is_file() else ""
        raise ValueError(f"{index} names {_listed(missing, 'files')}, not in this folder{advice}")
    return [folder / name for name in names]


def weight_index(folder: Path, variant: str | None, suffix: str) -> Path:
    return folder / f"{WEIGHTS}.{suffix}.index{variant_tag(variant)}.json"


def variant_tag(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def safetensors_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor. OSError, SafetensorError: the file cannot be read."""
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  it is not a dict
        return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}


def _checked_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        return safetensors_headers(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from None


def _bin_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a .bin file, which is a pickle: PyTorch's reader refuses to run code in it."""
    try:
        content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of many types, for code as for damage; PyTorch's text tells how to run the code
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it calls {called[1]}" if called else f"it is not a complete file of tensors ({type(error).__name__})"
        raise ValueError(f"{file} is refused: {reason}; no code in it ran, and only tensors are read") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains {type(content).__name__}: it must map names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{file} has {type(value).__name__} for {_quoted(name)}: it must map names to tensors")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{file}: {name} is sparse or has no data: weights must be plain tensors")
    dtypes = {dtype: name for name, dtype in FLOATS.items()}
    return {name: (tuple(value.shape), dtypes.get(value.dtype, str(value.dtype))) for name, value in content.items()}


def _current_name(name: str) -> str:
    """The current name of a tensor: `mid_block.attentions.0.query.weight` is an old one."""
    match = re.fullmatch(rf"(.*attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.(weight|bias)", name)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _check_fields(file: Path, config: Mapping[str, Any], known: set[str]) -> None:
    ignored = fields_without_effect(config, known)
    unknown = sorted(name for name in config if not name.startswith("_") and name not in known | ignored)
    if unknown:
        version = config.get("_diffusers_version")
        origin = f"; it was saved by diffusers {version}" if version else ""
        raise ValueError(
            f"{file} has the field {_quoted(unknown[0])}, which diffusers {diffusers.__version__} does not know{origin}"
        )


def read_json(file: Path) -> dict[str, Any]:
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


def _listed(names: list[str], what: str = "tensors") -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more {what}" if len(names) > 5 else "")
