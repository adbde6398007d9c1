"""CACHE: the images of a source are decoded once, into one array on disk that later runs map into memory.

`load_images` reads the source twice. The first pass reads the headers and chooses what all images share: size,
channels, 8 or 16 bits. The second pass decodes. The key of a cache is a hash of everything its pixels depend on.

    <cache_dir>/<key>/images.npy   (N, C, H, W) uint8 or uint16
    <cache_dir>/<key>/names.txt    a line of JSON for each image: its name, and its label if the data set has labels
    <cache_dir>/<key>/meta.json    the source, the images left out and why, the splits of the data set, the order of its
                                   labels
    <cache_dir>/.index/            what content.py remembers

If a data set has gray and colour images, all become colour. If one image has 16 bits, all become 16-bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ddpm_pipeline.decode import (
    Header,
    Payload,
    Target,
    background_values,
    decode,
    failure_reason,
    parse_colour,
    read_header,
)
from training.data.disk import create_folder, flush_to_disk, needs_space
from training.data.folder import image_folder
from training.data.image_set import ImageSet, open_cache
from training.data.shards import is_packed
from training.data.sizes import LARGEST, Rule, nearest_size, proposed_size
from training.data.sources import MOON_SIZE, NUM_MOONS, Moons, Records, Source, hub_dataset
from training.messages import some
from training.progress import progress

FORMAT = 4  # part of every cache key: raise it when the same files, or moons.py, give other pixels or labels

T = TypeVar("T")


class UnreadableImagesError(ValueError):
    """Some images cannot be read; the message names the first of them, each with the reason."""


@dataclass(frozen=True)
class DecodeSettings:
    """What the pixels depend on besides the source. These are in the cache key, in this order."""

    size: tuple[int, int] | None  # (H, W); None is the most common size in the data, or the nearest that fits
    center_crop: bool
    background: tuple[int, int, int]
    on_bad_image: str
    min_side: int
    size_rule: Rule | Literal["any"]  # which sizes fit if none is given, see sizes.py


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    resolution: int | str | tuple[int, int] | None = None,
    size_rule: Rule | Literal["any"] = "any",
    center_crop: bool = True,
    background: str = "white",
    on_bad_image: str = "stop",
    min_side: int = 1,
    cache_dir: str | Path,
    num_workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    follow_links: bool = False,
    split_folders: bool = True,
) -> ImageSet:
    """All images of one source as one array, from the cache if they were decoded before.

    Args:
        dataset_name: "moons", a local folder of parquet files in the Hub's layout, or a name on the Hub.
        dataset_config_name: configuration (subset) of the data set.
        split: as in `datasets.load_dataset`, so "train[:100]" works too; of a folder with folders such as train and
            test, one of these.
        train_data_dir: folder of image files, searched recursively. Give this or dataset_name.
        resolution: one side, (H, W) or "HxW", in pixels; None: the most common size in the data (moons: 32).
        size_rule: of the network, see sizes.py; without a resolution the images get the size nearest to the most common
            one that fits, and images larger than LARGEST are refused. "any": every size fits.
        center_crop: resize an image of another size until it covers the target, then crop its centre; False: stretch it
            to the target.
        background: colour behind transparent pixels, a CSS name or #rrggbb; for gray images its luminance.
        on_bad_image: "stop" raises an error that names every unreadable image, "skip" leaves them out.
        min_side: shortest allowed side in pixels; a smaller image counts as unreadable.
        cache_dir: folder for the arrays; created if missing.
        num_workers: processes that decode; 0: this process does.
        image_column: column of the images, if a data set has several.
        label_column: column of the labels, in a data set or in the metadata.csv of a folder. None: the only one of
            class labels or called label; in a folder without it, folders are labels.
        include, exclude: patterns of the paths in the folder of images, separated by commas: only those that match, and
            none of those that match. A pattern without a slash is compared with each part of a path.
        follow_links: follow symbolic links that lead out of the folder.
        split_folders: folders train, val, valid, validation and test at the top are splits, and a folder of masks
            beside images is left out; False: each is a class.
    Raises:
        UnreadableImagesError: images are unreadable and on_bad_image is "stop", or all of them are unreadable.
        ValueError: an invalid argument, no images, images that do not fit into one array, or no room for them.
    """
    if on_bad_image not in ("stop", "skip"):
        raise ValueError(f'on_bad_image is {on_bad_image!r}: give "stop" or "skip"')
    if not isinstance(min_side, int) or min_side < 1:
        raise ValueError(f"min_side is {min_side!r}: give an integer of at least 1")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers is {num_workers!r}: give an integer of at least 0")
    colour = parse_colour(background)
    cache_dir = Path(cache_dir).expanduser()
    if train_data_dir == "":  # as of a variable that is not set; a Path of it would be the working directory
        raise ValueError("train_data_dir is '': give a folder of images")
    size = None
    if resolution is not None:
        from ddpm_pipeline.pixels import height_width  # imports torch, which a cache does not need

        size = height_width(resolution, "resolution")
    if train_data_dir is None and (include is not None or exclude is not None):
        raise ValueError(
            f"include is {include!r} and exclude is {exclude!r}: they are for train_data_dir, leave them out"
        )
    if image_column is not None and dataset_name in (None, "moons"):
        raise ValueError(f"image_column is {image_column!r}: it is for a data set with columns, leave it out")
    if label_column is not None and dataset_name == "moons":
        raise ValueError(f"label_column is {label_column!r}: the moons have no labels, leave it out")
    source = find_source(
        dataset_name, dataset_config_name, split, train_data_dir, size, cache_dir, image_column, label_column,
        include=include, exclude=exclude, follow_links=follow_links, split_folders=split_folders,
    )  # fmt: skip
    size = source.size if isinstance(source, Moons) else size
    settings = DecodeSettings(
        size, bool(center_crop), colour, on_bad_image, min_side, size_rule if size is None else "any"
    )

    folder = cache_dir / cache_key(source, settings)
    if not (folder / "meta.json").exists():
        if isinstance(source, Moons):
            create_folder(folder, partial(write_moons, source))
        else:
            create_folder(folder, partial(write_decoded, source, settings, num_workers))
    return open_cache(folder, () if isinstance(source, Moons) else source.notes)  # of the folder as it is now


def cache_key(source: Source | Moons, settings: DecodeSettings) -> str:
    *parts, rule = astuple(settings)
    key = json.dumps([FORMAT, source.identity, *parts, *([] if rule == "any" else [rule])])
    return hashlib.sha256(key.encode()).hexdigest()


def find_source(
    dataset_name: str | None,
    config: str | None,
    split: str,
    train_data_dir: str | Path | None,
    size: tuple[int, int] | None,
    cache_dir: Path,
    image_column: str | None,
    label_column: str | None,
    **folder_options: Any,
) -> Source | Moons:
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"dataset_name is {dataset_name!r} and train_data_dir is {train_data_dir!r}: give one of them")
    if not isinstance(split, str):
        raise ValueError(f'split is {split!r}: give a name such as "train"')
    if dataset_name is not None and dataset_name != "moons":
        return hub_dataset(
            dataset_name,
            config,
            split,
            image_column=image_column,
            label_column=label_column,
            index_dir=cache_dir / ".index",
        )

    if config:
        kind = "the moons" if train_data_dir is None else "a folder of images"
        raise ValueError(f"dataset_config_name is {config!r}: {kind} has no configurations, leave it out")
    if train_data_dir is not None:
        folder = Path(train_data_dir).expanduser()
        if is_packed(folder):
            raise ValueError(f"train_data_dir is {str(folder)!r}: this folder has packed shards: add --streaming")
        return image_folder(folder, cache_dir, split, label_column=label_column, **folder_options)
    if split not in NUM_MOONS:
        raise ValueError(f"split is {split!r}: give {' or '.join(NUM_MOONS)}, the moons have no other split")
    return Moons(split, size or MOON_SIZE)


# ---- Making a cache --------------------------------------------------------------------------------------------------


def write_moons(moons: Moons, folder: Path, scratch: Path) -> dict[str, Any]:
    images = progress(moons.images(), "drawing moons", moons.count, unit=" images")
    needs_space(folder, moons.count * moons.size[0] * moons.size[1])
    _, digest, _ = write_array(folder / "images.npy", images, (1, *moons.size), "uint8")
    names = "".join(f'["moon {i}"]\n' for i in range(moons.count))
    (folder / "names.txt").write_text(names, encoding="ascii")
    meta = {"source": moons.description, "skipped": [], "splits": list(NUM_MOONS), "digest": digest}
    return meta | {"label_order": None}


def write_decoded(
    source: Source, settings: DecodeSettings, num_workers: int, folder: Path, scratch: Path
) -> dict[str, Any]:
    """Decode a source into `folder`, with only a few images in memory at once.

    Raises:
        UnreadableImagesError, ValueError: as `load_images`.
    """
    records = source.open(scratch)
    with ProcessPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
        headers = read_headers(records, settings.min_side, pool)
        target = choose_target(headers, settings)
        # An image that fails to decode leaves no gap, because images are written one after the other.
        unreadable = dict(headers.unreadable)
        items = (item for item in _numbered(records) if item[0] not in headers.unreadable)
        attempts = _attempts(partial(decode, target=target), items, pool, records.count - len(unreadable), "decoding")
        shape = (target.channels, target.height, target.width)
        needs_space(folder, (records.count - len(unreadable)) * math.prod(shape) * np.dtype(target.dtype).itemsize)
        with open(folder / "names.txt", "w", encoding="ascii") as names_file:
            images = _readable(attempts, unreadable, names_file, records.labels)
            count, digest, max_value = write_array(folder / "images.npy", images, shape, target.dtype)

    skipped = [line for _, line in sorted(unreadable.items())]
    if skipped and (settings.on_bad_image == "stop" or not count):
        hint = 'on_bad_image="skip" leaves them out' if count else "no image is left"
        raise UnreadableImagesError(
            f"{len(skipped)} of {records.count} images cannot be read ({hint}):\n  " + some(skipped, "\n  ")
        )
    if not count:
        raise ValueError(f"{source.description} has no images")
    num_resized = headers.sizes.total() - headers.sizes[target.height, target.width]
    size = headers.sizes.most_common(1)[0][0]
    reason = ""
    if settings.size is None and size != (target.height, target.width):
        reason = f", the size nearest to {size[0]} x {size[1]} that the network can halve"
    notes = [
        (num_resized, f"resized to {target.height} x {target.width}{reason}"),
        (headers.num_narrowed, "reduced from 16 to 8 bits per colour channel"),
        (headers.num_animated, "with several frames, only the first is used"),
        (len(skipped), "unreadable and left out"),
    ]
    description = [f"{count} images of {source.description}"]
    description += [f"{number} {note}" for number, note in notes if number]
    return {
        "source": "; ".join(description),
        "skipped": skipped,
        "splits": list(records.splits),
        "label_order": None if records.class_names is None else list(records.class_names),
        "digest": digest,
        "max": max_value,
    }


# ---- The two passes --------------------------------------------------------------------------------------------------


@dataclass
class Headers:
    """What the first pass finds out about all images together."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (H, W) of the readable images
    first_with: dict[int, str] = field(default_factory=dict)  # number of channels: name of the first image with it
    bits: int = 8  # the largest number of any image
    num_narrowed: int = 0
    num_animated: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)  # index: "name: reason"

    def add(self, name: str, header: Header) -> None:
        self.sizes[header.height, header.width] += 1
        self.first_with.setdefault(header.channels, name)
        self.bits = max(self.bits, header.bits)
        self.num_narrowed += header.narrowed
        self.num_animated += header.animated


