"""CACHE: the images of a source are decoded once, into one array on disk that later runs map into memory.

`load_images` goes through the source twice. The first pass reads the headers and settles what all images share: size,
channels, 8 or 16 bits. The second pass decodes. The key of a cache is a hash of everything its pixels depend on.

    <cache_dir>/<key>/images.npy   (N, C, H, W) uint8 or uint16
    <cache_dir>/<key>/names.txt    a line of JSON for each image: its name, and its label if the data set has labels
    <cache_dir>/<key>/meta.json    the source, the images left out and why, the splits of the data set

Gray and colour images together become colour. If one image has 16 bits, all become 16-bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ddpm_pipeline.files import remove
from training.data.decode import Payload, Target, decode, luminance, parse_colour, read_header
from training.data.sources import MOON_SIZE, NUM_MOONS, Moons, Records, Source, hub_dataset, image_folder

FORMAT = 3  # part of every cache key: raise it when the same files, or moons.py, would give other pixels


class UnreadableImagesError(ValueError):
    """Some images cannot be read; the message names all of them, each with the reason."""


@dataclass(frozen=True)
class ImageSet:
    """The images of one data set, all of one shape."""

    images: np.ndarray  # (N, C, H, W) uint8 or uint16, memory-mapped read-only
    source: str  # where they come from, for the log and the card; up to the first ";" it identifies the data set
    skipped: tuple[str, ...]  # "name: reason" of the unreadable images that were left out on request
    names_file: Path  # one line of JSON for each image
    splits: tuple[str, ...] = ()  # of the data set, this one included; empty for a folder of images

    def name(self, i: int) -> str:
        """The name of image i: its path in the folder, or its row in the table."""
        with open(self.names_file, encoding="ascii") as lines:
            return str(json.loads(next(islice(lines, i, None)))[0])

    def labels(self) -> np.ndarray | None:
        """(N,) int64, numbered from 0 in sorted order; None if there are fewer than two labels.

        Labels are those of the data set. In a folder of images the label is the outermost folder that an image is in.
        """
        with open(self.names_file, encoding="ascii") as lines:
            records = [json.loads(line) for line in lines]
        labels = [label[0] if label else name.rpartition("/")[0].split("/")[0] for name, *label in records]
        distinct = sorted(set(labels), key=str)
        if len(distinct) < 2:
            return None
        numbers = {label: i for i, label in enumerate(distinct)}
        return np.array([numbers[label] for label in labels])

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def height(self) -> int:
        return self.images.shape[2]

    @property
    def width(self) -> int:
        return self.images.shape[3]

    @property
    def max_value(self) -> int:
        """The value of white: 255 or 65535."""
        return int(np.iinfo(self.images.dtype).max)


@dataclass(frozen=True)
class DecodeSettings:
    """What the pixels depend on besides the source. The cache key is made of these, in this order."""

    size: tuple[int, int] | None  # (H, W); None is the most common size in the data
    center_crop: bool
    background: tuple[int, int, int]
    on_bad_image: str
    min_side: int


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    resolution: int | str | tuple[int, int] | None = None,
    center_crop: bool = True,
    background: str = "white",
    on_bad_image: str = "stop",
    min_side: int = 1,
    cache_dir: str | Path,
    num_workers: int = 0,
) -> ImageSet:
    """All images of one source as one array, from the cache if they were decoded before.

    Args:
        dataset_name: "moons", a local folder of parquet files in the Hub's layout, or a name on the Hub. The cache of a
            Hub data set is keyed by its name: when it has changed there, delete the cache.
        dataset_config_name: a configuration (subset) of the data set.
        split: as in `datasets.load_dataset`, so "train[:100]" works too.
        train_data_dir: folder of image files, at any depth. Give this or dataset_name.
        resolution: a side, (H, W) or "HxW" in pixels; None is the most common size in the data (moons: 32).
        center_crop: an image of another size is resized to cover the target and cropped at the centre (True), or
            squeezed to it (False).
        background: the colour behind transparent pixels, a CSS name or #rrggbb; gray images take its luminance.
        on_bad_image: "stop" raises an error that names every unreadable image, "skip" leaves them out.
        min_side: pixels; an image with a shorter side counts as unreadable.
        cache_dir: where the arrays are kept; made if missing.
        num_workers: processes that decode; 0 decodes in this one.
    Raises:
        UnreadableImagesError: images are unreadable and on_bad_image is "stop", or all are.
        ValueError: another value of an option, no images, or images that cannot be in one array.
    """
    if on_bad_image not in ("stop", "skip"):
        raise ValueError(f'on_bad_image is {on_bad_image!r}: give "stop" or "skip"')
    if not isinstance(min_side, int) or min_side < 1:
        raise ValueError(f"min_side is {min_side!r}: give an int of at least 1")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers is {num_workers!r}: give an int of at least 0")
    colour = parse_colour(background)
    cache_dir = Path(cache_dir)
    size = _parse_resolution(resolution)
    source = _find_source(dataset_name, dataset_config_name, split, train_data_dir, size, cache_dir)
    size = source.size if isinstance(source, Moons) else size
    settings = DecodeSettings(size, bool(center_crop), colour, on_bad_image, min_side)

    folder = cache_dir / cache_key(source, settings)
    if not (folder / "meta.json").exists():
        if isinstance(source, Moons):
            _create(folder, partial(write_moons, source))
        else:
            _create(folder, partial(write_decoded, source, settings, num_workers))
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="ascii"))
        images = np.load(folder / "images.npy", mmap_mode="r")
        return ImageSet(images, meta["source"], tuple(meta["skipped"]), folder / "names.txt", tuple(meta["splits"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}): delete it") from error


def cache_key(source: Source | Moons, settings: DecodeSettings) -> str:
    key = json.dumps([FORMAT, source.identity, *astuple(settings)])
    return hashlib.sha256(key.encode()).hexdigest()


def _parse_resolution(resolution: Any) -> tuple[int, int] | None:
    if resolution is None:
        return None
    from ddpm_pipeline.pixels import height_width  # imports torch, which reading a cache does not need

    return height_width(resolution, "resolution")


def _find_source(
    dataset_name: str | None,
    config: str | None,
    split: str,
    train_data_dir: str | Path | None,
    size: tuple[int, int] | None,
    cache_dir: Path,
) -> Source | Moons:
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"dataset_name is {dataset_name!r}, train_data_dir is {train_data_dir!r}: give exactly one")
    if not isinstance(split, str):
        raise ValueError(f'split is {split!r}: give a name such as "train"')
    if dataset_name is not None and dataset_name != "moons":
        return hub_dataset(dataset_name, config, split)

    kind, splits = ("the moons", list(NUM_MOONS)) if train_data_dir is None else ("a folder of images", ["train"])
    if config:
        raise ValueError(f"dataset_config_name is {config!r}: {kind} has no configurations, leave it out")
    if split not in splits:
        raise ValueError(f"split is {split!r}: {kind} has only the splits {splits}")
    if train_data_dir is None:
        return Moons(split, size or MOON_SIZE)
    return image_folder(Path(train_data_dir).expanduser(), cache_dir)


# ---- Making a cache --------------------------------------------------------------------------------------------------


def _create(folder: Path, write: Callable[[Path, Path], dict[str, Any]]) -> None:
    """Make the cache `folder`: written beside it, then renamed. Of several processes the first to finish wins.

    That is why this is not `files.replacing`, which replaces the folder it finds: another process may have made the
    same cache by now and be reading it.

    Args:
        write: writes images.npy and names.txt into its first folder and returns what goes into meta.json; its
            second folder is for temporary files.
    """
    temporary = folder.with_name(f".{folder.name[:16]}-{uuid.uuid4().hex}")
    new = temporary / "new"
    new.mkdir(parents=True)
    try:
        meta = write(new, temporary / "scratch")
        with open(new / "meta.json", "w", encoding="ascii") as file:
            json.dump(meta, file, indent=1)
            flush_to_disk(file)
        try:
            new.rename(folder)
        except OSError:  # the folder exists: another process was quicker and has made the same
            if not (folder / "meta.json").exists():
                raise
    finally:
        remove(temporary)


def write_moons(moons: Moons, folder: Path, scratch: Path) -> dict[str, Any]:
    images = tqdm(moons.images(), "drawing moons", moons.count)
    _write_array(folder / "images.npy", images, (1, *moons.size), "uint8")
    names = "".join(f'["moon {i}"]\n' for i in range(moons.count))
    (folder / "names.txt").write_text(names, encoding="ascii")
    return {"source": moons.description, "skipped": [], "splits": list(NUM_MOONS)}


def write_decoded(
    source: Source, settings: DecodeSettings, num_workers: int, folder: Path, scratch: Path
) -> dict[str, Any]:
    """Decode a source into `folder`. Only a few images are in memory at once, however many there are.

    Raises:
        UnreadableImagesError, ValueError: as load_images.
    """
    records = source.open(scratch)
    with ProcessPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
        headers = _read_headers(records, settings.min_side, pool)
        target = _choose_target(headers, settings)
        # Images are written one after the other, so one that fails to decode leaves no hole.
        unreadable = dict(headers.unreadable)
        items = (item for item in _numbered(records) if item[0] not in headers.unreadable)
        attempts = _attempts(partial(decode, target=target), items, pool, records.count - len(unreadable), "decoding")
        with open(folder / "names.txt", "w", encoding="ascii") as names_file:
            images = _readable(attempts, unreadable, names_file, records.labels)
            shape = (target.channels, target.height, target.width)
            count = _write_array(folder / "images.npy", images, shape, target.dtype)

    skipped = [line for _, line in sorted(unreadable.items())]
    if skipped and (settings.on_bad_image == "stop" or not count):
        hint = 'on_bad_image="skip" leaves them out' if count else "none is left"
        raise UnreadableImagesError(
            "\n  ".join([f"{len(skipped)} of {records.count} images cannot be read ({hint}):", *skipped])
        )
    if not count:
        raise ValueError(f"{source.description}: no images in it")
    num_resized = headers.sizes.total() - headers.sizes[target.height, target.width]
    notes = [
        (num_resized, f"resized to {target.height} x {target.width}"),
        (headers.num_narrowed, "reduced from 16 to 8 bits per colour channel"),
        (headers.num_animated, "with several frames, only the first is used"),
        (len(skipped), "unreadable and left out"),
    ]
    description = [f"{count} images of {source.description}", *(f"{number} {note}" for number, note in notes if number)]
    return {"source": "; ".join(description), "skipped": skipped, "splits": list(records.splits)}


# ---- The two passes --------------------------------------------------------------------------------------------------


@dataclass
class Headers:
    """What the first pass finds out about all images together."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (H, W) of the readable ones
    first_with: dict[int, str] = field(default_factory=dict)  # number of channels: the first image that has so many
    bits: int = 8  # the most of any image
    num_narrowed: int = 0
    num_animated: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)  # index: "name: reason"


