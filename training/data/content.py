"""CONTENT: a hash of what is in files, and an index that remembers it while nothing about the files has changed.

Names, sizes and times do not tell two folders apart: archives, containers and some file systems give every file the
same time. So the key of a cache has a hash of the content. Reading 100,000 files takes long, hence the index: it keeps
the hash together with size, times and inode of every file, and the files are read again if any of these differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ddpm_pipeline.files import replacing
from training.progress import progress

WHOLE = 64 * 2**20  # bytes; a file up to this size is read whole
ENDS, SAMPLE, NUM_SAMPLES = 4 * 2**20, 2**18, 64  # of a larger one: head and tail, and samples spread over the rest
SECOND = 10**9  # ns
COARSE_TICK, FINE_TICK = 3 * SECOND, SECOND // 10  # longer than a tick of any file system's clock

Stat = tuple[int, ...]  # size, mtime, ctime, inode, device


def stat_of(stat: os.stat_result) -> Stat:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def hash_content(root: Path, files: Sequence[tuple[str, Stat]], index_dir: Path) -> str:
    """SHA-256 of the names (paths in root) and contents of files, from the index if none of them has changed.

    Args:
        index_dir: folder of the indices, one for each root.
    """
    fingerprint = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    place = hashlib.sha256(os.path.realpath(root).encode(errors="surrogateescape")).hexdigest()
    index = index_dir / f"{place[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no index, or a damaged one
        known: dict[str, str] = json.loads(index.read_text(encoding="ascii"))
        if isinstance(known[fingerprint], str):
            return known[fingerprint]

    begin = time.time_ns()
    content = hashlib.sha256()
    for name, stat in progress(files, "hashing files", len(files), unit=" files"):
        content.update(json.dumps([name, hash_file(root / name, stat[0])]).encode())
    if all(_is_settled(stat, begin) for _, stat in files):
        _remember(index, fingerprint, content.hexdigest())
    return content.hexdigest()


def _is_settled(stat: Stat, now: int) -> bool:
    """Whether a change after `now` gives a file other times than these: not within the same tick of the clock."""
    _, mtime, ctime, *_ = stat
    tick = FINE_TICK if mtime % SECOND and ctime % SECOND else COARSE_TICK  # some file systems have whole seconds only
    return max(mtime, ctime) < now - tick


def hash_file(path: Path, size: int) -> str:
    """SHA-256 of a file; of a large one, of its size and of parts of it. A file that cannot be read has a hash too."""
    try:
        with open(path, "rb") as file:
            if size <= WHOLE:
                return hashlib.file_digest(file, "sha256").hexdigest()
            parts = hashlib.sha256(f"{size} ".encode())
            step = (size - 2 * ENDS - SAMPLE) // (NUM_SAMPLES - 1)
            for start, length in [
                (0, ENDS),
                *((ENDS + i * step, SAMPLE) for i in range(NUM_SAMPLES)),
                (size - ENDS, ENDS),
            ]:
                file.seek(start)
                parts.update(file.read(length))
            return parts.hexdigest()
    except OSError:
        return "unreadable"


def _remember(index: Path, fingerprint: str, content: str) -> None:
    """Add to an index, which keeps the last few listings: the splits of a folder have one each."""
    with contextlib.suppress(OSError):  # a cache that cannot be written is still of use
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(index.read_text(encoding="ascii"))
        known = dict([*known.items(), (fingerprint, content)][-8:])
        index.parent.mkdir(parents=True, exist_ok=True)
        with replacing(index) as temporary:
            temporary.write_text(json.dumps(known), encoding="ascii")
