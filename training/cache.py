"""CACHE: list the data sets in the cache of decoded images, and delete some.

    python -m training.cache
    python -m training.cache --delete 1a2b3c4d
    python -m training.cache --delete all

Exit codes: 0 done; 2 a mistake in the command, or the cache cannot be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.command_line import parse_dataclass
from training.data.disk import delete_cache, list_caches
from training.messages import some


@dataclass(frozen=True)
class CacheConfig:
    """What to list or delete.

    Args:
        cache_dir: folder of the cache, as for train.py.
        delete: keys to delete, or their first characters, separated by commas, or all; default: only list them.
    """

    cache_dir: str = "~/.cache/ddpm_pipeline"
    delete: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_dataclass(CacheConfig, arguments, description="List or delete caches of decoded images.")
    cache_dir = Path(config.cache_dir).expanduser()
    caches = list_caches(cache_dir)
    try:
        chosen = _chosen(caches, config.delete)
        for key, _, _ in chosen:
            delete_cache(cache_dir, key)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    for key, size, source in chosen if config.delete else caches:
        print(f"{'deleted ' if config.delete else ''}{key[:12]}  {size / 2**20:9.1f} MiB  {source}")
    if not caches:
        print(f"no data set in {cache_dir}")
    return 0


def _chosen(caches: list[tuple[str, int, str]], wanted: Sequence[str]) -> list[tuple[str, int, str]]:
    if tuple(wanted) == ("all",):
        return caches
    chosen = []
    for start in wanted:
        found = [cache for cache in caches if start and cache[0].startswith(start)]
        if len(found) != 1:
            keys = some([key[:12] for key, _, _ in caches]) or "nothing, the cache is empty"
            raise ValueError(f"delete is {start!r}: it begins {len(found)} keys: give {keys}, or all")
        chosen += found
    return list(dict.fromkeys(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
