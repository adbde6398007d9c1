"""CHECKPOINTS: complete or invisible, and enough to resume bit for bit.

    checkpoint-000500/  model.safetensors  ema.safetensors  optimizer.pt  manifest.json
                        (best.safetensors  guide.safetensors  ema-0.05.safetensors  ema-0.10.safetensors
                         moments.safetensors)

A checkpoint is written into a temporary folder and flushed to disk, and only then renamed to its final name. Older
checkpoints are deleted after the new one has been read back. The manifest holds the size and sha256 of each file, the
step, the run record, the state of fp16's loss scaler and that of best.py. What is kept of earlier steps, the best
weights and the guide, is in files of its own unless it is the EMA weights of this step; so are the averages of
post_hoc_ema.py, and the moments by which timesteps are drawn (ddpm_pipeline/timesteps.py). Random numbers need no
state: see ddpm_pipeline/rng.py.

Other names in the folder: `checkpoint-000500.tmp-PID` is incomplete or being deleted; `checkpoint-000500.old` is
complete and being replaced by another one of the same step. `clean_up` handles both after a crash. While a run writes
into its folder, it holds the folder's lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ddpm_pipeline.files import sha256_of
from training.messages import some
from training.post_hoc_ema import TRACKED

if TYPE_CHECKING:
    from filelock import BaseFileLock

NAME = re.compile(r"checkpoint-(\d{6,})")
WEIGHTS, EMA, OPTIMIZER, MANIFEST = "model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"
BEST, GUIDE = "best.safetensors", "guide.safetensors"  # EMA weights that are kept, if they are of an earlier step
MOMENTS = "moments.safetensors"  # of the losses, with timestep_sampling "importance"
AVERAGES = {length: f"ema-{length:.2f}.safetensors" for length in TRACKED}  # with post_hoc_ema
LOCK = ".lock"
# What opening or flushing a folder answers where it cannot be done.
NO_FOLDER_FLUSH = (errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOSYS)
OVERHEAD = 2**20  # upper bound on the bytes of a checkpoint that are not tensors


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; or the folder of the run cannot be used."""


class DiskFullError(OSError):
    """A checkpoint or pipeline/ cannot be written; earlier checkpoints are untouched."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()  # without "[Errno 28]" and a second path


def lock(output_dir: Path) -> BaseFileLock:
    """Create the folder if it is missing, and lock it until `.release()` or the end of this process.

    On a file system without locks (some network drives) this warns and returns a lock that is not held.

    Raises:
        CheckpointError: the folder cannot be created or written to, or another process holds the lock.
    """
    from filelock import FileLock, Timeout

    path = output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise CheckpointError(f"output_dir is {str(output_dir)!r}: {error.strerror}; give a writable folder") from None

    # Never a SoftFileLock: its file outlives a killed process.
    folder_lock = FileLock(
        path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_write_lock_holder
    )
    try:
        folder_lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"output_dir is {str(output_dir)!r}: another run is writing to it ({_read_lock_holder(path)}); give "
            "another folder, or wait until that run ends"
        ) from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked: {error.strerror or error}", stacklevel=2)
    return folder_lock


def clean_up(output_dir: Path) -> None:
    """After a crash: delete incomplete checkpoints, and restore a complete one that was being replaced. Lock first."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        name, _, suffix = path.name.partition(".")
        if not NAME.fullmatch(name) or not path.is_dir():
            continue
        if suffix == "old" and not (output_dir / name).exists():
            path.rename(output_dir / name)
        elif suffix == "old" or re.fullmatch(r"tmp(-\d+)?", suffix):
            _delete(path)


