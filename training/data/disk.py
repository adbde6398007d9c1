"""DISK: a folder of the cache is complete or absent; what a killed process left behind is removed; no room is said."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ddpm_pipeline.files import remove

if TYPE_CHECKING:
    from filelock import BaseFileLock

TEMPORARY = re.compile(r"\.[0-9a-f]{16}-[0-9a-f]{32}")  # the folder of a decoding that is not complete
TEMPORARY_FILE = re.compile(r"\.(features|classifier)-.*\.tmp-.*")  # of ddpm_pipeline/tensor_cache.py
KEY = re.compile(r"[0-9a-f]{64}")
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
HOUR = 3600.0


class CacheError(ValueError):
    """The cache cannot be written: the disk is full or read-only."""


def create_folder(folder: Path, write: Callable[[Path, Path], dict[str, Any]]) -> None:
    """Write the cache `folder` under a temporary name, then rename it. Of several processes the first to finish wins.

    `files.replacing` would replace an existing folder, which another process may have written meanwhile and be reading.

    Args:
        write: writes images.npy and names.txt into the folder of its first argument, uses that of the second for
            temporary files, and returns the content of meta.json.
    Raises:
        CacheError: a full or read-only disk.
    """
    temporary = folder.with_name(f".{folder.name[:16]}-{uuid.uuid4().hex}")
    new = temporary / "new"
    lock = None
    try:
        with writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.parent):  # so that nobody takes this folder for one that was left behind
                _remove_left_behind(folder.parent)
                new.mkdir(parents=True)
                lock = _acquire(temporary / "lock")
            meta = write(new, temporary / "scratch")
            with open(new / "meta.json", "w", encoding="ascii") as file:
                json.dump(meta, file, indent=1)
                flush_to_disk(file)
            try:
                new.rename(folder)
            except OSError:  # the folder exists: another process was faster
                if not (folder / "meta.json").exists():
                    raise
    finally:
        if lock is not None:
            lock.release()
        if temporary.exists():
            remove(temporary)


@contextmanager
def writing(cache_dir: Path) -> Iterator[None]:
    """A full or read-only disk becomes a CacheError that says where and what to do.

    Raises:
        CacheError: also if cache_dir is a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            problem = f"the disk is full, {free_bytes(cache_dir):,} bytes are free: make room, or "
        elif error.errno in NOT_WRITABLE:
            problem = f"it cannot be written ({error.strerror}): "
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            problem = f"it is not a folder ({error.strerror}): "
        elif _concerns(error, cache_dir):
            problem = f"it cannot be written ({error.strerror}): "
        else:
            raise
        raise CacheError(f"cache_dir is '{cache_dir}': {problem}give another --cache_dir") from error


def _concerns(error: OSError, cache_dir: Path) -> bool:
    if not isinstance(error.filename, str):
        return False
    file, folder = Path(error.filename).absolute(), cache_dir.absolute()
    return file.is_relative_to(folder) or folder.is_relative_to(file)


def needs_space(folder: Path, num_bytes: int) -> None:
    """Raise CacheError if there is no room for num_bytes in the temporary `folder`, before anything is decoded."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise CacheError(
            f"cache_dir is '{folder.parents[1]}': the decoded images need {num_bytes:,} bytes, {free:,} are free: make "
            "room, give another --cache_dir, or pack them and train with --streaming, which needs less"
        )


def free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def flush_to_disk(file: IO[Any]) -> None:
    """Flush to disk before a rename: otherwise a power cut may leave the new name with an empty file."""
    file.flush()
    os.fsync(file.fileno())


# ---- What was left behind --------------------------------------------------------------------------------------------


@contextmanager
def _alone(cache_dir: Path) -> Iterator[None]:
    lock = _acquire(cache_dir / ".lock", wait=10)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(path: Path, wait: float = 0) -> BaseFileLock | None:
    """A lock that ends with the process that holds it; None if another holds it, or there are no locks here."""
    from filelock import FileLock, Timeout

    # As for the lock of a run, never a SoftFileLock: its file outlives a killed process.
    lock = FileLock(path, timeout=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError):
        return None
    except OSError as error:
        if error.errno in (*FULL, *NOT_WRITABLE):
            raise
        return None
    return lock


def _remove_left_behind(cache_dir: Path) -> None:
    for folder in cache_dir.iterdir():
        if TEMPORARY.fullmatch(folder.name):
            if not (folder / "lock").exists():  # an earlier version wrote it, and may still do so
                with contextlib.suppress(OSError):
                    newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
                    if time.time() - newest > HOUR:
                        remove(folder)
            elif (lock := _acquire(folder / "lock")) is not None:
                lock.release()
                remove(folder)
        elif TEMPORARY_FILE.fullmatch(folder.name):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > HOUR:
                    remove(folder)


# ---- Listing and deleting --------------------------------------------------------------------------------------------


def list_caches(cache_dir: Path) -> list[tuple[str, int, str]]:
    """(key, bytes, source) of each data set in the cache, by name of the source."""
    caches = []
    for meta in cache_dir.glob("*/meta.json"):
        if KEY.fullmatch(meta.parent.name):
            size = sum(path.stat().st_size for path in meta.parent.iterdir())
            try:
                source = str(json.loads(meta.read_text(encoding="ascii"))["source"])
            except (OSError, ValueError, KeyError, TypeError):
                source = "damaged"
            caches.append((meta.parent.name, size, source))
    return sorted(caches, key=lambda cache: (cache[2], cache[0]))


def delete_cache(cache_dir: Path, key: str) -> None:
    """Delete one data set from the cache: first its name, so that nobody begins to read it."""
    with writing(cache_dir), _alone(cache_dir):
        gone = cache_dir / f".{key[:16]}-{uuid.uuid4().hex}"
        (cache_dir / key).rename(gone)
        remove(gone)
