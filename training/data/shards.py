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
import json
import math
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ddpm_pipeline.files import replacing, sha256_of
from training.data import stores
from training.data.disk import writing
from training.data.sources import hub_commit, image_column_of, label_column_of
from training.data.stores import SHARDS, TARS, ShardError, StoredFile
from training.data.tables import features_of, read_footer, type_of
from training.data.tars import DAMAGED, image_of, images_of, label_of, open_tar, samples
from training.messages import some
from training.progress import progress

MANIFEST, INDEX = "manifest.json", "index.json"
PACKED_FORMAT = "ddpm_pipeline shards 1"
INDEX_ENTRY = {"labels", "others", "without", "damaged", "digest"}  # of a tar file
# The words of the library datasets; a part of validation images keeps its name.
SPLITS = {name: name for name in ("train", "validation", "valid", "val", "test")}
SPLITS |= {"training": "train", "dev": "validation", "testing": "test", "eval": "test", "evaluation": "test"}
NUMBERED = re.compile(r"-(\d+)-of-(\d+)(?=\.)")  # as the Hub numbers the files of a split
ASIDE = re.compile(r"\.(?:json|md|txt|ya?ml)$|(?:^|/)LICENSE$", re.IGNORECASE)  # files about the data
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
        image_column, label_column: of parquet files; of tar files the end of a name, and a key of NAME.json.
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
    scheme, mark, rest = place.partition("://")
    place = scheme.lower() + mark + rest if mark else place
    stores.check_address(place)
    description = f"data set {stores.path_of(place).rstrip('/').rpartition('/')[2] or stores.path_of(place)}"
    local = Path(place).expanduser()
    if not stores.is_remote(place) and (local.exists() or stores.is_pattern(place)):
        place = str(local)
    elif not stores.is_remote(place):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise ValueError(f"there are no shards in {place!r}: give a folder, a URL or the name of a data set")
        commit = hub_commit(place, index_dir)
        description, place = f"data set {place}", f"hf://datasets/{place}" + (f"@{commit}" if commit else "")
    given = re.search(rf"/({MANIFEST}|{INDEX})(\?.*)?$", place)
    place, is_given = place[: given.start()] + (given[2] or "") if given else place, given is not None
    if not stores.is_pattern(place) and not stores.path_of(place).lower().endswith(SHARDS):
        manifest = None if given and given[1] == INDEX else _read_json(stores.join(place, MANIFEST), is_given)
        if manifest is not None:
            given_in_vain = {"dataset_config_name": config, "image_column": image_column, "label_column": label_column}
            for name, value in given_in_vain.items():
                if value is not None:
                    raise ValueError(f"{name} is {value!r}: packed shards have none, leave it out or pack them again")
            return _packed(place, description, manifest, split)
        is_index = is_given or stores.is_http(place)
        index = _read_json(stores.join(place, INDEX), is_given) if is_index else None
        if index is not None:
            try:
                names = [str(shard["url"]) for shard in index["shardlist"]]
            except (KeyError, TypeError):
                file = stores.path_of(stores.join(place, INDEX))
                raise ShardError(f'{file} has no {{"shardlist": [{{"url": ...}}, ...]}}') from None
            folder = stores.name_of(stores.join(place, ""))
            urls = [stores.beside(place, name) for name in names]
            files = stores.stat_all([(url, stores.name_of(url).removeprefix(folder)) for url in urls])
            return _of_files(files, place, description, split, config, image_column, label_column, index_dir)
    files = stores.list_files(place)
    if place.startswith("hf://") and config is None:
        _check_one_config(files, split, description)
    return _of_files(files, place, description, split, config, image_column, label_column, index_dir)


def _check_one_config(files: list[StoredFile], split: str, description: str) -> None:
    """On the Hub each configuration of a data set of tables has a folder; tar files may be in several of one."""
    tables = [file.name for file in files if file.name.lower().endswith(".parquet") and split_of(file.name) == split]
    folders = {name.partition("/")[0] for name in tables if "/" in name}
    if len(configs := sorted(name for name in folders if not SPLIT_IN_NAME.search(name.lower()))) > 1:
        raise ValueError(f"dataset_config_name is None: give one, {description} has the folders {some(configs)}")


def is_sharded(place: str) -> bool:
    """Whether find_shards may find shards there: whether it is not the moons or a folder of images."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return place != "moons"
    return any(path.name == MANIFEST or path.name.lower().endswith(SHARDS) for path in folder.rglob("*"))


def _read_json(url: str, is_given: bool) -> dict[str, Any] | None:
    """A small file; None if it does not exist, or if it was not asked for and a web server has a page in its place."""
    content = stores.read_optional(url)
    if content is not None and stores.is_http(url) and not is_given and content.lstrip()[:1] == b"<":
        return None
    try:
        return None if content is None else dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{stores.path_of(url)} is damaged: {error}") from error


def is_packed(folder: Path) -> bool:
    """Whether pack.py has written this folder."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format") == PACKED_FORMAT
    return False


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
    place = stores.path_of(place)  # for messages
    if config is not None:
        files = [file for file in files if config in file.name.split("/")[:-1]]
        description += f", config {config}"
    names = Counter(file.name for file in files)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"several shards of {place!r} have one name: {some(twice)}; what follows a ? is no part of it")
    tables = [file for file in files if file.name.lower().endswith(".parquet")]
    tars = [file for file in files if file.name.lower().endswith(TARS)]
    others = [name for name in names if not name.lower().endswith(SHARDS) and not ASIDE.search(name)]
    if not tables and not tars:
        hint = "; a folder of images is packed by `python -m training.data.pack` first" if files else ""
        raise ValueError(f"there are no shards in {place!r}: give .parquet or .tar files, or a packed folder{hint}")
    by_split: dict[str, list[StoredFile]] = {}
    for file in tables or tars:
        by_split.setdefault(split_of(file.name), []).append(file)
    if split not in by_split:
        raise ValueError(f"split is {split!r}: give {' or '.join(by_split)}, {place!r} has no other split")
    description, splits = f"{description}, split {split}", tuple(by_split)
    if tables:
        found = _parquet(by_split[split], place, description, splits, image_column, label_column)
        others = [file.name for file in tars] + others
    else:
        found = _webdataset(by_split[split], description, splits, image_column, label_column, index_dir)
    notes = [*found.notes, *_absent([file.name for file in by_split[split]])]
    if others:
        notes.append(f"{len(others)} other files left out: {some(others)}")
    return replace(found, notes=tuple(notes))


def _absent(names: list[str]) -> list[str]:
    """Notes about series such as train-00000-of-00003.parquet that are not complete."""
    series: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        if match := NUMBERED.search(name):
            series.setdefault((name[: match.start()], match[2], name[match.end() :]), set()).add(match[1])
    return [
        f"only {len(numbers)} of the {int(number)} files {start}-...-of-{number}{end} are there"
        for (start, number, end), numbers in series.items()
        if len(numbers) < int(number)
    ]


def split_of(name: str) -> str:
    """The split that the name of a file or of its folder has; "train" if neither has one."""
    for part in reversed(name.lower().split("/")):
        if match := SPLIT_IN_NAME.search(part):
            return SPLITS[match[1]]
    return "train"


# ---- Packed shards ---------------------------------------------------------------------------------------------------


def _packed(place: str, description: str, manifest: dict[str, Any], split: str) -> ShardList:
    file, folder = stores.path_of(stores.join(place, MANIFEST)), stores.path_of(place)
    if manifest.get("format") != PACKED_FORMAT:
        raise ValueError(f"{file} is not of packed shards: its format is {manifest.get('format')!r}")
    try:
        splits = manifest["splits"]
        _demand(isinstance(splits, dict), "splits")
        if splits and split not in splits:
            raise ValueError(f"split is {split!r}: give {' or '.join(splits)}, {folder!r} has no other split")
        shape, dtype = tuple(manifest["shape"]), manifest["dtype"]
        _demand(len(shape) == 3 and all(_is_count(size) and size for size in shape), "shape")
        _demand(dtype in ("uint8", "uint16"), "dtype")
        shards = []
        for entry in splits[split]["shards"]:
            name, size, count, sha256 = (entry[key] for key in ("name", "bytes", "count", "sha256"))
            _demand(isinstance(name, str) and re.fullmatch(r"[^/\\\0]*\.npy", name), "name of a shard")
            _demand(_is_count(size) and _is_count(count) and count * math.prod(shape) <= size, "size of a shard")
            _demand(isinstance(sha256, str), "sha256 of a shard")
            shards.append(Shard(StoredFile(stores.join(place, name), name, size, sha256), count, sha256))
        _demand(len({shard.file.name for shard in shards}) == len(shards), "shard that is there once")
        labels, names = splits[split]["labels"], manifest["class_names"]
        _demand(labels is None or re.fullmatch(r"[^/\\\0]*\.npy", labels), "name of the labels")
        _demand(names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)), "classes")
    except (KeyError, TypeError) as error:
        raise ShardError(f"{file} is damaged: {type(error).__name__} {error}") from error
    except ShardError as error:
        raise ShardError(f"{file} is damaged: {error}") from None
    return ShardList(
        "packed",
        tuple(shards),
        f"{description}, split {split}",
        tuple(splits),
        shape=shape,
        dtype=dtype,
        labels_file=None if labels is None else stores.join(place, labels),
        labels_sha256=splits[split].get("labels_sha256"),
        class_names=None if names is None else tuple(names),
    )


