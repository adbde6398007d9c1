"""STREAMING: images from shards, a few of which are on this machine's disk at a time.

No library gives an order that is a pure function of (seed, step) over shards as they are: those with a shuffle buffer
have a state on each rank. So the order is our own (shard_order.py), and libraries read the bytes, tables and tar files.

`load_streamed_split` chooses what is held out. shard_stream.py has the images in the order of training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddpm_pipeline.decode import Target, failure_reason, parse_colour, read_header
from ddpm_pipeline.files import remove, replacing
from ddpm_pipeline.pixels import height_width
from training.data import stores
from training.data.cache import FORMAT, DecodeSettings, Headers, attempt, choose_target, write_array
from training.data.disk import CacheError, create_folder, free_bytes, writing
from training.data.image_set import ImageSet, open_cache
from training.data.shard_cache import ShardCache
from training.data.shard_content import class_names_of, labels_of, rows
from training.data.shard_order import ShardOrder
from training.data.shard_stream import ShardedImages
from training.data.shards import ShardList, find_shards
from training.data.sizes import Rule, nearest_size
from training.data.split import (
    HELD_OUT_EVERY,
    MAX_HELD_OUT,
    DataSplit,
    check_alike,
    choose_held_out_split,
    evenly_spaced,
)
from training.data.stores import ShardError
from training.messages import some

FIRST_IMAGES = 256  # of the first shard: size, channels and bits of all are chosen by them
HELD_OUT_SHARDS = 16  # that held-out images are taken from, if no split is held out
MAX_HELD_OUT_SPLIT = 10_000  # images of a split that is held out
SAMPLE, SAMPLE_SHARDS = 50_000, 32  # training images that stand for all where all are too many, and their shards


@dataclass(frozen=True)
class StreamedSet(ImageSet):
    """The images of one split, in shards."""

    found: ShardList | None = None

    def name(self, i: int) -> str:
        assert self.found is not None
        images: Any = self.images
        (shard,) = images.shards_of(np.array([i]))
        return f"{self.found.shards[shard].file.name}, row {i - images.starts[shard]}"

    @cached_property
    def _labels(self) -> list[Any]:
        assert self.found is not None
        labels = labels_of(self.found, range(len(self.found.shards)))
        return [None] * len(self) if labels is None else [label for of_shard in labels for label in of_shard]


@dataclass(frozen=True)
class StreamedSplit(DataSplit):
    """A data set in shards to train on. Where all images are too many, a sample of them stands for them."""

    cache_dir: Path = Path()

    def in_memory(self) -> DataSplit:
        """A sample of the training images, and the held-out set."""
        images: Any = self.data.images
        shards = evenly_spaced(len(images.counts), max(SAMPLE_SHARDS, -(-SAMPLE * len(images.counts) // len(images))))
        order = ShardOrder(images.counts, self.train_indices, 0)
        available = np.concatenate([self.train_indices[order.bounds[i] : order.bounds[i + 1]] for i in shards])
        chosen = available[evenly_spaced(len(available), SAMPLE)]
        note = "" if len(chosen) == len(self.train_indices) else f"; a sample of {len(chosen)} of them"
        sample = _write_sample(self.data, chosen, self.cache_dir, self.data.source + note)
        indices = np.arange(len(sample))
        return replace(
            DataSplit(sample, indices, self.held_out, self.held_out_source, self.held_out_set, self.held_out_indices),
            num_train=len(self.train_indices),
        )


def load_streamed_split(
    validation_split: str | None = None,
    *,
    dataset_name: str | None = None,
    train_data_dir: str | Path | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    resolution: int | str | tuple[int, int] | None = None,
    size_rule: Rule | Literal["any"] = "any",
    center_crop: bool = True,
    background: str = "white",
    min_side: int = 1,
    cache_dir: str | Path,
    cache_gb: float = 50.0,
    image_column: str | None = None,
    label_column: str | None = None,
    log: Callable[[str], None] = print,
) -> StreamedSplit:
    """The images of a data set in shards to train on, and a held-out set, as `load_data_split`.

    Args:
        dataset_name, train_data_dir: a folder of shards, a URL, or a data set on the Hub; give one of them.
        cache_gb: 10^9 bytes of disk for decoded shards.
        log: takes lines about images that cannot be read.
        Everything else is as of `load_images`.
    Raises:
        ValueError: an invalid argument, no shards, or no room for them.
        ShardError: a shard cannot be read.
    """
    place = str(dataset_name if train_data_dir is None else train_data_dir)
    cache_dir = Path(cache_dir).expanduser()
    find = partial(
        find_shards, place, config=dataset_config_name, image_column=image_column,
        label_column=label_column, index_dir=cache_dir / ".index",
    )  # fmt: skip
    found = find(split=split)
    settings = DecodeSettings(
        None if resolution is None else height_width(resolution, "resolution"), center_crop,
        parse_colour(background), "skip", min_side,
        size_rule if resolution is None else "any",
    )  # fmt: skip
    data = open_shards(found, settings, cache_dir, int(cache_gb * 1e9), log)
    images: Any = data.images
    every_image = np.arange(len(data))
    if validation_split == "none":
        nothing = ImageSet(
            np.empty((0, *images.shape[1:]), images.dtype), data.source, (), data.names_file, data.splits
        )
        return StreamedSplit(
            data, every_image, nothing.images, "nothing", nothing, every_image[:0], cache_dir=cache_dir
        )
    held_out_split = choose_held_out_split(validation_split, found.splits, split)
    if held_out_split is None:
        # Every 20th image, at most 1000, of a few shards.
        number = min(MAX_HELD_OUT, len(data) // HELD_OUT_EVERY)
        available = images.indices_in(evenly_spaced(len(images.counts), HELD_OUT_SHARDS))
        chosen = available[evenly_spaced(len(available), number)]
        held_out = _write_sample(data, chosen, cache_dir, data.source)
        source = f"{len(held_out)} of {len(data)} images, not trained on" if number else "nothing: too few images"
        if lost := number - len(held_out):
            log(f"WARNING: {lost} of the {number} images that are held out cannot be read")
        train_indices = np.setdiff1d(every_image, chosen)
    else:
        other = open_shards(
            find(split=held_out_split), replace(settings, size=(data.height, data.width), size_rule="any"), cache_dir,
            int(cache_gb * 1e9), log,
        )  # fmt: skip
        check_alike(other, data, held_out_split)
        of_other: Any = other.images
        available = of_other.indices_in(evenly_spaced(len(of_other.counts), SAMPLE_SHARDS))
        held_out = _write_sample(
            other, available[evenly_spaced(len(available), MAX_HELD_OUT_SPLIT)], cache_dir, other.source
        )
        source, train_indices = other.source, every_image
    indices = np.arange(len(held_out))
    return StreamedSplit(data, train_indices, held_out.images, source, held_out, indices, cache_dir=cache_dir)


def open_shards(
    found: ShardList,
    settings: DecodeSettings,
    cache_dir: Path,
    limit: int,
    log: Callable[[str], None],
) -> StreamedSet:
    """The images of a list of shards, none of which is read yet, except for the first if they are not packed.

    Args:
        limit: bytes of disk for decoded shards.
    """
    target = None
    if not found.shards:
        raise ValueError(f"{found.description} has no images")
    if found.kind == "packed":
        assert found.shape is not None
        shape, dtype = found.shape, np.dtype(found.dtype)
        if settings.size not in (None, shape[1:]):
            raise ValueError(
                f"resolution is {settings.size[0]}x{settings.size[1]} and the images are packed at "
                f"{shape[1]}x{shape[2]}: leave it out, or pack them again"
            )
        if settings.size_rule != "any" and nearest_size(settings.size_rule, *shape[1:]) != shape[1:]:
            height, width = nearest_size(settings.size_rule, *shape[1:])
            raise ValueError(
                f"the images are packed at {shape[1]}x{shape[2]}, which the network cannot halve: pack them with "
                f"--resolution {height}x{width}"
            )
    else:
        with writing(cache_dir):
            target = _target_of_first(found, settings, cache_dir)
        shape, dtype = (target.channels, target.height, target.width), np.dtype(target.dtype)
    # Which images, in which order: the same wherever the shards are, so a run may be resumed with a copy of them.
    content: list[Any] = [(shard.file.name, shard.file.size, shard.count, shard.digest) for shard in found.shards]
    content += [value for value in (found.image_column, found.labels_sha256) if value is not None]
    prepared = [settings.center_crop, settings.background, settings.min_side] if target else []
    digest = hashlib.sha256(json.dumps([FORMAT, found.kind, shape, str(dtype), prepared, content]).encode()).hexdigest()
    cache = ShardCache(
        found, target, shape, dtype, settings.min_side, cache_dir / digest, limit, threading.Event()
    )  # fmt: skip
    cache.forget_shorter()
    images: Any = ShardedImages(cache, log)
    _check_room(images, cache_dir)
    source = "; ".join([f"{len(images)} images of {found.description}", f"{len(found.shards)} shards", *found.notes])
    return StreamedSet(images, source, (), Path(), found.splits, digest, class_names_of(found), found=found)


def _check_room(images: ShardedImages, cache_dir: Path) -> None:
    """Raise ValueError if the groups of two windows do not fit into the bound, or the bound not on the disk."""
    cache = images.cache
    order = ShardOrder(images.counts, np.arange(len(images)), 0)
    all_of_them = cache.bytes_of(range(len(images.counts)))
    sizes = sorted((cache.bytes_of([i]) for i in range(len(images.counts))), reverse=True)
    needed = min(all_of_them, sum(sizes[: 2 * order.group_size]))
    least = f"{math.ceil(needed / 1e8) / 10:g}"
    if needed > cache.limit:
        raise CacheError(
            f"streaming_cache_gb is {cache.limit / 1e9:g}: two groups of {order.group_size} of the {len(sizes)} shards "
            f"need {needed:,} bytes: give at least {least}, or smaller shards"
        )
    taken = sum(path.stat().st_size for path in cache.folder.iterdir()) if cache.folder.is_dir() else 0
    wanted = min(all_of_them, cache.limit) - taken
    if wanted > (free := free_bytes(cache.folder)):
        raise CacheError(
            f"cache_dir is '{cache_dir}': the decoded shards need up to {wanted:,} bytes, {free:,} are free: make "
            f"room, give another --cache_dir, or a lower --streaming_cache_gb of at least {least}"
        )
    meta = cache.folder / "meta.json"
    if all_of_them and not meta.exists():
        with writing(cache_dir):
            cache.folder.mkdir(parents=True, exist_ok=True)
            meta.write_text(json.dumps({"source": f"shards of {cache.found.description}"}), encoding="ascii")


def _target_of_first(found: ShardList, settings: DecodeSettings, cache_dir: Path) -> Target:
    """What all images are decoded to, by the first of the first shard, which is read for it once."""
    shard = found.shards[0]
    key = json.dumps([FORMAT, shard.file.name, shard.digest, found.image_column, astuple(settings)])
    kept = cache_dir / ".index" / f"target-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads(kept.read_text(encoding="utf-8"))
        return Target(**values | {"background": tuple(values["background"])})
    headers = Headers()
    scratch = cache_dir / f".first-{uuid.uuid4().hex}"
    try:
        path = Path(shard.file.url)
        if stores.is_remote(shard.file.url):
            cache_dir.mkdir(parents=True, exist_ok=True)
            path = scratch
            stores.patiently(shard.file.name, lambda: stores.download(shard.file, scratch))
        reasons: list[str] = []
        is_whole = True
        try:
            for name, payload in islice(rows(found, path), FIRST_IMAGES):
                header, reason = attempt(partial(read_header, min_side=settings.min_side), payload)
                if header is None:
                    reasons.append(f"{name}: {reason}")
                else:
                    headers.add(name, header)
        except Exception as error:  # of pyarrow or tarfile: those before it count
            is_whole = False
            reasons.append(failure_reason(error))
    finally:
        remove(scratch)
    if not headers.sizes:
        raise ShardError(f"none of the first images of {shard.file.name} can be read: {some(reasons)}")
    target = choose_target(headers, settings)
    if is_whole:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(asdict(target)), encoding="utf-8")
    return target


def _write_sample(data: ImageSet, chosen: np.ndarray, cache_dir: Path, source: str) -> ImageSet:
    """Some images as a data set of their own, in the cache; those that cannot be read are left out."""
    images: Any = data.images
    found = images.cache.found
    shards = images.shards_of(chosen)
    numbers = np.unique(shards).tolist()
    versions = [(found.shards[i].file.version, found.shards[i].file.size) for i in numbers]  # new ones are read anew
    parts = [data.digest, source, found.label_column, hashlib.sha256(chosen.tobytes()).hexdigest(), versions]
    folder = cache_dir / hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def write(new: Path, scratch: Path) -> dict[str, Any]:
        skipped: list[str] = []
        labels = labels_of(found, numbers)

        def good() -> Iterator[np.ndarray]:
            with open(new / "names.txt", "w", encoding="ascii") as names:
                for i, shard in enumerate(numbers):
                    images.cache.make_room([shard])
                    array, unreadable = images.opened(shard)
                    for row in (chosen[shards == shard] - images.starts[shard]).tolist():
                        if row in unreadable:
                            skipped.append(unreadable[row])
                            continue
                        name = data.name(int(images.starts[shard] + row))
                        names.write(json.dumps([name] if labels is None else [name, labels[i][row]]) + "\n")
                        yield array[row]
                    images.close_all_but([])

        _, digest, largest = write_array(new / "images.npy", good(), images.shape[1:], str(images.dtype))
        order = None if data.label_order is None else list(data.label_order)
        return {
            "source": source, "skipped": skipped, "splits": list(data.splits), "digest": digest, "label_order": order,
            "max": largest,
        }  # fmt: skip

    if not (folder / "meta.json").exists():
        create_folder(folder, write)
    return open_cache(folder, ())
