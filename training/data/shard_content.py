"""SHARD CONTENT: what is in the files of a list of shards: images one after the other, labels, digests."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_pipeline.decode import Payload
from ddpm_pipeline.files import sha256_of
from training.data import stores
from training.data.shards import Shard, ShardList
from training.data.sources import label_values
from training.data.stores import ShardError, StoredFile
from training.data.tables import read_footer, read_labels, table_rows
from training.data.tars import is_whole_tar, tar_rows


def rows(found: ShardList, path: Path) -> Iterator[tuple[str, Payload | Exception]]:
    """(name, encoded image) of each image of a shard, which `path` is a copy of on this machine; not of packed ones."""
    if found.kind == "parquet":
        assert found.image_column is not None
        return table_rows(path, found.image_column)
    return tar_rows(path, found.image_column)


def digest_of(found: ShardList, path: Path) -> str:
    """The digest that a shard would have by its copy on this machine; "" if it has none."""
    return _footer_digest(path) if found.kind == "parquet" else sha256_of(path)


def _footer_digest(path: Path) -> str:
    footer = read_footer(StoredFile(str(path), path.name, path.stat().st_size), threading.Event())
    return "" if footer is None else footer[1]


def is_whole(found: ShardList, path: Path) -> bool:
    """Whether a copy of a shard is not cut off. Of a packed one, packed_array says so: it has the number of images."""
    if found.kind == "webdataset":
        return is_whole_tar(path)
    return found.kind == "parquet" and _footer_digest(path) != ""


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
        column, feature = found.label_column, found.label_feature
        return stores.in_parallel(lambda shard, _: label_values(feature, read_labels(shard.file, column))[0], chosen)
    if found.labels_file is None or found.class_names is None:
        return None
    file, name = found.labels_file, stores.path_of(found.labels_file)
    content = stores.patiently(name, lambda: stores.read(file))
    starts, names = np.cumsum([0, *(shard.count for shard in found.shards)]), [*found.class_names, None]
    if found.labels_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ShardError(f"{name} is damaged: its sha256 is not that of the manifest")
    try:
        numbers = np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    except (ValueError, EOFError, TypeError) as error:
        raise ShardError(f"{name} is damaged: {error}") from error
    are_numbers = numbers.dtype == np.int32 and numbers.shape == (starts[-1],)
    if not are_numbers or numbers.min() < -1 or numbers.max() >= len(found.class_names):
        raise ShardError(
            f"{name} does not have {starts[-1]} labels from -1 to {len(found.class_names) - 1}: pack the data set again"
        )
    return [[names[number] for number in numbers[starts[i] : starts[i + 1]].tolist()] for i in shards]


def class_names_of(found: ShardList) -> tuple[str, ...] | None:
    """The order of the classes; None: they are sorted."""
    if found.kind == "parquet" and found.label_column is not None:
        return label_values(found.label_feature, [])[1]
    return found.class_names