def check_free_space(output_dir: Path, needed: int, purpose: str = "a checkpoint needs") -> None:
    """Raise DiskFullError if fewer than `needed` bytes are free there."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise DiskFullError(
            errno.ENOSPC,
            f"{output_dir}: {purpose} {needed:,} bytes, but {free:,} are free: make room",
            str(output_dir),
        )


def disk_full(path: Path, error: Exception, needed: int, untouched: str) -> DiskFullError:
    """The error for a path that cannot be written, with the bytes it needs and those that are free."""
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    reason = getattr(error, "strerror", None) or error
    return DiskFullError(
        getattr(error, "errno", None) or errno.EIO,
        f"{path} cannot be written: {reason}. It needs {needed:,} bytes, {free:,} are free; {untouched}",
        str(path),
    )


def save(
    output_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    record: Mapping[str, Any],
    total_limit: int,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint after `step` optimizer steps, then delete all but the newest `total_limit` up to this step.

    Checkpoints of later steps are deleted too: they belong to an earlier run in this folder, and "latest" must not find
    them. A checkpoint that cannot be deleted causes a warning.

    Args:
        model, ema: named float32 tensors.
        optimizer: a state dict of tensors, numbers, lists and dicts.
        record: more entries of the manifest, as JSON values.
        others: more float32 tensors, for those of BEST, GUIDE, MOMENTS and AVERAGES that there are.
    Raises:
        DiskFullError: it cannot be written. The message has the path, the bytes needed and the bytes free.
        CheckpointError: what was written does not read back correctly. No other checkpoint has been deleted.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    temporary = output_dir / f"{final.name}.tmp-{os.getpid()}"
    replaced = output_dir / f"{final.name}.old"
    others = others or {}
    needed = estimate_bytes(model, ema, optimizer, *others.values())
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_free_space(output_dir, needed)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # One after the other, so that only one of them is in memory as bytes.
        files = {
            WEIGHTS: _write(temporary / WEIGHTS, _safetensors_bytes(model)),
            EMA: _write(temporary / EMA, _safetensors_bytes(ema)),
            OPTIMIZER: _write(temporary / OPTIMIZER, _torch_bytes(optimizer)),
        }
        for name, weights in others.items():
            files[name] = _write(temporary / name, _safetensors_bytes(weights))
        _write(temporary / MANIFEST, json.dumps({"step": step, **record, "files": files}, indent=2).encode() + b"\n")
        _flush_folder(temporary)
        if final.exists():  # of a run that was resumed from an earlier step
            final.replace(replaced)
        temporary.replace(final)
        _flush_folder(output_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full(final, error, needed, "earlier checkpoints are untouched") from error
    verify(final)  # reads it back; only then may older ones be deleted
    if replaced.exists():
        _delete(replaced)
    kept = [path for number, path in sorted(_checkpoints(output_dir)) if number <= step][-total_limit:]
    for _, path in _checkpoints(output_dir):
        if path not in kept:
            _delete(path)
    return final


def estimate_bytes(
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Any] | None = None,
    *others: Mapping[str, Tensor],
) -> int:
    """Approximate size of a checkpoint in bytes. Without an optimizer state, Adam's after the first step is assumed."""
    tensors = [tensor for weights in (model, ema, *others) for tensor in weights.values()]
    if optimizer is None:
        tensors += [*ema.values(), *ema.values()]
    else:
        tensors += [value for state in optimizer.get("state", {}).values() for value in state.values()]
    return OVERHEAD + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def find(output_dir: Path, which: str, log: Callable[[str], object] = lambda line: None) -> tuple[Path, dict[str, Any]]:
    """The path and manifest of a checkpoint: the newest valid one for "latest", else the folder `which`.

    Args:
        log: called with the reason for each damaged checkpoint that "latest" skips.
    Raises:
        CheckpointError: there is none, or the folder is missing, damaged, or not a checkpoint of this run.
    """
    if which != "latest":
        path = Path(which).expanduser()
        if not path.exists() and path.name == which:  # its name in the folder of the run
            path = output_dir / which
        if not path.is_dir():
            names = some([path.name for _, path in sorted(_checkpoints(output_dir), reverse=True)]) or "no checkpoints"
            raise CheckpointError(
                f"resume_from_checkpoint is {which!r}: there is no such folder, {output_dir} has {names}"
            )
        manifest = verify(path)
        resolved = path.resolve()
        if resolved.parent != output_dir.resolve() or not NAME.fullmatch(resolved.name):
            raise CheckpointError(
                f"resume_from_checkpoint is {which!r}: it is not a checkpoint in output_dir, {str(output_dir)!r}; set "
                "output_dir to the folder of its run"
            )
        return path, manifest
    reasons = []
    for _, path in sorted(_checkpoints(output_dir), reverse=True):
        try:
            manifest = verify(path)
        except CheckpointError as error:
            reasons.append(str(error))
            log(f"{path.name} is skipped: {error}")
        else:
            return path, manifest
    raise CheckpointError("; ".join(reasons) or f"{output_dir} has no checkpoint to resume from")


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking the size and sha256 of each of its files.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"])
            for name in (WEIGHTS, EMA, OPTIMIZER, *manifest["files"])
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} is missing or not a valid manifest: {type(error).__name__}: {error}"
        ) from None
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size or sha256_of(file) != digest:
            raise CheckpointError(f"{file} is damaged: its size or sha256 differs from {MANIFEST}")
    return manifest


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Online weights, EMA weights and optimizer state of a checkpoint, on the CPU. No pickled code runs.

    Raises:
        CheckpointError: the optimizer state holds anything but tensors and plain containers.
    """
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path / OPTIMIZER} is refused: {error}") from None
    return load_file(path / WEIGHTS), load_file(path / EMA), optimizer


def load_others(path: Path) -> dict[str, dict[str, Tensor]]:
    """The other tensors in a checkpoint, on the CPU: for each of BEST, GUIDE, MOMENTS and AVERAGES that it has."""
    names = (BEST, GUIDE, MOMENTS, *AVERAGES.values())
    return {name: load_file(path / name) for name in names if (path / name).exists()}


def _write_lock_holder(descriptor: int) -> None:
    """Write who holds the lock into its file, for the error message of others; the lock itself does not need it."""
    holder = f"\nprocess {os.getpid()} on {socket.gethostname()}\n"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, holder.encode())


def _read_lock_holder(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)  # on Windows the lock is on the first byte, which others cannot read
            return file.read().decode(errors="replace").strip() or "unknown process"
    except OSError:
        return "unknown process"


def _checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of every folder with the name of a checkpoint."""
    for path in output_dir.glob("checkpoint-*"):
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _delete(folder: Path) -> None:
    """Rename, then delete, so that a partly deleted folder never has the name of a checkpoint."""
    try:
        if ".tmp" not in folder.name:
            hidden = folder.with_name(f"{folder.name.partition('.')[0]}.tmp-{os.getpid()}")
            folder.replace(hidden)
            folder = hidden
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} cannot be deleted: {error.strerror or error}", stacklevel=2)


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})


def _torch_bytes(state: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _write(path: Path, content: bytes | memoryview) -> dict[str, Any]:
    """Write a new file and flush it to disk. Returns its entry in the manifest, the size and sha256 of `content`."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk, where the system can: Windows and some network drives refuse to."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise
