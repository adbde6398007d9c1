"""SHARDS: data sets in files of many images each: what is in them, and one image after the other.

| kind | is | the number of images comes from |
|---|---|---|
| packed | what pack.py writes: arrays of pixels at the size of training, and manifest.json | the manifest |
| parquet | tables with a column of encoded images, as on the Hub | the end of each file |
| webdataset | tar files; the files of a sample have the same name up to the first dot | reading them once |

A list of shards with all numbers is known before training: the order of the images depends on nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddpm_pipeline.decode import Payload
from ddpm_pipeline.files import replacing, sha256_of
from training.data import stores
from training.data.disk import writing
from training.data.sources import hub_commit, image_column_of, label_column_of, label_values
from training.data.stores import SHARDS, TARS, ShardError, StoredFile
from training.data.tars import DAMAGED, images_of, label_of, samples, tar_rows
from training.messages import some
from training.progress import progress

MANIFEST, INDEX = "manifest.json", "index.json"
PACKED_FORMAT = "ddpm_pipeline shards 1"
INDEX_ENTRY = {"labels", "others", "damaged", "digest"}  # of a tar file
FOOTER = 2**16  # bytes at the end of a parquet file that are read first; its footer is seldom larger
# The words of the library datasets; a part of validation images keeps its name.
SPLITS = {name: name for name in ("train", "validation", "valid", "val", "test")}
SPLITS |= {"training": "train", "dev": "validation", "testing": "test", "eval": "test", "evaluation": "test"}
SPLIT_IN_NAME = re.compile(rf"(?:^|[^a-z])({'|'.join(SPLITS)})(?=[^a-z]|$)")


@dataclass(frozen=True)
class Shard:
    """A file with `count` images.

    Args:
        digest: sha256 of its content; of a parquet file, which is not read for it, that of its footer, which has the
            sizes and the least and largest values of its columns.
        labels: of its samples where they were read on the way (webdataset), None where one has none.
    """

    file: StoredFile
    count: int
    digest: str
    labels: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class ShardList:
    """The shards of one split of a data set.

    Args:
        description: of the data set, for the log.
        splits: all splits of the data set.
        notes: which shards are left out or damaged.
        shape, dtype: of the images of packed shards, (C, H, W); None and "" for others.
        image_column, label_column: of parquet files.
        labels_file, labels_sha256: of packed shards, (N,) int32, indices into class_names, or -1.
        class_names: the order of the labels; None: they have none.
    """

    kind: Literal["packed", "parquet", "webdataset"]
    shards: tuple[Shard, ...]
    description: str
    splits: tuple[str, ...]
    notes: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None
    dtype: str = ""
    image_column: str | None = None
    label_column: str | None = None
    label_feature: Any = None
    labels_file: str | None = None
    labels_sha256: str | None = None
    class_names: tuple[str, ...] | None = None


def find_shards(
    place: str,
    *,
    split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    index_dir: Path,
) -> ShardList:
    """The shards of a split.

    Args:
        place: a folder, a pattern such as shard-{000..999}.tar, a URL of either, or the name of a data set on the Hub.
        split: files are in the split that their name or folder has, such as train-00000-of-00010.parquet; if no name
            has one, all are in train.
        config: a folder that the files are in.
        index_dir: where the number of samples of a tar file is kept.
    Raises:
        ValueError: there are no shards of this split.
        ShardError: the place cannot be read.
    """
    description = f"data set {place.rstrip('/').rpartition('/')[2] or place}"
    local = Path(place).expanduser()
    if not stores.is_remote(place) and (local.exists() or stores.RANGE.search(place)):
        place = str(local)
    elif not stores.is_remote(place):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise ValueError(f"there are no shards in {place!r}: give a folder, a URL or the name of a data set")
        commit = hub_commit(place, index_dir)
        description, place = f"data set {place}", f"hf://datasets/{place}" + (f"@{commit}" if commit else "")
    given = re.search(rf"/({MANIFEST}|{INDEX})$", place)
    place = place[: given.start()] if given else place
    if not stores.RANGE.search(place) and not stores.path_of(place).endswith(SHARDS):
        manifest = None if given and given[1] == INDEX else _read_json(join(place, MANIFEST))
        if manifest is not None:
            try:
                return _packed(place, description, manifest, split)
            except (KeyError, TypeError, AttributeError) as error:
                raise ShardError(f"{join(place, MANIFEST)} is damaged: {type(error).__name__} {error}") from error
        index = _read_json(join(place, INDEX)) if place.startswith("http") else None
        if index is not None:
            try:
                names = [str(shard["url"]) for shard in index["shardlist"]]
            except (KeyError, TypeError):
                raise ShardError(f'{join(place, INDEX)} has no {{"shardlist": [{{"url": ...}}, ...]}}') from None
            urls = [name if "://" in name else join(place, name) for name in names]
            files = stores.stat_all([(url, stores.path_of(url).removeprefix(join(place, ""))) for url in urls])
            return _of_files(files, place, description, split, config, image_column, label_column, index_dir)
    files = stores.list_files(place)
    if place.startswith("hf://") and config is None:
        _check_one_config(files, split, description)
    return _of_files(files, place, description, split, config, image_column, label_column, index_dir)


def _check_one_config(files: list[StoredFile], split: str, description: str) -> None:
    """On the Hub each configuration of a data set has a folder."""
    folders = {file.name.partition("/")[0] for file in files if _is_shard_of(file, split) and "/" in file.name}
    if len(configs := sorted(name for name in folders if not SPLIT_IN_NAME.search(name.lower()))) > 1:
        raise ValueError(f"dataset_config_name is None: give one, {description} has the folders {some(configs)}")


def _is_shard_of(file: StoredFile, split: str) -> bool:
    return file.name.endswith(SHARDS) and split_of(file.name) == split


def is_sharded(place: str) -> bool:
    """Whether find_shards may find shards there: whether it is not the moons or a folder of images."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return place != "moons"
    return any(path.name == MANIFEST or path.name.endswith(SHARDS) for path in folder.rglob("*"))


