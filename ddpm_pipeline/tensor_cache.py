"""TENSOR CACHE: results that are slow to compute, in files named by the hash of everything they depend on."""

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing
from .image_arrays import chunks

FORMAT = 1  # part of every key: raise it when the same input gives another result


def hash_images(kind: str, images: np.ndarray) -> str:
    """SHA-256 of the pixels, dtype and shape, and of what is computed from them."""
    sha256 = hashlib.sha256(f"{FORMAT} {kind} {images.dtype.str} {images.shape} ".encode())
    for chunk in chunks(images):
        sha256.update(np.ascontiguousarray(chunk).data)
    return sha256.hexdigest()


def hash_file(kind: str, path: Path) -> str:
    return hashlib.sha256(f"{FORMAT} {kind} ".encode() + path.read_bytes()).hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values of tensors on the CPU."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        sha256.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha256.update(array.data)
    return sha256.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that holds its own hash, complete or not at all. The folder is created if missing.

    On a full or read-only disk nothing is kept, with a warning: what was computed is not lost for that.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": hash_tensors(tensors)})
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        folder = next((folder for folder in path.parents if folder.is_dir()), Path.cwd())
        warnings.warn(
            f"{path.parent} cannot be written ({error}), so that {path.name[:24]}... is computed again next time: it "
            f"needs {needed:,} bytes, {shutil.disk_usage(folder).free:,} are free: make room or change --cache_dir",
            stacklevel=2,
        )


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors that `save_tensors` wrote; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
            intact = (file.metadata() or {}).get("sha256") == hash_tensors(tensors)
    except SafetensorError:
        return None
    return tensors if intact else None
