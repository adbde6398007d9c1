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

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from training.data.decode import Payload, _colour, _decode, _luminance, _read_header, _Target
from training.data.sources import _dataset, _image_folder, _Source

FORMAT = 3  # part of every cache key: raise it when the same files, or moons.py, would give other pixels
NUM_MOONS = {"train": 8192, "test": 1024}


class BadImagesError(ValueError):
    """Some images cannot be read; the message names all of them, each with the reason."""


@dataclass(frozen=True)
class ImageSet:
    """The pictures of one data set, all of one shape."""

    images: np.ndarray  # (N, C, H, W) uint8 or uint16, memory-mapped read-only
    source: str  # what it was made from, in words for the log and the card
    skipped: tuple[str, ...]  # "name: reason" of the unreadable files that were left out on request
    names_file: Path  # one line of JSON for each picture
    splits: tuple[str, ...] = ()  # of the data set, this one among them; none if it is a folder of images

    def name(self, i: int) -> str:
        """What picture i is called: its path in the folder, or its row."""
        with open(self.names_file, encoding="ascii") as lines:
            return str(json.loads(next(islice(lines, i, None)))[0])

    def labels(self) -> np.ndarray | None:
        """(N,) int64 from 0 on: the data set's labels, or in which folder a picture is; None if all are in one class.

        Of folders within folders the outermost counts.
        """
        with open(self.names_file, encoding="ascii") as lines:
            named = [json.loads(line) for line in lines]
        words = [label[0] if label else name.rpartition("/")[0].split("/")[0] for name, *label in named]
        classes = sorted(set(words), key=str)
        if len(classes) < 2:
            return None
        number = {word: i for i, word in enumerate(classes)}
        return np.array([number[word] for word in words])

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


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    resolution: int | tuple[int, int] | None = None,
    center_crop: bool = True,
    background: str = "white",
    on_bad_image: str = "stop",
    min_side: int = 1,
    cache_dir: str | Path,
    num_workers: int = 0,
) -> ImageSet:
    """All pictures of one source as one array, from the cache if they were decoded before.

    Args:
        dataset_name: "moons", a local folder of parquet files in the Hub's layout, or a name on the Hub. A Hub name is
            cached by name: after it changed there, delete the cache.
        dataset_config_name: the Hub's name for a part of a data set.
        split: as in `datasets.load_dataset`, so "train[:100]" works too.
        train_data_dir: folder of image files, at any depth. Give this or dataset_name.
        resolution: side of the square pictures, or (H, W); None is the most common size in the data (moons: 32).
        center_crop: a picture of another size is resized to cover the target and cropped at the centre (True), or
            squeezed to it (False).
        background: what shows through transparent pictures, a CSS colour name or #rrggbb; for gray ones its luminance.
        on_bad_image: "stop" raises and names every unreadable picture, "skip" leaves them out.
        min_side: pixels; a picture with a shorter side counts as one that cannot be read.
        cache_dir: where the arrays are kept; made if missing.
        num_workers: processes that decode; 0 decodes in this one.
    Raises:
        BadImagesError: pictures are unreadable and on_bad_image is "stop", or all are.
        ValueError: another value of an option, no pictures, or pictures that cannot be in one array.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"dataset_name is {dataset_name!r}, train_data_dir is {train_data_dir!r}: give exactly one")
    if on_bad_image not in ("stop", "skip"):
        raise ValueError(f'on_bad_image is {on_bad_image!r}: give "stop" or "skip"')
    if not isinstance(min_side, int) or min_side < 1:
        raise ValueError(f"min_side is {min_side!r}: give an int of at least 1")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers is {num_workers!r}: give an int of at least 0")
    if not isinstance(split, str):
        raise ValueError(f'split is {split!r}: give a name such as "train"')
    own_splits = {None: ["train"], "moons": list(NUM_MOONS)}.get(dataset_name, [split])
    if (dataset_name is None or dataset_name == "moons") and (dataset_config_name or split not in own_splits):
        raise ValueError(
            f"dataset_config_name is {dataset_config_name!r}, split is {split!r}: folders of images and moons have "
            f"no configs, and here only the splits {own_splits}"
        )
    size = None if resolution is None else _height_width(resolution)
    colour = _colour(background)
    cache_dir = Path(cache_dir)

    identity: list[Any]
    make: Callable[[Path], dict[str, Any]]  # writes images.npy into a folder and returns what goes into meta.json
    if dataset_name == "moons":
        size = size or (32, 32)
        identity = ["moons", split, NUM_MOONS]
        make = partial(_draw_moons, size=size, split=split)
    else:
        if train_data_dir is not None:
            source = _image_folder(Path(train_data_dir).expanduser(), cache_dir)
        else:
            source = _dataset(str(dataset_name), dataset_config_name, split)
        identity = source.identity
        make = partial(
            _decode_all,
            source=source,
            size=size,
            center_crop=bool(center_crop),
            colour=colour,
            on_bad_image=on_bad_image,
            min_side=min_side,
            num_workers=num_workers,
        )

    settings = [FORMAT, identity, size, bool(center_crop), colour, on_bad_image, min_side]
    folder = cache_dir / hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if not (folder / "meta.json").exists():
        temporary = cache_dir / f".{folder.name[:16]}-{uuid.uuid4().hex}"
        new = temporary / "new"
        new.mkdir(parents=True)
        try:
            meta = make(new)
            with open(new / "meta.json", "w", encoding="ascii") as file:
                json.dump(meta, file, indent=1)
                _to_disk(file)
            try:
                new.rename(folder)
            except OSError:  # another process was quicker, and made the same
                if not (folder / "meta.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="ascii"))
        images = np.load(folder / "images.npy", mmap_mode="r")
        return ImageSet(images, meta["source"], tuple(meta["skipped"]), folder / "names.txt", tuple(meta["splits"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}): delete it") from error


def _draw_moons(folder: Path, size: tuple[int, int], split: str) -> dict[str, Any]:
    from ddpm_pipeline.moons import MoonDataset

    number, seed = NUM_MOONS[split], list(NUM_MOONS).index(split)
    moons = MoonDataset(number, size=size, seed=seed)
    at_once = max(1, 2**23 // (size[0] * size[1]))

    def images() -> Iterator[np.ndarray]:
        for start in range(0, number, at_once):
            yield from moons.images(range(start, min(start + at_once, number))).numpy()

    _write(folder, tqdm(images(), "drawing moons", number), (1, *size), "uint8")
    (folder / "names.txt").write_text("".join(f'["moon {i}"]\n' for i in range(number)), encoding="ascii")
    words = f"{number} moons, drawn with seed {seed}, {size[0]} x {size[1]}"
    return {"source": words, "skipped": [], "splits": list(NUM_MOONS)}


def _decode_all(
    folder: Path,
    source: _Source,
    size: tuple[int, int] | None,
    center_crop: bool,
    colour: tuple[int, int, int],
    on_bad_image: str,
    min_side: int,
    num_workers: int,
) -> dict[str, Any]:
    """Holds few pictures in memory, however many there are."""
    count, rows, labels, splits = source.open(folder.parent / "scratch")
    bad: dict[int, str] = {}
    with ProcessPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
        # Headers: what do all have in common?
        sizes: Counter[tuple[int, int]] = Counter()
        first_with: dict[int, str] = {}  # channels: a picture that has so many
        bits, narrowed, frames = 8, 0, 0
        items = ((i, name, payload) for i, (name, payload) in enumerate(rows()))
        read_header = partial(_read_header, min_side=min_side)
        for i, name, header, reason in _attempts(read_header, items, pool, count, "reading headers"):
            if header is None:
                bad[i] = f"{name}: {reason}"
            else:
                sizes[header.height, header.width] += 1
                first_with.setdefault(header.channels, name)
                bits, narrowed = max(bits, header.bits), narrowed + header.narrowed
                frames += header.frames
        if len(first_with) > 1 and set(first_with) != {1, 3}:  # gray and colour go together as colour
            (a, name_a), (b, name_b) = list(first_with.items())[:2]
            if {a, b} == {1, 3}:
                b, name_b = list(first_with.items())[2]
            raise ValueError(f"{name_a} has {a} channels and {name_b} has {b}: they cannot be in one data set")

        # Pixels. Rows are written one after the other, so a picture that turns out bad leaves no hole.
        channels = max(first_with, default=1)
        height, width = size or (sizes.most_common(1)[0][0] if sizes else (1, 1))
        background = colour if channels != 1 else (_luminance(colour),)
        target = _Target(channels, f"uint{bits}", height, width, center_crop, background)
        with open(folder / "names.txt", "w", encoding="ascii") as names:
            items = ((i, name, payload) for i, (name, payload) in enumerate(rows()) if i not in bad)
            attempts = _attempts(partial(_decode, target=target), items, pool, count - len(bad), "decoding")
            number = _write(folder, _good(attempts, bad, names, labels), (channels, height, width), target.dtype)

    listed = [line for _, line in sorted(bad.items())]
    if listed and (on_bad_image == "stop" or not number):
        hint = 'on_bad_image="skip" leaves them out' if number else "none is left"
        raise BadImagesError("\n  ".join([f"{len(listed)} of {count} images cannot be read ({hint}):", *listed]))
    if not number:
        raise ValueError(f"{source.words} holds no images")
    resized = sum(sizes.values()) - sizes[height, width]
    notes = [
        (resized, f"resized to {height} x {width}"),
        (narrowed, "of 16 bits per colour channel, of which 8 are kept"),
        (frames, "of several frames, of which the first is kept"),
        (len(listed), "unreadable and left out"),
    ]
    words = [f"{number} images of {source.words}", *(f"{n} {what}" for n, what in notes if n)]
    return {"source": "; ".join(words), "skipped": listed, "splits": list(splits)}


def _good(
    attempts: Iterable[tuple[int, str, Any, str]], bad: dict[int, str], names: Any, labels: list[Any] | None
) -> Iterator[np.ndarray]:
    for i, name, image, reason in attempts:
        if image is None:
            bad[i] = f"{name}: {reason}"
        else:
            names.write(json.dumps([name] if labels is None else [name, labels[i]]) + "\n")
            yield image


def _attempts(
    work: Callable[[Payload], Any],
    items: Iterator[tuple[int, str, Payload]],
    pool: Executor | None,
    count: int,
    title: str,
) -> Iterator[tuple[int, str, Any, str]]:
    """(i, name, result or None, reason of failure) of every item, in order."""

    def in_parallel() -> Iterator[tuple[int, str, Any, str]]:
        assert pool is not None
        while batch := list(islice(items, 128)):  # pool.map takes all it is given into memory
            yield from pool.map(partial(_attempt, work), batch, chunksize=4)

    results = in_parallel() if pool else map(partial(_attempt, work), items)
    return iter(tqdm(results, title, count, unit=" images"))


def _attempt(work: Callable[[Payload], Any], item: tuple[int, str, Payload]) -> tuple[int, str, Any, str]:
    i, name, payload = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return i, name, work(payload), ""
    except UnidentifiedImageError:  # its message has the whole path, or an address in memory
        return i, name, None, "not an image in a known format"
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        return i, name, None, getattr(error, "strerror", None) or str(error) or type(error).__name__


def _write(folder: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int], dtype: str) -> int:
    """Write images.npy and return how many images came: the header has room for any number, so it is set last."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (0, *shape)}
    number = 0
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for image in images:
            assert (image.shape, image.dtype) == (shape, dtype)
            file.write(image.tobytes())
            number += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (number, *shape)})
        assert file.tell() == start
        _to_disk(file)
    return number


def _to_disk(file: Any) -> None:
    """So that after a power cut no renamed folder holds an empty file."""
    file.flush()
    os.fsync(file.fileno())


def _height_width(resolution: int | tuple[int, int]) -> tuple[int, int]:
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(n) is int and n > 0 for n in sides)):
        raise ValueError(f"resolution is {resolution!r}: give a positive int, or (height, width)")
    return sides[0], sides[1]
