"""SOURCES: where images come from: a data set in the Hub's layout, or the drawn moons. folder.py has folders of images.

The `identity` of a source has the hash of its content, and is part of the cache key. Only if there is no such cache is
the source opened, and yields its images one after the other, each with a name. Images from files are still encoded (see
decode.py); moons are drawn as pixels.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_pipeline.decode import Payload
from ddpm_pipeline.files import replacing
from training.data.content import hash_content, stat_of
from training.messages import some

NUM_MOONS = {"train": 8192, "test": 1024}
MOON_SIZE = (32, 32)


@dataclass(frozen=True)
class Records:
    """The images of an opened source."""

    count: int
    # (name, encoded image) of the images with these numbers
    payloads: Callable[[Sequence[int]], Iterable[tuple[str, Payload]]]
    labels: Sequence[Any] | None = None  # one for each image, None where it has none
    class_names: tuple[str, ...] | None = None  # the labels in the order of the data set; None: they have no order
    splits: tuple[str, ...] = ()  # all splits of the data set


@dataclass(frozen=True)
class Source:
    """A folder or data set of encoded images."""

    identity: list[Any]  # part of the cache key, as JSON: sources with equal identity have equal images
    description: str
    open: Callable[[Path], Records]  # its argument is a folder for temporary files, which must outlive the records
    notes: tuple[str, ...] = ()  # what is left out and why


# ---- Parquet files and the Hub ---------------------------------------------------------------------------------------


def hub_dataset(
    name: str,
    config: str | None,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    index_dir: Path,
) -> Source:
    """What `datasets.load_dataset` loads by this name: a local folder of parquet files, or a data set on the Hub.

    Raises:
        ValueError: a local folder without parquet files; when opened: no such data set, config, split or column of
            labels, or no or several columns of images and none chosen.
    """
    local = Path(name).expanduser()
    revision = None
    if local.is_dir():
        name = str(local)
        paths = sorted([*local.rglob("*.parquet"), *local.glob("README.md")])  # README.md may define configs and splits
        if not any(path.suffix == ".parquet" for path in paths):
            raise ValueError(
                f"dataset_name is {name!r}: this folder has no parquet file; if it has image files, give "
                "train_data_dir, if it has tar files or packed shards, add --streaming"
            )
        broken = [path.relative_to(local).as_posix() for path in paths if not path.exists()]
        if broken:
            raise ValueError(f"dataset_name is {name!r}: links that lead nowhere: {some(broken)}: replace them")
        files = [(path.relative_to(local).as_posix(), stat_of(path.stat())) for path in paths]
        content: str | None = hash_content(local, files, index_dir)
    else:
        content = revision = hub_commit(name, index_dir)
    known_as = local.resolve().name if local.is_dir() else name
    description = f"data set {known_as}"
    description += f", config {config}" if config else ""
    description += f", column {image_column}" if image_column else ""
    return Source(
        ["dataset", known_as, content, config, split, image_column, label_column],
        f"{description}, split {split}",
        lambda scratch: _open_dataset(name, config, split, image_column, label_column, revision, scratch),
    )


def hub_commit(name: str, index_dir: Path) -> str | None:
    """The current commit of a data set on the Hub; without a connection the last that was seen; None: not known."""
    from huggingface_hub import HfApi, constants

    index = index_dir / "hub.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(index.read_text(encoding="utf-8"))
    if constants.HF_HUB_OFFLINE:
        return known.get(name)
    try:
        commit = HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # of several libraries, some of which are no OSError; load_dataset says what is wrong
        return known.get(name)
    if commit is not None and known.get(name) != commit:
        with contextlib.suppress(OSError):
            index_dir.mkdir(parents=True, exist_ok=True)
            with replacing(index) as temporary:
                temporary.write_text(json.dumps(known | {name: commit}), encoding="utf-8")
    return commit


def _open_dataset(
    name: str,
    config: str | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    scratch: Path,
) -> Records:
    import datasets  # takes seconds to import, and a filled cache does not need it

    is_local, place = Path(name).is_dir(), name
    if is_local and glob.escape(name) != name:  # datasets would take the folder's name for a pattern
        place = str(scratch / "data")
        shutil.copytree(Path(name).resolve(), place, copy_function=os.symlink)
    try:
        # datasets copies local files, so the copy is temporary. Downloads go into its own cache, to be shared.
        table = datasets.load_dataset(
            place, config, split=split, revision=revision, cache_dir=str(scratch) if is_local else None
        )
    except Exception as error:  # of several libraries: a connection that fails is no OSError
        settings = f"dataset_name is {name!r}, dataset_config_name is {config!r}, split is {split!r}"
        problem = "it does not load" if is_local else "there is no such folder, and it does not load from the Hub"
        if "scripts are no longer supported" in str(error):
            problem += "; remove the loading script, or give the folder of its parquet files"
        raise ValueError(f"{settings}: {problem}: {error}") from error

    features = dict(table.features)
    images = image_column_of(name, features, image_column)
    labels, class_names = _labels(table, label_column)
    splits = tuple(str(split) for split in table.info.splits or ())
    table = table.select_columns([images])
    if isinstance(features[images], datasets.Image):
        table = table.cast_column(images, datasets.Image(decode=False))  # decode.py decodes, as for folders

    def payloads(numbers: Sequence[int]) -> Iterator[tuple[str, Payload]]:
        for start in range(0, len(numbers), 256):
            rows = numbers[start : start + 256]
            for i, cell in zip(rows, table[rows][images]):
                data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
                file = Path(path) if path else None
                yield f"row {i} ({file.name})" if file else f"row {i}", file if data is None else data

    return Records(len(table), payloads, labels, class_names, splits)


def _labels(table: Any, chosen: str | None) -> tuple[list[Any] | None, tuple[str, ...] | None]:
    """The labels of a data set, and their order: of the chosen column, or the only one of classes, or none."""
    column = label_column_of(dict(table.features), chosen)
    return (None, None) if column is None else label_values(table.features[column], table[column])


def label_column_of(features: dict[str, Any], chosen: str | None) -> str | None:
    """The column of labels: the chosen one, or the only one of classes or called label; None: there is none.

    Raises:
        ValueError: there is no column of the chosen name.
    """
    import datasets

    columns = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel) or name == "label"]
    if chosen is None:
        return columns[0] if len(columns) == 1 else None
    if chosen not in features:
        allowed = some(columns or list(features))
        raise ValueError(f"label_column is {chosen!r}: the data set has no such column: give {allowed}")
    return chosen


def label_values(feature: Any, values: Iterable[Any]) -> tuple[list[Any], tuple[str, ...] | None]:
    """The labels in a column of this feature, None where there is none, and the order of its classes."""
    import datasets

    if not isinstance(feature, datasets.ClassLabel):
        return [json_label(label) for label in values], None
    names = tuple(feature.names)
    # -1 is "no label", as in a test split whose labels are secret.
    return [names[label] if label is not None and 0 <= label < len(names) else None for label in values], names


def image_column_of(name: str, features: dict[str, Any], chosen: str | None) -> str:
    """The column of images: the chosen one, or the only one.

    Raises:
        ValueError: there is none, or there are several and none is chosen.
    """
    import datasets

    columns = [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    if chosen in columns:
        return str(chosen)
    if chosen is not None:
        allowed = some(columns) or f"another data set, none of its columns has images: {some(list(features))}"
        raise ValueError(f"image_column is {chosen!r}: give {allowed}")
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise ValueError(f"dataset_name is {name!r}: its image columns are {some(columns)}: choose one by image_column")
    raise ValueError(
        f"dataset_name is {name!r}: none of its columns has images: {some(list(features))}: give another data set"
    )


def json_label(label: Any) -> str | int | float | bool | None:
    """A label as JSON has it: whatever else it is, such as a list or a date, becomes text. None: there is none."""
    if isinstance(label, bytes):
        return label.decode("utf-8", errors="backslashreplace")
    if isinstance(label, float) and math.isnan(label):  # not equal to itself, so that each would be a class
        return None
    if label == "":
        return None
    return label if label is None or isinstance(label, str | int | float) else str(label)


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