def _demand(holds: Any, what: str) -> None:
    if not holds:
        raise ShardError(f"it has no valid {what}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# ---- Parquet files ---------------------------------------------------------------------------------------------------


def _parquet(
    files: list[StoredFile],
    place: str,
    description: str,
    splits: tuple[str, ...],
    image_column: str | None,
    label_column: str | None,
) -> ShardList:
    footers = stores.in_parallel(read_footer, files)
    damaged = [file.name for file, footer in zip(files, footers) if footer is None]
    good = [(file, *footer) for file, footer in zip(files, footers) if footer is not None]
    if not good:
        raise ShardError(f"no shard of {description} can be read: {some(damaged)} are no complete parquet files")
    features = dict(features_of(good[0][0], good[0][1]))
    image_column = image_column_of(place, features, image_column)
    label_column = label_column_of(features, label_column)
    image_type = type_of(good[0][1], image_column)
    shards = []
    for file, metadata, digest in good:
        columns = features_of(file, metadata)
        for column in filter(None, (image_column, label_column)):
            if column not in columns:
                raise ShardError(f"{file.name} has no column {column!r}: {some(list(columns))}")
        kinds = [(image_column, type_of(metadata, image_column), image_type)]
        if label_column is not None:
            kinds.append((label_column, columns[label_column], features[label_column]))
        for column, kind, of_first in kinds:
            if kind != of_first:
                raise ShardError(f"{file.name} has a column {column!r} of {kind}, {good[0][0].name} one of {of_first}")
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


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def _webdataset(
    files: list[StoredFile],
    description: str,
    splits: tuple[str, ...],
    image_column: str | None,
    label_column: str | None,
    index_dir: Path,
) -> ShardList:
    """Reads each tar file once, and keeps what it has found."""

    def index(file: StoredFile, stopped: threading.Event) -> dict[str, Any]:
        key = json.dumps([stores.identity(file), image_column, label_column])
        kept = index_dir / f"tar-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(kept.read_text(encoding="utf-8"))
            if isinstance(entry, dict) and entry.keys() == INDEX_ENTRY:
                return entry
        entry = _read_index(file, image_column, label_column, index_dir, stopped)
        if file.version and not entry["damaged"]:  # else another file may have the same size, or be whole next time
            with replacing(kept) as temporary:
                temporary.write_text(json.dumps(entry), encoding="utf-8")
        return entry

    with writing(index_dir.parent):
        index_dir.mkdir(parents=True, exist_ok=True)
        found = list(progress(_in_order(index, files), "counting the samples of tar files", len(files), unit=" files"))
    damaged = [file.name for file, entry in zip(files, found) if entry["damaged"]]
    if damaged and not any(entry["labels"] for entry in found):
        raise ShardError(f"no shard of {description} can be read: {some(damaged)} are no complete tar files")
    others = Counter[str]()
    for entry in found:
        others.update(entry["others"])
    if image_column and not any(entry["labels"] for entry in found):
        allowed = " or ".join(others) or "other tar files"
        raise ValueError(f"image_column is {image_column!r}, which no image of {description} ends with: give {allowed}")
    if label_column and all(label is None for entry in found for label in entry["labels"]):
        raise ValueError(f"label_column is {label_column!r}: no sample of {description} has it in its .json file")
    shards = [
        Shard(file, len(entry["labels"]), entry["digest"], tuple(entry["labels"])) for file, entry in zip(files, found)
    ]
    notes = []
    if damaged:
        what = "tar files are damaged or have more after their end, what can be read of them is used"
        notes.append(f"{len(damaged)} {what}: {some(damaged)}")
    if others:
        used = f"image_column is {image_column}" if image_column else "image_column chooses, now the first of a sample"
        notes.append(f"{others.total()} images left out ({used}): {some(list(others))}")
    if without := sum(entry["without"] for entry in found):
        notes.append(f"{without} samples without an image left out")
    return ShardList(
        "webdataset",
        tuple(shard for shard in shards if shard.count),
        description,
        splits,
        notes=tuple(notes),
        image_column=image_column,
        label_column=label_column,
    )


def _in_order(work: Any, items: list[Any]) -> Iterator[Any]:
    """`work` on a few items at a time, in order."""
    for start in range(0, len(items), 16):
        yield from stores.in_parallel(work, items[start : start + 16])


def _read_index(
    file: StoredFile, image_column: str | None, label_column: str | None, folder: Path, stopped: threading.Event
) -> dict[str, Any]:
    """What is in a tar file.

    Returns:
        The `labels` of its samples with an image, the endings of `others`, images that are not used, with their number,
        how many samples are `without` an image, whether the file is `damaged`, and its `digest`, the sha256.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".counting-") as scratch:
        path = Path(file.url)
        if stores.is_remote(file.url):
            path = Path(scratch) / "shard.tar"
            stores.patiently(file.name, lambda: stores.download(file, path, stopped), stopped)
        labels: list[Any] = []
        others, without, damaged = Counter[str](), 0, False
        try:
            with open_tar(path) as archive:
                for members in samples(archive):
                    used = image_of(members, image_column)
                    if used is not None:
                        labels.append(label_of(archive, members, label_column))
                    images = images_of(members)
                    others.update(ending for ending in images if ending != used)
                    without += not images
        except DAMAGED:
            damaged = True
        except OSError as error:
            raise ShardError(f"{file.name} cannot be read: {error.strerror or error}") from error
        entry = {"labels": labels, "others": others, "without": without, "damaged": damaged}
        return entry | {"digest": sha256_of(path)}
