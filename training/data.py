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
import io
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
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

FORMAT = 3  # part of every cache key: raise it when the same files, or moons.py, would give other pixels
NUM_MOONS = {"train": 8192, "test": 1024}
# Pillow goes by content, not by name, and some of its formats start other programs (EPS): so only these.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".npy")
GRAY = frozenset(("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N"))
COLOUR = frozenset(("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap height and width


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


Payload = bytes | Path | None  # an encoded picture, or where it is


class _Opened(NamedTuple):
    number: int
    rows: Callable[[], Iterable[tuple[str, Payload]]]  # (name, payload) of each picture
    labels: list[Any] | None = None
    splits: tuple[str, ...] = ()


class _Source(NamedTuple):
    identity: list[Any]  # goes into the cache key: equal identity, equal pictures
    words: str
    open: Callable[[Path], _Opened]  # takes a folder for what is needed now only


class _Target(NamedTuple):
    """What every picture is made into."""

    channels: int
    dtype: str
    height: int
    width: int
    center_crop: bool
    background: tuple[int, ...]  # 1 value for gray pictures, else 3


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


# ---- Held out --------------------------------------------------------------------------------------------------------

HELD_OUT_SPLITS = ("validation", "valid", "val", "test")  # the first that a data set has, unless told
HELD_OUT_EVERY, HELD_OUT_MOST = 20, 1000  # of a data set without one every 20th picture, but no more than 1000


def evenly(number: int, wanted: int) -> np.ndarray:
    """Indices of so many of them, evenly spread; all if there are no more."""
    return np.arange(number) if wanted >= number else np.arange(wanted) * number // wanted


class Parts(NamedTuple):
    """What is learned from, and what is held out to see how well."""

    data: ImageSet  # what was read first, of which `rows` are learned from
    rows: np.ndarray  # (N,) int64, rising
    held_out: np.ndarray  # (M, C, H, W), of the type of data.images; M may be 0
    source: str  # of the held-out pictures, in words

    @property
    def training(self) -> np.ndarray:
        """(N, C, H, W): a view of the data if nothing of it is held out, else a copy."""
        return self.data.images if len(self.rows) == len(self.data) else self.data.images[self.rows]

    def labels(self) -> np.ndarray | None:
        """Of `training`: see ImageSet.labels."""
        labels = self.data.labels()
        return None if labels is None else labels[self.rows]


def load_parts(split: str | None = None, **options: Any) -> Parts:
    """The pictures of `load_images(**options)`, and others that are held out from learning.

    Args:
        split: of the data set, to hold out: by default a split for that if it has one, else every 20th picture, 1000 at
            most; "none": nothing.
    Raises:
        ValueError: the data set has no such split, or its pictures are of another kind.
    """
    data = load_images(**options)
    rows = np.arange(len(data))
    if split == "none":
        return Parts(data, rows, data.images[:0], "nothing")
    if split is None:
        split = next((name for name in HELD_OUT_SPLITS if name in data.splits), None)
    elif split not in data.splits or split == "train":
        allowed = [name for name in data.splits if name != "train"] or "no split but its own"
        raise ValueError(f"validation_split is {split!r}: the data set has {allowed}; or give none")
    if split is None:
        every = max(HELD_OUT_EVERY, -(-len(data) // HELD_OUT_MOST))
        chosen = np.arange(every - 1, len(data), every)
        words = (
            f"every {every}th picture of {data.source}, not learned from"
            if len(chosen)
            else "nothing: too few pictures"
        )
        return Parts(data, np.setdiff1d(rows, chosen), np.array(data.images[chosen]), words)
    # of the size of those that are learned from, whatever is commonest among these
    others = load_images(**options | {"split": split, "resolution": (data.height, data.width)})
    if others.images.shape[1:] != data.images.shape[1:] or others.images.dtype != data.images.dtype:
        raise ValueError(
            f"split {split!r} has pictures {others.images.shape[1:]} of {others.images.dtype}, the training split "
            f"{data.images.shape[1:]} of {data.images.dtype}: give another validation_split, or none"
        )
    return Parts(data, rows, others.images, others.source)


# ---- Sources ---------------------------------------------------------------------------------------------------------


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


# ---- The two passes --------------------------------------------------------------------------------------------------


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


# ---- One picture -----------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    height: int
    width: int
    channels: int
    bits: int
    narrowed: bool  # 16 bits per colour channel: Pillow reads the upper 8
    frames: bool  # more than one


def _read_header(payload: Payload, min_side: int) -> _Header:
    header = _header_of_npy(payload) if _is_npy(payload) else _header_of_image(payload)
    if min(header.height, header.width) < min_side:
        raise ValueError(f"{header.height} x {header.width} pixels: min_side is {min_side}")
    return header


def _header_of_npy(payload: Payload) -> _Header:
    array = _open_npy(payload)
    height, width, channels = array.shape
    return _Header(height, width, channels, 8 * array.itemsize, False, False)


def _header_of_image(payload: Payload) -> _Header:
    with _open(payload) as image:
        if image.mode not in GRAY | COLOUR:
            kind = {"I": "32-bit or signed integers", "F": "floating point"}.get(image.mode, "unknown")
            raise ValueError(f"pixels of mode {image.mode} ({kind}); 8-bit, and gray of 16 bits, can be read")
        width, height = image.size
        # Asking a PNG without EXIF for it would decode the whole picture. The size of a TIFF has been turned already.
        if "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
        is_16 = image.mode.startswith("I;16")
        coding = str(image.tile)
        gray = image.mode in GRAY or "LA;16" in coding  # 16-bit gray with alpha, which Pillow reads as RGBA
        narrowed, frames = ";16" in coding and not is_16, getattr(image, "is_animated", False)
        return _Header(height, width, 1 if gray else 3, 16 if is_16 else 8, narrowed, frames)


def _decode(payload: Payload, target: _Target) -> np.ndarray:
    """(C, H, W) as the target wants it."""
    pixels = np.array(_open_npy(payload)) if _is_npy(payload) else _pixels(payload, target)
    narrow = pixels.itemsize == 1 and target.dtype == "uint16"
    pixels = pixels.astype(target.dtype, copy=False)  # from a file it may have the other byte order
    if narrow:
        pixels = pixels * np.uint16(257)  # 255 * 257 = 65535
    if (pixels.shape[0], pixels.shape[1]) != (target.height, target.width):
        pixels = _resize(pixels, target)
    if pixels.shape[2] != target.channels:
        pixels = np.repeat(pixels, target.channels, axis=2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _pixels(payload: Payload, target: _Target) -> np.ndarray:
    """(H, W, C) uint8 or uint16, upright and without alpha; C is 1 or 3."""
    with _open(payload) as image:
        ImageOps.exif_transpose(image, in_place=True)
        transparent = image.has_transparency_data
        if image.mode.startswith("I;16"):
            pixels = np.array(image).astype(np.uint16)[:, :, None]
            if transparent:  # one gray value that stands for nothing
                background = np.array(target.background, np.uint16) * np.uint16(257)
                pixels = np.where(pixels == image.info["transparency"], background, pixels)
            return pixels
        mode = "L" if target.channels == 1 else "RGB"
        if not transparent:
            return np.array(image.convert(mode)).reshape(image.height, image.width, -1)
        layers = np.array(image.convert(mode + "A")).astype(np.uint16)
        pixels, alpha = layers[:, :, :-1], layers[:, :, -1:]
        mixed = pixels * alpha + np.array(target.background, np.uint16) * (255 - alpha)  # at most 255^2: fits
        return ((mixed + 127) // 255).astype(np.uint8)  # rounded: there is no half, for 255 is odd


def _resize(pixels: np.ndarray, target: _Target) -> np.ndarray:
    height, width = pixels.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    if target.center_crop:
        scale = min(height / target.height, width / target.width)  # pixels of the picture per pixel of the target
        x = max(0.0, (width - scale * target.width) / 2)
        y = max(0.0, (height - scale * target.height) / 2)
        box = (x, y, width - x, height - y)
    channels = []
    for channel in np.moveaxis(pixels, 2, 0):
        wide = channel.dtype == np.uint16  # Pillow cannot resize 16 bits well, but floating point it can
        image = Image.fromarray(channel.astype(np.float32) if wide else np.ascontiguousarray(channel))
        resized = np.asarray(image.resize((target.width, target.height), Image.Resampling.LANCZOS, box))
        channels.append(np.clip(np.rint(resized), 0, 65535).astype(np.uint16) if wide else resized)
    return np.stack(channels, axis=2)


def _open(payload: Payload) -> ImageFile.ImageFile:
    if payload is None or payload == b"":
        raise ValueError("empty")
    if isinstance(payload, Path) and payload.stat().st_size == 0:
        raise ValueError("empty")
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)


def _is_npy(payload: Payload) -> bool:
    return isinstance(payload, Path) and payload.suffix.lower() == ".npy"


def _open_npy(payload: Payload) -> np.ndarray:
    """(H, W, C), mapped."""
    assert isinstance(payload, Path)
    array = np.lib.format.open_memmap(payload, mode="r")
    if array.ndim not in (2, 3) or array.dtype.kind != "u" or array.itemsize > 2:
        raise ValueError(f"an array {array.shape} of {array.dtype}; give (H, W) or (H, W, C), uint8 or uint16")
    return array[:, :, None] if array.ndim == 2 else array


# ---- Checking --------------------------------------------------------------------------------------------------------


def _height_width(resolution: int | tuple[int, int]) -> tuple[int, int]:
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(n) is int and n > 0 for n in sides)):
        raise ValueError(f"resolution is {resolution!r}: give a positive int, or (height, width)")
    return sides[0], sides[1]


def _colour(name: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"background is {name!r}: give a CSS colour name or #rrggbb") from None
    if alpha:
        raise ValueError(f"background is {name!r}: give a colour without transparency")
    return red, green, blue


def _luminance(colour: tuple[int, int, int]) -> int:
    """Of ITU-R BT.601, as Pillow makes gray of colour."""
    return int(np.array(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0])
