"""FILES: atomic replacement. A file or folder is written under a temporary name and renamed when it is complete."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder to write to; when the block ends, it is renamed to `path`.

    If the block raises, the temporary path is removed and `path` is unchanged. The parent folder must exist. A folder
    is replaced in two renames: a process that is killed between them leaves the old one as `.<name>.old`.
    """
    path = Path(path)
    # Threads, and processes of one id on two machines, may write the same path.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        if temporary.is_dir():
            _replace_folder(temporary, path)
        else:
            temporary.replace(path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not tell
        raise


def model_name(model: str) -> str:
    """What a model is called, without the path of its folder: runs/moons/pipeline is "moons"."""
    path = Path(model).expanduser()
    if not path.exists():
        return model  # on the Hub
    path = path.resolve()
    return path.parent.name if path.name == "pipeline" else path.name


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(new: Path, path: Path) -> None:
    """No operating system replaces a folder that is not empty, so the old one is renamed first."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        remove(old)
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    remove(old)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