def _read_json(url: str) -> dict[str, Any] | None:
    """A small file; None if it does not exist."""
    content = stores.read_optional(url)
    try:
        return None if content is None else dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{url} is damaged: {error}") from error


def is_packed(folder: Path) -> bool:
    """Whether pack.py has written this folder."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format") == PACKED_FORMAT
    return False


def join(place: str, name: str) -> str:
    return f"{place.rstrip('/')}/{name}"


def _of_files(
    files: list[StoredFile],
    place: str,
    description: str,
    split: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    index_dir: Path,
) -> ShardList:
    if config is not None:
        files = [file for file in files if config in file.name.split("/")[:-1]]
        description += f", config {config}"
    tables = [file for file in files if file.name.endswith(".parquet")]
    tars = [file for file in files if file.name.endswith(TARS)]
    if not tables and not tars:
        hint = "; a folder of images is packed by `python -m training.data.pack` first" if files else ""
        raise ValueError(f"there are no shards in {place!r}: give .parquet or .tar files, or a packed folder{hint}")
    by_split: dict[str, list[StoredFile]] = {}
    for file in tables or tars:
        by_split.setdefault(split_of(file.name), []).append(file)
    if split not in by_split:
        raise ValueError(f"split is {split!r}: give {' or '.join(by_split)}, {place!r} has no other split")
    description, splits = f"{description}, split {split}", tuple(by_split)
    if not tables:
        return _webdataset(by_split[split], description, splits, label_column or "label", index_dir)
    found = _parquet(by_split[split], place, description, splits, image_column, label_column)
    if tars:
        note = f"{len(tars)} tar files left out, beside parquet files: {some([file.name for file in tars])}"
        found = replace(found, notes=(*found.notes, note))
    return found


def split_of(name: str) -> str:
    """The split that the name of a file or of its folder has; "train" if neither has one."""
    for part in reversed(name.lower().split("/")):
        if match := SPLIT_IN_NAME.search(part):
            return SPLITS[match[1]]
    return "train"


# ---- Packed shards ---------------------------------------------------------------------------------------------------


def _packed(place: str, description: str, manifest: dict[str, Any], split: str) -> ShardList:
    if manifest.get("format") != PACKED_FORMAT:
        raise ValueError(f"{join(place, MANIFEST)} is not of packed shards: its format is {manifest.get('format')!r}")
    splits = manifest["splits"]
    if split not in splits:
        raise ValueError(f"split is {split!r}: give {' or '.join(splits)}, {place!r} has no other split")
    shards = []
    for entry in splits[split]["shards"]:
        file = StoredFile(join(place, entry["name"]), entry["name"], int(entry["bytes"]), str(entry["sha256"]))
        shards.append(Shard(file, int(entry["count"]), file.version))
    labels, names = splits[split]["labels"], manifest["class_names"]
    return ShardList(
        "packed",
        tuple(shards),
        f"{description}, split {split}",
        tuple(splits),
        shape=tuple(manifest["shape"]),
        dtype=manifest["dtype"],
        labels_file=None if labels is None else join(place, labels),
        labels_sha256=splits[split].get("labels_sha256"),
        class_names=None if names is None else tuple(names),
    )


# ---- Parquet files ---------------------------------------------------------------------------------------------------


def _parquet(
    files: list[StoredFile],
    place: str,
    description: str,
    splits: tuple[str, ...],
    image_column: str | None,
    label_column: str | None,
) -> ShardList:
    import datasets

    footers = stores.in_parallel(_footer, files)
    damaged = [file.name for file, footer in zip(files, footers) if footer is None]
    good = [(file, *footer) for file, footer in zip(files, footers) if footer is not None]
    if not good:
        raise ShardError(f"no shard of {description} can be read: {some(damaged)} are no complete parquet files")
    features = dict(datasets.Features.from_arrow_schema(good[0][1].schema.to_arrow_schema()))
    image_column = image_column_of(place, features, image_column)
    label_column = label_column_of(features, label_column)
    shards = []
    for file, metadata, digest in good:
        columns = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
        for column in filter(None, (image_column, label_column)):
            if column not in columns:
                raise ShardError(f"{file.name} has no column {column!r}: {some(list(columns))}")
        if label_column is not None and columns[label_column] != features[label_column]:
            raise ShardError(
                f"{file.name} has a column {label_column!r} of {columns[label_column]}, {good[0][0].name} one of "
                f"{features[label_column]}"
            )
        shards.append(Shard(file, metadata.num_rows, digest))
    return ShardList(
        "parquet",
        tuple(shard for shard in shards if shard.count),
        description,
        splits,
        notes=(f"{len(damaged)} damaged shards left out: {some(damaged)}",) if damaged else (),
        image_column=image_column,
        label_column=label_column,
        label_feature=None if label_column is None else features[label_column],
    )


def _footer(file: StoredFile, stopped: threading.Event) -> tuple[Any, str] | None:
    """The metadata of a parquet file and their sha256; None if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    start = max(0, file.size - FOOTER)
    tail = stores.patiently(file.name, lambda: stores.read(file.url, start, file.size), stopped)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        return None
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        if length > file.size:
            return None
        tail = stores.patiently(file.name, lambda: stores.read(file.url, file.size - length, file.size), stopped)
    try:
        metadata = parquet.read_metadata(io.BytesIO(tail))
    except (pyarrow.ArrowException, OSError):
        return None
    return metadata, hashlib.sha256(tail[-length:]).hexdigest()


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Payload]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        row = 0
        for batch in table.iter_batches(64, columns=[column], use_threads=False):
            for cell in batch.column(0).to_pylist():
                name = Path(cell.get("path") or "").name if cell else ""
                content = (cell or {}).get("bytes")  # a text would be the path of a file of this machine
                yield f"row {row}" + (f" ({name})" if name else ""), content if isinstance(content, bytes) else None
                row += 1


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def _webdataset(
    files: list[StoredFile], description: str, splits: tuple[str, ...], label_column: str, index_dir: Path
) -> ShardList:
    """Reads each tar file once, and keeps what it has found."""

    def index(file: StoredFile, stopped: threading.Event) -> dict[str, Any]:
        key = json.dumps([stores.path_of(file.url), file.size, file.version, label_column])
        kept = index_dir / f"tar-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(kept.read_text(encoding="utf-8"))
            if isinstance(entry, dict) and entry.keys() == INDEX_ENTRY:
                return entry
        entry = _read_index(file, label_column, index_dir, stopped)
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(entry), encoding="utf-8")
        return entry

    with writing(index_dir.parent):
        index_dir.mkdir(parents=True, exist_ok=True)
        found = list(progress(_in_order(index, files), "counting the samples of tar files", len(files), unit=" files"))
    damaged = [file.name for file, entry in zip(files, found) if entry["damaged"]]
    shards = [
        Shard(file, len(entry["labels"]), entry["digest"], tuple(entry["labels"])) for file, entry in zip(files, found)
    ]
    notes = [f"{len(damaged)} tar files are damaged, what can be read of them is used: {some(damaged)}"] * bool(damaged)
    if others := sum(entry["others"] for entry in found):
        notes.append(f"{others} images left out: their names up to the first dot are those of the images before them")
    return ShardList(
        "webdataset",
        tuple(shard for shard in shards if shard.count),
        description,
        splits,
        notes=tuple(notes),
        label_column=label_column,
    )


