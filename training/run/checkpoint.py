"""Checkpoints: complete or invisible, and enough to go on bit for bit.

    checkpoint-000500/  model.safetensors  ema.safetensors  optimizer.pt  manifest.json

A checkpoint is written into a temporary folder, its files are made safe on the disk, and only then it gets its name;
it is read again, and older ones are deleted after that. The manifest holds size and sha256 of each file, and the step,
the global batch, the number of processes, the configuration and the versions. Random numbers need no state: see
ddpm_pipeline/chance.py. A run holds the lock of its folder, so that no two write into one.

Other names in the folder: `checkpoint-000500.tmp-PID` is half a checkpoint, or one that is being deleted;
`checkpoint-000500.old` is a whole one whose place another of the same step is taking. `clear` sees to both.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

NAME = re.compile(r"checkpoint-(\d{6,})")
WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST = "model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"
LOCK = ".lock"
ROOM_FOR_HEADERS = 2**20  # bytes of a checkpoint besides its tensors, at most


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; or the folder of the run cannot be used."""


class NoRoomError(OSError):
    """A checkpoint could not be written; what was there before is untouched."""


def lock(output_dir: Path) -> IO[str]:
    """Make the folder if it is missing, and lock it for this process until the file that is returned is closed.

    Raises:
        CheckpointError: it cannot be made or written into, or another process has it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open(output_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held open on purpose
    except OSError as error:
        raise CheckpointError(
            f"output_dir is {str(output_dir)!r}: {error.strerror}; give a folder to write into"
        ) from None
    try:
        import fcntl
    except ImportError:  # Windows has none: there two runs in one folder are not noticed
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise CheckpointError(
                f"output_dir is {str(output_dir)!r}: another run is writing into it ({file.read().strip()}); give "
                "another folder, or wait for that run"
            ) from None
        warnings.warn(f"{output_dir / LOCK} cannot be locked: {error.strerror}", stacklevel=2)  # some network drives
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def clear(output_dir: Path) -> None:
    """Remove what interrupted runs left, and put back a whole checkpoint that was to be replaced. Lock first."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        name, _, rest = path.name.partition(".")
        if not NAME.fullmatch(name) or not path.is_dir():
            continue
        if rest == "old" and not (output_dir / name).exists():
            path.rename(output_dir / name)
        elif rest == "old" or re.fullmatch(r"tmp(-\d+)?", rest):
            _delete(path)


