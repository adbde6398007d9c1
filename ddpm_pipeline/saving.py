"""SAVING: a folder that loads anywhere. It names diffusers' own classes and has `pipeline.py`, this code in one file.

One file, because diffusers puts the remote code of all local folders into one namespace: of two models with a helper
module of the same name, the second would run the first one's helper.
"""

import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from .guide import GUIDE, fetch_guide_config
from .loading import WEIGHTS, read_json, variant_tag, weight_files, weight_index
from .scheduling_ddpm import DDPMScheduler, fields_without_effect, known_fields

# The modules of `pipeline.py`, each after those it imports.
BUNDLED = (
    "precision", "cpu", "betas", "scheduling_ddpm", "schedulers", "pixels", "calibrated", "decode", "loading", "images",
    "group_norm", "attention", "packed_weights", "fast_unet", "labels", "guide", "denoiser", "sampling", "calls",
    "inversion", "interpolation", "inpainting", "arguments", "saving", "pipeline_ddpm",
)  # fmt: skip

PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")
DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant", "use_safetensors",
    "custom_pipeline", "custom_revision", "trust_remote_code",
)  # fmt: skip

# As remote code all modules are this file. Read it now: another model's may replace it while this process runs.
_OWN_SOURCE = Path(__file__).read_text(encoding="utf-8") if DDPMScheduler.__module__ == __name__ else None


def pipeline_source() -> str:
    """The text of `pipeline.py`: the bundled modules without their relative imports; as remote code, its own text."""
    if _OWN_SOURCE is not None:
        return _OWN_SOURCE
    files = [Path(__file__).with_name(f"{name}.py") for name in BUNDLED]
    lines = [line for file in files for line in [*file.read_text(encoding="utf-8").splitlines(), "", ""]]
    return "\n".join(line for line in lines if not line.startswith("from .")).rstrip("\n") + "\n"


def complete_folder(folder: Path, safe_serialization: bool = True, variant: str | None = None) -> None:
    """Add `pipeline.py` to a saved folder, and remove what is not of this model.

    That is the path that it was loaded from and fields of other versions that change nothing, in its files, and what
    diffusers leaves of earlier weights in the folder.

    Args:
        safe_serialization, variant: those of `save_pretrained`.
    """
    remove_stale_weights(folder / "unet", safe_serialization, variant)
    (folder / "pipeline.py").write_text(pipeline_source(), encoding="utf-8")
    guide_config = (f"{GUIDE}/config.json",) if (folder / GUIDE).is_dir() else ()
    for config_file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", *guide_config):
        file = folder / config_file
        config = json.loads(file.read_text(encoding="utf-8"))
        removed = {"_name_or_path"}
        kind = getattr(diffusers, config["_class_name"], None)
        if config_file != "model_index.json" and kind is not None:
            removed |= fields_without_effect(config, known_fields(kind))
        config = {name: value for name, value in config.items() if name not in removed}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove_stale_weights(folder: Path, safe_serialization: bool, variant: str | None) -> None:
    """Of a file and an index of shards remove the older one: diffusers leaves it, and its loader takes the index."""
    for suffix, saved in (("safetensors", safe_serialization), ("bin", not safe_serialization)):
        index = weight_index(folder, variant, suffix)
        if not index.is_file():
            continue
        shards = set(read_json(index)["weight_map"].values())
        if not all((folder / shard).is_file() for shard in shards):  # diffusers removes those of an earlier save
            index.unlink()
        elif saved:
            (folder / f"{WEIGHTS}{variant_tag(variant)}.{suffix}").unlink(missing_ok=True)
    if not safe_serialization and (others := weight_files(folder, variant, "safetensors")):
        warnings.warn(
            f"{others[0]} is from an earlier save and is loaded instead of the .bin file that is saved now: "
            "remove it, or load with use_safetensors=False",
            stacklevel=4,
        )


def local_folder(name: str, options: Mapping[str, Any], download: Callable[..., Any]) -> Path:
    """A local folder, or a model of the Hub once it is downloaded.

    Args:
        options: of `from_pretrained`; those of DOWNLOAD_OPTIONS are passed on.
        download: diffusers' `DiffusionPipeline.download`.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is not a local folder, and not the name of a model on the Hub (user/model)")
    try:
        folder = Path(download(name, **{option: options[option] for option in DOWNLOAD_OPTIONS if option in options}))
    except OSError as error:  # its text speaks of caches and stack traces, whatever the cause
        revision = f" at revision {options['revision']!r}" if options.get("revision") else ""
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise OSError(
            f"{name} is not a local folder, and no model{revision} on the Hub that can be loaded ({reason}): give the "
            "folder of a pipeline, such as runs/moons/pipeline, or user/model"
        ) from error
    fetch_guide_config(name, folder, options)
    return folder


def isolate_remote_code() -> None:
    """Give this version of the remote code a module of its own. Does nothing in the package.

    diffusers runs the `pipeline.py` of every model in a module of the same name. The next model replaces its contents,
    and the classes of the one before would call the helpers of the other version. Of two models with the same version
    the second gets the classes of the first, so that both can be pickled.
    """
    if _OWN_SOURCE is None or __name__ not in sys.modules:
        return
    name = f"{__name__}_{hashlib.sha256(_OWN_SOURCE.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        del sys.modules[__name__]
        first = vars(sys.modules[name])
        globals().update({key: value for key, value in first.items() if not key.startswith("__")})
        return
    for value in list(globals().values()):
        if inspect.isclass(value) and value.__module__ == __name__:
            value.__module__ = name
    sys.modules[name] = sys.modules.pop(__name__)
