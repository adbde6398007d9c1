"""FILES: a file or folder is written beside its place and put there when it is whole, so that readers never see half."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block ends, what was written there replaces `path`.

    If the block raises, what was written is removed and `path` is as it was. The parent folder must exist. A folder is
    replaced in two renames: killed between them, the old one is left as `<name>.old`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f"{path.name}.old")
    remove(temporary)  # of a process with the same id that was killed
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            remove(old)
            path.rename(old)
        temporary.replace(path)
        remove(old)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