def check_room(output_dir: Path, needed: int) -> None:
    """Raise NoRoomError if `needed` bytes are not free there."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise NoRoomError(
            errno.ENOSPC, f"a checkpoint needs {needed:,} bytes, and {free:,} are free: make room", str(output_dir)
        )


def save(
    output_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    facts: dict[str, Any],
    total_limit: int,
) -> Path:
    """Write a checkpoint after `step` optimizer steps, then delete all but the newest `total_limit` up to this step.

    Those of later steps are of a run that this one replaces: "latest" must not find them. A checkpoint that cannot be
    deleted is warned of.

    Args:
        model, ema: named float32 tensors.
        optimizer: a state dict of tensors, numbers, lists and dicts.
        facts: what else the manifest shall hold; plain JSON.
    Raises:
        NoRoomError: it cannot be written; the message has the path, the bytes that are needed and those that are free.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    temporary = output_dir / f"{final.name}.tmp-{os.getpid()}"
    _reached("begin")
    needed = bytes_of(model, ema, optimizer)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_room(output_dir, needed)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for name, content in (
            (WEIGHTS, lambda: safetensors_bytes({name: tensor.contiguous() for name, tensor in model.items()})),
            (AVERAGE, lambda: safetensors_bytes(dict(ema))),
            (OPTIMIZER, lambda: _torch_bytes(optimizer)),
        ):
            files[name] = _write(temporary / name, content())
        _write(temporary / MANIFEST, json.dumps({"step": step, **facts, "files": files}, indent=2).encode() + b"\n")
        _to_disk(temporary)
        _reached("named")
        old = output_dir / f"{final.name}.old"
        if final.exists():  # of a run that was resumed from an earlier step
            final.replace(old)
            _reached("replaced")
        temporary.replace(final)
        _to_disk(output_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
        raise NoRoomError(
            error.errno or errno.EIO,
            f"{final} cannot be written: {error.strerror or error}. It needs {needed:,} bytes, {free:,} are free; "
            "earlier checkpoints are as they were",
            str(final),
        ) from error
    verified(final)  # as the disk has it now; only then an older one may go
    _reached("rotate")
    if old.exists():
        _delete(old)
    kept = [path for number, path in sorted(_named(output_dir)) if number <= step][-total_limit:]
    for _, path in _named(output_dir):
        if path not in kept:
            _delete(path)
            _reached("rotating")
    _reached("end")
    return final


def bytes_of(model: Mapping[str, Tensor], ema: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None = None) -> int:
    """About how many bytes a checkpoint takes; without an optimizer's state, that of Adam, which is yet to come."""
    tensors = [*model.values(), *ema.values()]
    if optimizer is None:
        tensors += [*ema.values(), *ema.values()]
    else:
        tensors += [value for state in optimizer.get("state", {}).values() for value in state.values()]
    return ROOM_FOR_HEADERS + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def find(output_dir: Path, which: str, say: Callable[[str], object] = lambda line: None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `which` names, and its manifest: "latest", the newest whole one, or a folder.

    Args:
        say: is told of each newer one that is damaged and passed over, and why.
    Raises:
        CheckpointError: there is none, or the folder named is missing, damaged, or not of this run.
    """
    if which != "latest":
        path = Path(which)
        if not path.exists() and path.name == which:  # its name in the folder of the run
            path = output_dir / which
        if not path.is_dir():
            there = ", ".join(found.name for _, found in sorted(_named(output_dir))) or "none"
            raise CheckpointError(
                f"resume_from_checkpoint is {which!r}: there is no such folder; in {output_dir}: {there}"
            )
        manifest = verified(path)
        real = path.resolve()
        if real.parent != output_dir.resolve() or not NAME.fullmatch(real.name):
            raise CheckpointError(
                f"resume_from_checkpoint is {which!r}: that is no checkpoint of the run in {output_dir}; "
                "output_dir must be the folder of its run"
            )
        return path, manifest
    reasons = []
    for _, path in sorted(_named(output_dir), reverse=True):
        try:
            manifest = verified(path)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"{path.name} is passed over: {error}")
        else:
            return path, manifest
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
        raise CheckpointError(
            f"{path / MANIFEST} is not that of a checkpoint: {type(error).__name__}: {error}"
        ) from None
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


def _delete(folder: Path) -> None:
    """Out of sight at once, then gone: a folder that is half deleted has no checkpoint's name."""
    try:
        if ".tmp" not in folder.name:
            hidden = folder.with_name(f"{folder.name.partition('.')[0]}.tmp-{os.getpid()}")
            folder.replace(hidden)
            folder = hidden
            _reached("deleting")
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} cannot be deleted: {error.strerror or error}", stacklevel=2)


def _torch_bytes(state: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _write(path: Path, content: bytes | memoryview) -> dict[str, Any]:
    """Write a file, safe on the disk: its size and sha256, of what should be there."""
    half = len(content) // 2
    with open(path, "xb") as file:
        file.write(content[:half])
        file.flush()
        _reached(path.name)
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _reached(phase: str) -> None:
    """Tests let a run die here, as if the power had gone: DDPM_CRASH_AT=phase, or phase:N for the N-th time."""
    wanted, _, times = os.environ.get("DDPM_CRASH_AT", "").partition(":")
    if wanted == phase:
        os.environ["DDPM_CRASH_AT"] = f"{phase}:{int(times or 1) - 1}"
        if int(times or 1) <= 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
