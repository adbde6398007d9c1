"""SHARD CACHE: shards as arrays on this machine's disk, decoded once, within a bound; the least recently used ones go.

    <cache_dir>/<key>/<key of a shard>.npy   (n, C, H, W) uint8 or uint16
    <cache_dir>/<key>/<key of a shard>.json  [[row, "name: reason"], ...] of the images that cannot be read, if any
    <cache_dir>/<key>/<key of a shard>.shorter  the shard was shorter than it should be: another run fetches it anew
    <cache_dir>/<key>/meta.json              the source

The processes of a machine share it: a file is complete or absent, and a lock keeps two from fetching the same shard.
Packed shards that are on this machine already are used where they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_pipeline.decode import Payload, Target, decode, failure_reason, read_header
from ddpm_pipeline.files import replacing
from training.data import stores
from training.data.cache import attempt
from training.data.disk import HOUR, writing
from training.data.shard_content import digest_of, is_whole, packed_array, rows
from training.data.shards import Shard, ShardList
from training.data.stores import ShardError

SHORTER = ".shorter"  # beside the array of a shard that was shorter than it should be
Opened = tuple[np.ndarray, dict[int, str]]  # the images, memory-mapped, and "name: reason" of those that are none


@dataclass(frozen=True)
class ShardCache:
    """The arrays of a list of shards.

    Args:
        found: the shards.
        target: what their images are decoded to; None: they are packed.
        shape, dtype: of an image, (C, H, W).
        min_side: shortest allowed side in pixels; a smaller image counts as unreadable.
        folder: of this cache.
        limit: bytes of the arrays together.
        stopped: once it is set, nothing more is fetched.
    """

    found: ShardList
    target: Target | None
    shape: tuple[int, int, int]
    dtype: np.dtype
    min_side: int
    folder: Path
    limit: int
    stopped: threading.Event
    checked: dict[int, int] = field(default_factory=dict)  # packed shards on this machine: the time of their content

    def bytes_of(self, shards: Collection[int]) -> int:
        """What these shards take up here when all are fetched."""
        image = math.prod(self.shape) * self.dtype.itemsize
        return sum(self.found.shards[i].count * image for i in shards if not self.is_in_place(i))

    def is_in_place(self, i: int) -> bool:
        """Whether this is a packed shard on this machine, of the size that it should have."""
        file = self.found.shards[i].file
        if self.target is not None or stores.is_remote(file.url):
            return False
        try:
            return os.path.getsize(file.url) == file.size
        except OSError as error:
            raise ShardError(f"{file.name} cannot be read: {error.strerror}") from error

    def path(self, i: int) -> Path:
        shard = self.found.shards[i]
        key = json.dumps([shard.file.name, shard.file.size, shard.file.version, shard.digest])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"

    # ---- Reading -----------------------------------------------------------------------------------------------------

    def open(self, i: int) -> Opened:
        """The images of shard i, fetched if they are not here.

        Raises:
            ShardError: it cannot be read.
        """
        shard = self.found.shards[i]
        if self.is_in_place(i):
            self._check_in_place(i)
            return self._packed(i, Path(shard.file.url)), {}
        path = self.path(i)
        for _ in range(3):  # another run may delete it in between
            self.fetch(i)
            with contextlib.suppress(OSError, ValueError, EOFError):
                unreadable: dict[int, str] = {}
                with contextlib.suppress(FileNotFoundError):
                    unreadable = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
                array = np.load(path, mmap_mode="r")
                os.utime(path)  # the time of the last use
                return array, unreadable
            path.unlink(missing_ok=True)  # a power cut may leave a part of it
        raise ShardError(f"{shard.file.name} cannot be kept in {self.folder}")

    def forget_shorter(self) -> None:
        """Delete the arrays of shards that were shorter than they should be: they may be whole by now."""
        for mark in self.folder.glob(f"*{SHORTER}") if self.folder.is_dir() else ():
            for suffix in (".npy", ".json", SHORTER):
                mark.with_suffix(suffix).unlink(missing_ok=True)

    def _check_in_place(self, i: int) -> None:
        """Compare a packed shard on this machine with its sha256, once, and again when its time has changed.

        Raises:
            ShardError: it cannot be read or is another file.
        """
        shard = self.found.shards[i]
        try:
            changed = os.stat(shard.file.url).st_mtime_ns
        except OSError as error:
            raise ShardError(f"{shard.file.name} cannot be read: {error.strerror}") from error
        if self.checked.get(i) != changed:
            self._check(shard, Path(shard.file.url))
            self.checked[i] = changed

    def make_room(self, needed: Collection[int]) -> None:
        """Delete what was not used for longest, and is not needed, until all that is needed fits into the limit."""
        keep = {self.path(i): i for i in needed if not self.is_in_place(i)}
        missing = self.bytes_of([i for path, i in keep.items() if not path.exists()])
        files, now = [], time.time()
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                    status = entry.stat()
                    if entry.name.startswith(".") and now - status.st_mtime > HOUR:  # of a killed process
                        Path(entry.path).unlink()
                    else:
                        files.append((status.st_mtime, status.st_size, Path(entry.path)))
        excess = sum(size for _, size, _ in files) + missing - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            if path.suffix == ".npy" and not path.name.startswith(".") and path not in keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                    for suffix in (".json", SHORTER):
                        path.with_suffix(suffix).unlink(missing_ok=True)
                    excess -= size

    # ---- Fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, i: int) -> None:
        """Make sure that the array of shard i is here; any process and thread may do so.

        Raises:
            ShardError: it cannot be read; CacheError: it cannot be written.
        """
        path = self.path(i)
        if self.is_in_place(i) or path.exists():
            return
        if self.stopped.is_set():
            raise ShardError(f"{self.found.shards[i].file.name} is not read: the run ends")
        with writing(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone(i, path):
                if not path.exists():
                    self._write(i, path)

    @contextlib.contextmanager
    def _alone(self, i: int, path: Path) -> Iterator[None]:
        """Without locks on this file system two processes may fetch the same shard; the second one replaces it."""
        from filelock import FileLock, Timeout

        lock = FileLock(path.with_name(f".{path.stem}.lock"), fallback_to_soft=False)
        with contextlib.suppress(NotImplementedError):
            while not lock.is_locked:
                if self.stopped.is_set():
                    raise ShardError(f"{self.found.shards[i].file.name} is not read: the run ends")
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=1)
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)

    def _write(self, i: int, path: Path) -> None:
        shard = self.found.shards[i]
        raw = Path(shard.file.url)
        if stores.is_remote(shard.file.url):
            raw = self.folder / f".raw-{uuid.uuid4().hex}"
        try:
            if raw.parent == self.folder:
                stores.patiently(shard.file.name, lambda: stores.download(shard.file, raw, self.stopped), self.stopped)
            is_shorter = self._check(shard, raw)
            if self.target is not None:
                self._write_decoded(i, self._pixels(i, raw), path)
            elif is_shorter:
                self._write_decoded(i, self._rest_of_packed(i, raw), path)
            else:
                self._packed(i, raw)
                with replacing(path) as temporary:
                    if raw.parent == self.folder:
                        raw.replace(temporary)
                    else:  # of the user: it stays where it is
                        shutil.copyfile(raw, temporary)
            if is_shorter:
                path.with_suffix(SHORTER).touch()
        finally:
            if raw.parent == self.folder:
                raw.unlink(missing_ok=True)

    def _check(self, shard: Shard, raw: Path) -> bool:
        """Whether a copy of a shard is shorter than it should be. What it has lost is named later.

        Raises:
            ShardError: it cannot be read or is another file.
        """
        try:
            if raw.stat().st_size < shard.file.size and not is_whole(self.found, raw):
                return True
            digest = digest_of(self.found, raw)
        except OSError as error:
            raise ShardError(f"{shard.file.name} cannot be read: {error.strerror or error}") from error
        if digest != shard.digest:
            damaged = "damaged: its sha256 is not that of the manifest"
            changed = "another file than when the run began: put the former one back, or begin a new run"
            raise ShardError(f"{shard.file.name} is {changed if self.target else damaged}")
        return False

    def _write_decoded(self, i: int, images: Iterator[np.ndarray | str], path: Path) -> None:
        """Write images, and of those that cannot be read the reason."""
        count = self.found.shards[i].count
        unreadable: list[tuple[int, str]] = []
        empty = bytes(math.prod(self.shape) * self.dtype.itemsize)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *self.shape)})
                for row, image in enumerate(images):
                    if isinstance(image, str):
                        unreadable.append((row, image))
                    file.write(empty if isinstance(image, str) else image.tobytes())
            if unreadable:
                path.with_suffix(".json").write_text(json.dumps(unreadable), encoding="utf-8")

    def _pixels(self, i: int, raw: Path) -> Iterator[np.ndarray | str]:
        """The pixels of each image, or "name: reason"; as many as the shard is to have."""
        assert self.target is not None
        shard, row = self.found.shards[i], 0
        work = partial(decode_checked, target=self.target, min_side=self.min_side)
        try:
            for row, (name, payload) in enumerate(rows(self.found, raw)):
                if row == shard.count:
                    raise ShardError(f"{shard.file.name} has more than {shard.count} images: it has changed")
                if self.stopped.is_set():
                    raise ShardError(f"{shard.file.name} is not read: the run ends")
                image, reason = attempt(work, payload)
                yield f"{name}: {reason}" if image is None else image
                row += 1
        except ShardError:
            raise
        except Exception as error:  # of pyarrow or tarfile: the rest of the file cannot be read
            if isinstance(error, OSError) and error.errno is not None:  # of the disk: the next attempt may succeed
                raise ShardError(f"{shard.file.name} cannot be read: {error.strerror}") from error
            reason = failure_reason(error)
        else:
            reason = "missing"
        for lost in range(row, shard.count):
            yield f"row {lost}: {reason}"

    def _rest_of_packed(self, i: int, raw: Path) -> Iterator[np.ndarray | str]:
        array = self._packed(i, raw)
        yield from array
        for row in range(len(array), self.found.shards[i].count):
            yield f"row {row}: the file is cut off"

    def _packed(self, i: int, raw: Path) -> np.ndarray:
        shard = self.found.shards[i]
        try:
            return packed_array(self.found, shard, raw)
        except ValueError as error:
            raise ShardError(f"{shard.file.name} is damaged: {error}") from error


def decode_checked(payload: Payload, target: Target, min_side: int) -> np.ndarray:
    """The image, if its header is as read_header wants it."""
    read_header(payload, min_side)
    return decode(payload, target)