def read_headers(records: Records, min_side: int, pool: Executor | None) -> Headers:
    headers = Headers()
    work = partial(read_header, min_side=min_side)
    for i, name, header, reason in _attempts(work, _numbered(records), pool, records.count, "reading headers"):
        if header is None:
            headers.unreadable[i] = f"{name}: {reason}"
        else:
            headers.add(name, header)
    return headers


def choose_target(headers: Headers, settings: DecodeSettings) -> Target:
    """The size, channels and bits that all images are decoded to.

    Raises:
        ValueError: different numbers of channels, except for gray and colour.
    """
    numbers = list(headers.first_with)
    if len(numbers) > 1 and set(numbers) != {1, 3}:
        a, b = numbers[:2] if set(numbers[:2]) != {1, 3} else (numbers[0], numbers[2])
        raise ValueError(
            f"{headers.first_with[a]} has {a} channels and {headers.first_with[b]} has {b}: give images with the same "
            "number of channels; only gray and colour may be mixed"
        )
    channels = max(numbers, default=1)
    most_common = headers.sizes.most_common(1)[0][0] if headers.sizes else (1, 1)
    height, width = settings.size or _fitting_size(most_common, settings.size_rule)
    background = background_values(settings.background, channels)
    return Target(channels, f"uint{headers.bits}", height, width, settings.center_crop, background)


