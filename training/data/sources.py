"""FILES TO PIXELS: pictures from a folder, the Hub or the moons become one memory-mapped array, decoded once.

This is the only place that knows files. `load_images` reads every picture twice: a quick pass over the headers settles
what all must share (size, channels, 8 or 16 bits), a second pass decodes. Then the array is kept in a cache, named by a
hash of everything it depends on, and the next run maps it into memory and starts at once.

    <cache_dir>/<key>/images.npy   (N, C, H, W) uint8 or uint16
    <cache_dir>/<key>/names.txt    for each a line of JSON: its name, and its label if the data set has labels
    <cache_dir>/<key>/meta.json    what it was made from, which pictures were left out and why, the data set's splits

What a picture means: its first frame, turned upright as its EXIF says, composited on a background where it is
transparent. All gray pictures give 1 channel, any colour gives 3. If one picture is 16-bit gray, all become 16-bit:
x 257, which maps 0..255 onto 0..65535. More channels come as .npy files of (H, W, C). `convert("RGB")` alone would get
much of this wrong: it shows the colours hidden under alpha and clips 16-bit gray to white.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.data.decode import Payload

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".npy")


class _Opened(NamedTuple):
    number: int
    rows: Callable[[], Iterable[tuple[str, Payload]]]  # (name, payload) of each picture
    labels: list[Any] | None = None
    splits: tuple[str, ...] = ()


class _Source(NamedTuple):
    identity: list[Any]  # goes into the cache key: equal identity, equal pictures
    words: str
    open: Callable[[Path], _Opened]  # takes a folder for what is needed now only


def _image_folder(root: Path, cache_dir: Path) -> _Source:
    if not root.is_dir():
        raise ValueError(f"train_data_dir is {str(root)!r}: there is no such folder")
    files, others = [], 0
    real_root, real_cache, outside = root.resolve(), cache_dir.resolve(), []
    folders = [""]
    while folders:
        with os.scandir(root / folders.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                name = path.relative_to(root).as_posix()
                is_link, is_folder = entry.is_symlink(), path.is_dir()
                is_image = entry.name.lower().endswith(SUFFIXES)
                if entry.name.startswith(".") or not (is_image or is_folder):
                    others += 1
                elif is_link and not Path(os.path.realpath(path)).is_relative_to(real_root):
                    outside.append(name)
                elif not is_folder:
                    stat = entry.stat() if path.exists() else None  # of a link that leads nowhere: a bad image, later
                    files.append((name, stat.st_size if stat else -1, stat.st_mtime_ns if stat else 0))
                elif is_link:  # its pictures are listed where they are
                    others += 1
                elif path.resolve() != real_cache:  # our own .npy files are not pictures
                    folders.append(name)
    if outside:
        raise ValueError(f"links lead out of train_data_dir {str(root)!r}: {', '.join(sorted(outside))}")
    if not files:
        raise ValueError(f"train_data_dir is {str(root)!r}: no image in it; images end in {' '.join(sorted(SUFFIXES))}")
    files.sort()
    words = f"folder {real_root.name}" + (f" ({others} other files ignored)" if others else "")
    names = [name for name, _, _ in files]
    opened = _Opened(len(names), lambda: ((name, root / name) for name in names))
    return _Source(["folder", files], words, lambda scratch: opened)


def _dataset(name: str, config: str | None, split: str) -> _Source:
    """What `datasets.load_dataset` finds by this name, in a local folder or on the Hub."""
    local = Path(name)
    identity: list[Any] = [name]
    if local.is_dir():
        paths = sorted([*local.rglob("*.parquet"), *local.glob("README.md")])  # the README can name configs and splits
        if not any(path.suffix == ".parquet" for path in paths):
            raise ValueError(f"dataset_name is {name!r}: no .parquet in it; for image files give train_data_dir")
        identity = [(p.relative_to(local).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    def open_table(scratch: Path) -> _Opened:
        import datasets  # takes seconds, and a filled cache needs none of it

        try:
            # A copy of local files is of use only now; downloads go where the user expects and finds them again.
            table = datasets.load_dataset(name, config, split=split, cache_dir=str(scratch) if local.is_dir() else None)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            given = f"dataset_name is {name!r}, dataset_config_name is {config!r}, split is {split!r}"
            kind = "in this folder" if local.is_dir() else 'not "moons", no local folder, and on the Hub'
            raise ValueError(f"{given}: {kind}: {error}") from error
        features = dict(table.features)
        columns = [
            column
            for column, kind in features.items()
            if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
        ]
        if len(columns) != 1:
            raise ValueError(
                f"dataset_name is {name!r}: image columns are {columns} among {list(features)}; one is needed"
            )
        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel) or name == "label"]
        labels = list(table[classes[0]]) if len(classes) == 1 else None
        splits = tuple(str(split) for split in table.info.splits or ())
        table = table.select_columns(columns)
        if isinstance(features[columns[0]], datasets.Image):
            table = table.cast_column(columns[0], datasets.Image(decode=False))  # one decoder for both routes: ours

        def rows() -> Iterator[tuple[str, Payload]]:
            cells = (cell for batch in table.iter(256) for cell in batch[columns[0]])
            for i, cell in enumerate(cells):
                data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
                file = Path(path) if path else None
                yield f"row {i} ({file.name})" if file else f"row {i}", file if data is None else data

        return _Opened(len(table), rows, labels, splits)

    words = f"data set {local.resolve().name if local.is_dir() else name}" + (f", config {config}" if config else "")
    return _Source(["dataset", identity, config, split], f"{words}, split {split}", open_table)