def _in_order(work: Any, items: list[Any]) -> Iterator[Any]:
    """`work` on a few items at a time, in order."""
    for start in range(0, len(items), 16):
        yield from stores.in_parallel(work, items[start : start + 16])


def _read_index(file: StoredFile, label_column: str, folder: Path, stopped: threading.Event) -> dict[str, Any]:
    """The label of each sample, its images but the first, whether the file ends too early, and its sha256."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".counting-") as scratch:
        path = Path(file.url)
        if stores.is_remote(file.url):
            path = Path(scratch) / "shard.tar"
            stores.patiently(file.name, lambda: stores.download(file, path, stopped), stopped)
        labels: list[Any] = []
        others, damaged = 0, False
        try:
            with tarfile.open(path) as archive:
                for _, members in samples(archive):
                    labels.append(label_of(archive, members, label_column))
                    others += len(images_of(members)) - 1
        except DAMAGED:
            damaged = True
        except OSError as error:
            raise ShardError(f"{file.name} cannot be read: {error.strerror or error}") from error
        return {"labels": labels, "others": others, "damaged": damaged, "digest": sha256_of(path)}


# ---- What is in them -------------------------------------------------------------------------------------------------


def rows(found: ShardList, shard: Shard, path: Path) -> Iterator[tuple[str, Payload | Exception]]:
    """(name, encoded image) of each image of a shard of which `path` is a copy on this machine; not of packed ones."""
    if found.kind == "parquet":
        assert found.image_column is not None
        return _parquet_rows(path, found.image_column)
    return tar_rows(path)


def digest_of(found: ShardList, shard: Shard, path: Path) -> str:
    """The digest that a shard would have by its copy on this machine; "" if it has none."""
    if found.kind != "parquet":
        return sha256_of(path)
    footer = _footer(StoredFile(str(path), shard.file.name, path.stat().st_size), threading.Event())
    return "" if footer is None else footer[1]


def packed_array(found: ShardList, shard: Shard, path: Path) -> np.ndarray:
    """The images of a packed shard, (n, C, H, W), memory-mapped: n is less than its count if the file is cut off.

    Raises:
        ValueError: the file is something else.
    """
    assert found.shape is not None
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        start, size = file.tell(), path.stat().st_size
    if (shape, fortran_order, dtype) != ((shard.count, *found.shape), False, np.dtype(found.dtype)):
        raise ValueError(f"it has {shape} {dtype}, the manifest {(shard.count, *found.shape)} {found.dtype}")
    complete = min(shard.count, (size - start) // (int(np.prod(found.shape)) * dtype.itemsize))
    return (
        np.memmap(path, dtype, "r", start, (complete, *found.shape)) if complete else np.empty((0, *shape[1:]), dtype)
    )


def labels_of(found: ShardList, shards: Sequence[int]) -> list[list[Any]] | None:
    """The labels of the images of these shards, None where one has none; None: the data set has no labels."""
    chosen = [found.shards[i] for i in shards]
    if found.kind == "webdataset":
        return [list(shard.labels or ()) for shard in chosen]
    if found.kind == "parquet":
        if found.label_column is None:
            return None
        return stores.in_parallel(lambda shard, _: _column_of_labels(found, shard), chosen)
    if found.labels_file is None or found.class_names is None:
        return None
    name = found.labels_file
    content = stores.patiently(name, lambda: stores.read(name))
    starts, names = np.cumsum([0, *(shard.count for shard in found.shards)]), [*found.class_names, None]
    if found.labels_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ShardError(f"{name} is damaged: its sha256 is not that of the manifest")
    try:
        numbers = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ShardError(f"{name} is damaged: {error}") from error
    if numbers.shape != (starts[-1],) or numbers.min() < -1 or numbers.max() >= len(found.class_names):
        raise ShardError(
            f"{name} does not have {starts[-1]} labels from -1 to {len(found.class_names) - 1}: pack the data set again"
        )
    return [[names[number] for number in numbers[starts[i] : starts[i + 1]].tolist()] for i in shards]


def _column_of_labels(found: ShardList, shard: Shard) -> list[Any]:
    from pyarrow import ArrowException, parquet

    file: Any = shard.file.url
    if stores.is_remote(shard.file.url):
        file = io.BufferedReader(stores.RemoteFile(shard.file), 2**18)
    try:
        with parquet.ParquetFile(file) as table:
            values = table.read(columns=[found.label_column]).column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise ShardError(f"{shard.file.name}: its column {found.label_column!r} cannot be read: {error}") from error
    return label_values(found.label_feature, values)[0]


def class_names_of(found: ShardList) -> tuple[str, ...] | None:
    """The order of the classes; None: they are sorted."""
    if found.kind == "parquet" and found.label_column is not None:
        return label_values(found.label_feature, [])[1]
    return found.class_names
