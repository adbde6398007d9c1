"""Checkpoints: complete or invisible, and enough to go on bit for bit.

    checkpoint-000500/  model.safetensors  ema.safetensors  optimizer.pt  manifest.json

A checkpoint is written into a temporary folder, its files are made safe on the disk, and only then it gets its name;
older ones are deleted after that. The manifest holds size and sha256 of each file, and the step, the global batch, the
number of processes, the configuration and the versions. Random numbers need no state: see ddpm_pipeline/chance.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = re.compile(r"checkpoint-(\d{6,})")
WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST = "model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run."""


def save(
    output_dir: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict[str, Any],
    facts: dict[str, Any],
    total_limit: int,
) -> Path:
    """Write a checkpoint after `step` optimizer steps, then delete all but the newest `total_limit` up to this step.

    Those of later steps are of a run that this one replaces: "latest" must not find them.

    Args:
        model, ema: named float32 tensors.
        optimizer: a state dict of tensors, numbers, lists and dicts.
        facts: what else the manifest shall hold; plain JSON.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    temporary = output_dir / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, temporary / WEIGHTS)
    save_file(ema, temporary / AVERAGE)
    torch.save(optimizer, temporary / OPTIMIZER)
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        for name in (WEIGHTS, AVERAGE, OPTIMIZER)
    }
    manifest = {"step": step, **facts, "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _to_disk(path)
    if final.exists():  # of a run that was resumed from an earlier step
        shutil.rmtree(final)
    temporary.replace(final)
    _to_disk(output_dir)
    kept = [path for number, path in sorted(_named(output_dir)) if number <= step][-total_limit:]
    for _, old in _named(output_dir):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return final


def find(output_dir: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `which` names, and its manifest: "latest", the newest whole one, or a folder.

    Raises:
        CheckpointError: there is none, or the folder named is missing or damaged.
    """
    if which != "latest":
        path = Path(which)
        return path, verified(path)
    reasons = []
    for _, path in sorted(_named(output_dir), reverse=True):
        try:
            return path, verified(path)
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError("; ".join(reasons) or f"{output_dir} has no checkpoint to resume from")


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a look at the size and sha256 of each of its files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"])
            for name in (WEIGHTS, AVERAGE, OPTIMIZER)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {type(error).__name__}: {error}") from None
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged: its size or sha256 is not that of {MANIFEST}")
    return manifest


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, average and optimizer state of a checkpoint, on the CPU. No pickled code is run."""
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path / OPTIMIZER} is refused: {error}") from None
    return load_file(path / WEIGHTS), load_file(path / AVERAGE), optimizer


def commit() -> str | None:
    """The commit of the project's code, if it lies in a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _named(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for path in output_dir.glob("checkpoint-*"):
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