def _read_headers(records: Records, min_side: int, pool: Executor | None) -> Headers:
    headers = Headers()
    work = partial(read_header, min_side=min_side)
    for i, name, header, reason in _attempts(work, _numbered(records), pool, records.count, "reading headers"):
        if header is None:
            headers.unreadable[i] = f"{name}: {reason}"
        else:
            headers.sizes[header.height, header.width] += 1
            headers.first_with.setdefault(header.channels, name)
            headers.bits = max(headers.bits, header.bits)
            headers.num_narrowed += header.narrowed
            headers.num_animated += header.animated
    return headers


def _choose_target(headers: Headers, settings: DecodeSettings) -> Target:
    """The size, channels and bits that all images get.

    Raises:
        ValueError: numbers of channels that do not go together; gray and colour do.
    """
    numbers = list(headers.first_with)
    if len(numbers) > 1 and set(numbers) != {1, 3}:
        a, b = numbers[:2] if set(numbers[:2]) != {1, 3} else (numbers[0], numbers[2])
        raise ValueError(
            f"{headers.first_with[a]} has {a} channels and {headers.first_with[b]} has {b}: "
            "all images of a data set need the same number, only gray and colour may be mixed"
        )
    channels = max(numbers, default=1)
    most_common = headers.sizes.most_common(1)[0][0] if headers.sizes else (1, 1)
    height, width = settings.size or most_common
    background = settings.background if channels != 1 else (luminance(settings.background),)
    return Target(channels, f"uint{headers.bits}", height, width, settings.center_crop, background)


class Attempt(NamedTuple):
    """What became of one image."""

    i: int
    name: str
    result: Any  # None if it failed
    reason: str  # of the failure


def _numbered(records: Records) -> Iterator[tuple[int, str, Payload]]:
    return ((i, name, payload) for i, (name, payload) in enumerate(records.payloads()))


def _attempts(
    work: Callable[[Payload], Any],
    items: Iterator[tuple[int, str, Payload]],
    pool: Executor | None,
    count: int,
    title: str,
) -> Iterator[Attempt]:
    """`work` done on every item, in order, by the pool if there is one."""

    def in_parallel() -> Iterator[Attempt]:
        assert pool is not None
        while batch := list(islice(items, 128)):  # pool.map reads its whole input at once
            yield from pool.map(partial(_attempt, work), batch, chunksize=4)

    results = in_parallel() if pool else map(partial(_attempt, work), items)
    return iter(tqdm(results, title, count, unit=" images"))


def _attempt(work: Callable[[Payload], Any], item: tuple[int, str, Payload]) -> Attempt:
    i, name, payload = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Attempt(i, name, work(payload), "")
    except UnidentifiedImageError:  # its message has the whole path, or an address in memory
        return Attempt(i, name, None, "not an image in a known format")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        return Attempt(i, name, None, getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _readable(
    attempts: Iterable[Attempt], unreadable: dict[int, str], names_file: IO[str], labels: list[Any] | None
) -> Iterator[np.ndarray]:
    """The decoded images. Writes their names and labels, and adds the others to `unreadable`."""
    for i, name, image, reason in attempts:
        if image is None:
            unreadable[i] = f"{name}: {reason}"
        else:
            names_file.write(json.dumps([name] if labels is None else [name, labels[i]]) + "\n")
            yield image


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _write_array(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int], dtype: str) -> int:
    """Write a .npy file of as many images as come, and return how many: the header is completed at the end."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (0, *shape)}
    count = 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)  # padded, with room for any number
        start = file.tell()
        for image in images:
            assert (image.shape, image.dtype) == (shape, dtype)
            file.write(image.tobytes())
            count += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
        assert file.tell() == start
        flush_to_disk(file)
    return count


def flush_to_disk(file: IO[Any]) -> None:
    """So that after a power cut no renamed folder holds an empty file."""
    file.flush()
    os.fsync(file.fileno())