def _fitting_size(size: tuple[int, int], rule: Rule | Literal["any"]) -> tuple[int, int]:
    if rule != "any" and max(size) > LARGEST:
        small, large = proposed_size(rule, *size), nearest_size(rule, *size)
        raise ValueError(
            f"most images are {size[0]}x{size[1]} (height x width), which takes long to train at: give --resolution "
            f"{small[0]}x{small[1]}, or {large[0]}x{large[1]} for that size"
        )
    return size if rule == "any" else nearest_size(rule, *size)


class Attempt(NamedTuple, Generic[T]):
    """The result of reading the header of an image, or of decoding it."""

    i: int
    name: str
    result: T | None  # None if it failed
    reason: str  # of the failure


def _numbered(records: Records) -> Iterator[tuple[int, str, Payload]]:
    return ((i, name, payload) for i, (name, payload) in enumerate(records.payloads(range(records.count))))


def _attempts(
    work: Callable[[Payload], T],
    items: Iterator[tuple[int, str, Payload]],
    pool: Executor | None,
    count: int,
    title: str,
) -> Iterator[Attempt[T]]:
    """`work` on every item, in order, in the pool if there is one."""

    def in_parallel() -> Iterator[Attempt[T]]:
        assert pool is not None
        while batch := list(islice(items, 128)):  # pool.map reads its whole input at once
            yield from pool.map(partial(_attempt, work), batch, chunksize=4)

    results = in_parallel() if pool else map(partial(_attempt, work), items)
    return iter(progress(results, title, count, unit=" images"))


