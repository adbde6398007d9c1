"""SOURCES: where images come from: a folder of image files, a data set in the Hub's layout, or the drawn moons.

To find a source takes no more than the names, sizes and times of its files. They are its `identity`, which is part of
the cache key. Only if there is no such cache is the source opened, and yields its images one after the other, each with
a name. Images from files are still encoded (see decode.py); moons are drawn as pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_pipeline.decode import Payload

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".npy")
NUM_MOONS = {"train": 8192, "test": 1024}
MOON_SIZE = (32, 32)


@dataclass(frozen=True)
class Records:
    """The images of an opened source."""

    count: int
    payloads: Callable[[], Iterable[tuple[str, Payload]]]  # (name, encoded image) of each; every call starts again
    labels: list[Any] | None = None  # one for each image
    splits: tuple[str, ...] = ()  # all splits of the data set


@dataclass(frozen=True)
class Source:
    """A folder or data set of encoded images."""

    identity: list[Any]  # part of the cache key, as JSON: sources with equal identity have equal images
    description: str
    open: Callable[[Path], Records]  # its argument is a folder for temporary files, which must outlive the records


# ---- A folder of image files -----------------------------------------------------------------------------------------


def image_folder(root: Path, cache_dir: Path) -> Source:
    """All image files in a folder, at any depth, in the order of their paths.

    Raises:
        ValueError: no such folder, no image in it, or symbolic links that lead out of it.
    """
    if not root.is_dir():
        raise ValueError(f"train_data_dir is {str(root)!r}: there is no such folder")
    files, num_ignored = _list_images(root, cache_dir)
    if not files:
        suffixes = " ".join(sorted(SUFFIXES))
        raise ValueError(f"train_data_dir is {str(root)!r}: give a folder with images; their names end in {suffixes}")
    names = [name for name, _, _ in files]
    ignored = f" ({num_ignored} other files ignored)" if num_ignored else ""
    records = Records(len(names), lambda: ((name, root / name) for name in names))
    return Source(["folder", files], f"folder {root.resolve().name}{ignored}", lambda scratch: records)


def _list_images(root: Path, cache_dir: Path) -> tuple[list[tuple[str, int, int]], int]:
    """(path in root, bytes, time of change in ns) of all image files, sorted, and the number of other files."""
    files: list[tuple[str, int, int]] = []
    num_ignored = 0
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
                    num_ignored += 1
                elif is_link and not Path(os.path.realpath(path)).is_relative_to(real_root):
                    outside.append(name)
                elif not is_folder:
                    stat = entry.stat() if path.exists() else None  # a broken link is reported as unreadable later
                    files.append((name, stat.st_size if stat else -1, stat.st_mtime_ns if stat else 0))
                elif is_link:  # its images are listed where they are
                    num_ignored += 1
                elif path.resolve() != real_cache:  # whose .npy files are not images of the data set
                    folders.append(name)
    if outside:
        links = ", ".join(sorted(outside))
        raise ValueError(f"train_data_dir is {str(root)!r}: replace the symbolic links that lead out of it: {links}")
    return sorted(files), num_ignored


# ---- Parquet files and the Hub ---------------------------------------------------------------------------------------


def hub_dataset(name: str, config: str | None, split: str) -> Source:
    """What `datasets.load_dataset` loads by this name: a local folder of parquet files, or a data set on the Hub.

    Raises:
        ValueError: a local folder without parquet files; when opened: no such data set, config or split, or not exactly
            one column of images.
    """
    local = Path(name)
    files: list[Any] = [name]
    if local.is_dir():
        paths = sorted([*local.rglob("*.parquet"), *local.glob("README.md")])  # README.md may define configs and splits
        if not any(path.suffix == ".parquet" for path in paths):
            raise ValueError(
                f"dataset_name is {name!r}: this folder has no parquet file; if it has image files, give train_data_dir"
            )
        files = [(p.relative_to(local).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    description = f"data set {local.resolve().name if local.is_dir() else name}"
    description += f", config {config}" if config else ""
    return Source(
        ["dataset", files, config, split],
        f"{description}, split {split}",
        lambda scratch: _open_dataset(name, config, split, scratch),
    )


def _open_dataset(name: str, config: str | None, split: str, scratch: Path) -> Records:
    import datasets  # takes seconds to import, and a filled cache does not need it

    is_local = Path(name).is_dir()
    try:
        # datasets copies local files, so the copy is temporary. Downloads go into its own cache, to be shared.
        table = datasets.load_dataset(name, config, split=split, cache_dir=str(scratch) if is_local else None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        settings = f"dataset_name is {name!r}, dataset_config_name is {config!r}, split is {split!r}"
        problem = "it does not load" if is_local else "there is no such folder, and it does not load from the Hub"
        raise ValueError(f"{settings}: {problem}: {error}") from error

    features = dict(table.features)
    image_columns = [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    if len(image_columns) != 1:
        raise ValueError(
            f"dataset_name is {name!r}: its image columns are {image_columns} among {list(features)}: give a data set "
            "with one"
        )
    (images,) = image_columns
    label_columns = [
        column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel) or column == "label"
    ]
    labels = list(table[label_columns[0]]) if len(label_columns) == 1 else None
    splits = tuple(str(split) for split in table.info.splits or ())
    table = table.select_columns([images])
    if isinstance(features[images], datasets.Image):
        table = table.cast_column(images, datasets.Image(decode=False))  # decode.py decodes, as for folders

    def payloads() -> Iterator[tuple[str, Payload]]:
        cells = (cell for batch in table.iter(256) for cell in batch[images])
        for i, cell in enumerate(cells):
            data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
            file = Path(path) if path else None
            yield f"row {i} ({file.name})" if file else f"row {i}", file if data is None else data

    return Records(len(table), payloads, labels, splits)


# ---- The moons -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moons:
    """The built-in data set, drawn at any size. The splits have different seeds."""

    split: str
    size: tuple[int, int]

    @property
    def count(self) -> int:
        return NUM_MOONS[self.split]

    @property
    def seed(self) -> int:
        return list(NUM_MOONS).index(self.split)

    @property
    def identity(self) -> list[Any]:
        return ["moons", self.split, NUM_MOONS]

    @property
    def description(self) -> str:
        return f"{self.count} moons, drawn with seed {self.seed}, {self.size[0]} x {self.size[1]}"

    def images(self) -> Iterator[np.ndarray]:
        """(1, H, W) uint8 of each moon."""
        from ddpm_pipeline.moons import MoonDataset

        moons = MoonDataset(self.count, size=self.size, seed=self.seed)
        chunk = max(1, 2**23 // (self.size[0] * self.size[1]))  # of 8 MiB
        for start in range(0, self.count, chunk):
            yield from moons.images(range(start, min(start + chunk, self.count))).numpy()