def _attempt(work: Callable[[Payload], T], item: tuple[int, str, Payload]) -> Attempt[T]:
    i, name, payload = item
    return Attempt(i, name, *attempt(work, payload))


def attempt(work: Callable[[Payload], T], payload: Payload | Exception) -> tuple[T | None, str]:
    """The result of `work`, or None and why there is none."""
    try:
        if isinstance(payload, Exception):
            raise payload
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return work(payload), ""
    except Exception as error:  # whatever Pillow raises for a broken file
        return None, failure_reason(error)


def _readable(
    attempts: Iterable[Attempt[np.ndarray]],
    unreadable: dict[int, str],
    names_file: IO[str],
    labels: Sequence[Any] | None,
) -> Iterator[np.ndarray]:
    """The decoded images. Writes their names and labels to names_file, and adds the others to `unreadable`."""
    for i, name, image, reason in attempts:
        if image is None:
            unreadable[i] = f"{name}: {reason}"
        else:
            names_file.write(json.dumps([name] if labels is None else [name, labels[i]]) + "\n")
            yield image


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_array(
    path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int], dtype: str
) -> tuple[int, str, int]:
    """Write images to a .npy file. Returns their number, their digest and the largest value.

    The number is unknown until the end: then the header gets it.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (0, *shape)}
    count, max_value, sha256 = 0, 0, hashlib.sha256()
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)  # padded, with room for any number
        start = file.tell()
        for image in images:
            assert (image.shape, image.dtype) == (shape, dtype)
            pixels = image.tobytes()
            file.write(pixels)
            sha256.update(pixels)
            max_value = max(max_value, int(image.max()))
            count += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
        assert file.tell() == start
        flush_to_disk(file)
    return count, _digest((count, *shape), np.dtype(dtype), sha256), max_value


def _digest(shape: tuple[int, ...], dtype: np.dtype, pixels: hashlib._Hash) -> str:
    return hashlib.sha256(f"{shape} {dtype} {pixels.hexdigest()}".encode()).hexdigest()
