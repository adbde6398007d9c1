"""PACK: decode a data set once into shards of pixels at the size of training, for `train.py --streaming`.

    python -m training.data.pack my/images packed
    python -m training.data.pack my/images packed --resolution 64 --num_workers 8

    packed/manifest.json     size, dtype, classes, and of each split its shards: images, bytes, sha256
    packed/train-00000.npy   (n, C, H, W) uint8 or uint16
    packed/train-labels.npy  (N,) int32, the classes of all images of the split, -1 where there is none

The images of a split are mixed, in an order that depends on their number alone. The manifest is written last. A
packing that was interrupted continues: shards that are complete are kept.
Exit codes: 0 done; 2 a mistake in the command or the data; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ddpm_pipeline import rng
from ddpm_pipeline.decode import Payload, Target, parse_colour
from ddpm_pipeline.files import remove, replacing, sha256_of
from ddpm_pipeline.pixels import height_width
from training.command_line import exit_code, parse_dataclass
from training.data.cache import (
    DecodeSettings,
    UnreadableImagesError,
    attempt,
    cache_key,
    choose_target,
    find_source,
    read_headers,
)
from training.data.disk import free_bytes
from training.data.image_set import in_order
from training.data.shard_cache import decode_checked
from training.data.shards import MANIFEST, PACKED_FORMAT, is_packed
from training.data.sources import Moons, Records
from training.data.split import HELD_OUT_SPLITS
from training.messages import some
from training.progress import progress

STATE = ".packing.json"  # what an interrupted packing was of


@dataclass(frozen=True)
class PackConfig:
    """Settings of a packing. What they share with train.py means the same.

    Args:
        source: folder of image files or of parquet files, or a data set on the Hub.
        output: folder for the shards; created if missing.
        dataset_config_name: configuration (subset) of the data set on the Hub.
        image_column: column of the images in a data set that has several; default: the only one.
        label_column: column of the labels, in a data set or in the metadata.csv of a folder; default: as for train.py.
        resolution: size of the images in pixels, one side or HEIGHTxWIDTH; default: the most common size in the data.
        center_crop: resize an image of another size until it covers the target, then crop its centre; false: stretch it
            to the target.
        background: colour behind transparent pixels, a name or #rrggbb.
        on_bad_image: unreadable images: "stop" names the first and exits, "skip" leaves them out.
        min_side: shortest allowed side of an image in pixels; a smaller image counts as unreadable.
        images_per_shard: images in a shard.
        num_workers: processes that decode.
        cache_dir: folder that remembers the hash of the files.
    """

    source: str
    output: str
    dataset_config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    resolution: str | int | None = None
    center_crop: bool = True
    background: str = "white"
    on_bad_image: str = "stop"
    min_side: int = 8
    images_per_shard: int = 8192
    num_workers: int = 1
    cache_dir: str = "~/.cache/ddpm_pipeline"

    def __post_init__(self) -> None:
        for name in ("min_side", "images_per_shard", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give an integer of at least 1")
        if self.on_bad_image not in ("stop", "skip"):
            raise ValueError(f'on_bad_image is {self.on_bad_image!r}: give "stop" or "skip"')


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_dataclass(
        PackConfig, arguments, description="Pack images into shards.", positional=("source", "output")
    )
    return exit_code("pack.py", lambda: print(pack(config)), config.output, "Complete shards")


def pack(config: PackConfig) -> str:
    """Write the shards of all splits, those that are missing. Returns what was written, in a sentence.

    Raises:
        ValueError: no images, unreadable images and on_bad_image is "stop", no room, or a folder with other shards or
            where another packing is running.
    """
    output = Path(config.output).expanduser()
    if (output / MANIFEST).exists():
        raise ValueError(f"output is '{output}', which has packed shards already, all of them: give another folder")
    folder = Path(config.source).expanduser()
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output is '{output}', which is in the source: give a folder outside")
    output.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in output.iterdir() if not path.name.startswith(".packing")]
    if others and not (output / STATE).exists():
        raise ValueError(f"output is '{output}', which has other files: {some(sorted(others))}: give a new folder")
    lock = FileLock(output / ".packing.lock", timeout=0, fallback_to_soft=False)
    try:
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
        return _pack(config, output, Path(config.cache_dir).expanduser())
    except Timeout:
        raise ValueError(f"output is '{output}', where another packing is running: wait for it") from None
    except ValueError as error:  # of settings that train.py has
        raise ValueError(re.sub("^(dataset_name|train_data_dir) is", "source is", str(error))) from error
    finally:
        if lock.is_locked:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            output.rmdir()  # if nothing was written


def _pack(config: PackConfig, output: Path, cache_dir: Path) -> str:
    folder = Path(config.source).expanduser()
    if is_packed(folder):
        raise ValueError(f"source is '{folder}', which has packed shards already: train.py reads them with --streaming")
    is_table = not folder.is_dir() or next(folder.rglob("*.parquet"), None) is not None
    place = {"dataset_name": config.source, "train_data_dir": None}
    if not is_table:
        place = {"dataset_name": None, "train_data_dir": config.source}
    size = None if config.resolution is None else height_width(config.resolution, "resolution")
    settings = DecodeSettings(
        size, config.center_crop, parse_colour(config.background), config.on_bad_image, config.min_side,
        None if size is None else "any",
    )  # fmt: skip
    splits: dict[str, dict[str, Any]] = {}
    target, names, wanted, description = None, None, ["train"], ""
    with tempfile.TemporaryDirectory(dir=output, prefix=".packing-") as scratch:
        while wanted:
            split = wanted.pop(0)
            of_folders = {"include": None, "exclude": None, "follow_links": False, "split_folders": True}
            source = find_source(
                place["dataset_name"], config.dataset_config_name, split, place["train_data_dir"], None, cache_dir,
                config.image_column, config.label_column, **({} if is_table else of_folders),
            )  # fmt: skip
            if isinstance(source, Moons):
                raise ValueError("source is 'moons': they are drawn, and need no shards")
            records = source.open(Path(scratch) / split)
            # whether a bad image stops: the shards are the same
            key = cache_key(source, replace(settings, size_rule="any", on_bad_image="skip"))
            plan = _plan(output / STATE, split, key, config.images_per_shard)
            if target is None:
                target = Target(**plan["target"]) if "target" in plan else _target(records, settings)
                wanted += [name for name in HELD_OUT_SPLITS if name in records.splits]
                description = source.description.partition(", split ")[0]
            elif "target" not in plan:
                _check_alike(_target(records, replace(settings, size=(target.height, target.width))), target, split)
            _remember(output / STATE, split, plan | {"target": asdict(target)})
            _check_room(output, split, records.count, target)
            splits[split], names = _pack_split(output, split, records, target, config, names)
    assert target is not None
    manifest = {
        "format": PACKED_FORMAT,
        "source": description,
        "shape": [target.channels, target.height, target.width],
        "dtype": target.dtype,
        "class_names": names,
        "splits": splits,
    }
    with replacing(output / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for note in [output / STATE, *(path for split in splits for path in output.glob(f".{split}-*.json"))]:
        note.unlink()
    for left in [*output.glob(".packing-*"), *output.glob(".*.npy.tmp-*")]:  # of a killed process
        remove(left)
    counts = ", ".join(
        f"{split}: {of['images']:,} images in {len(of['shards'])} shards" for split, of in splits.items()
    )
    return f"{output}: {target.channels} x {target.height} x {target.width} {target.dtype}; {counts}"


def _plan(file: Path, split: str, key: str, images_per_shard: int) -> dict[str, Any]:
    """What an interrupted packing has noted about this split, or what there is to note of a new one.

    Raises:
        ValueError: that was another packing.
    """
    plan = {"key": key, "images_per_shard": images_per_shard}
    noted = _noted(file).get(split, plan)
    if any(noted.get(name) != value for name, value in plan.items()):
        raise ValueError(
            f"output is '{file.parent}', where another packing was interrupted, of other images or with other "
            "settings: delete it, or give another folder"
        )
    return noted


def _noted(file: Path) -> dict[str, Any]:
    try:
        noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {split: dict(plan) for split, plan in noted.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: delete the folder, and pack again") from error


def _remember(file: Path, split: str, plan: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(_noted(file) | {split: plan}), encoding="utf-8")


def _check_room(output: Path, split: str, count: int, target: Target) -> None:
    """Raise ValueError if there is no room for the shards of a split that are not written yet."""
    needed = count * target.channels * target.height * target.width * np.dtype(target.dtype).itemsize
    needed -= sum(path.stat().st_size for path in output.glob(f"{split}-*.npy"))
    if needed > (free := free_bytes(output)):
        raise ValueError(f"output is '{output}': its shards need {needed:,} bytes, {free:,} are free: make room")


def _target(records: Records, settings: DecodeSettings) -> Target:
    """What all images are decoded to: by the headers of all, as without shards.

    In this process: a header takes less time than to hand an image to another one.
    """
    headers = read_headers(records, settings.min_side, None)
    if headers.unreadable and settings.on_bad_image == "stop":
        _refuse(list(headers.unreadable.values()), records.count)
    if not headers.sizes:
        raise ValueError("no image can be read: " + some(list(headers.unreadable.values())))
    return choose_target(headers, settings)


def _check_alike(target: Target, first: Target, split: str) -> None:
    if (target.channels, target.dtype) != (first.channels, first.dtype):
        raise ValueError(
            f"split {split} has images with {target.channels} channels of {target.dtype}, split train with "
            f"{first.channels} of {first.dtype}: make them alike"
        )


def _refuse(unreadable: list[str], count: int) -> None:
    raise UnreadableImagesError(
        f'{len(unreadable)} of {count} images cannot be read (on_bad_image="skip" leaves them out):\n  '
        + some(unreadable, "\n  ")
    )


# ---- Shards ----------------------------------------------------------------------------------------------------------


def _pack_split(
    output: Path, split: str, records: Records, target: Target, config: PackConfig, names: list[str] | None
) -> tuple[dict[str, Any], list[str] | None]:
    """The entry of a split in the manifest, and the names of the classes so far.

    Images are mixed, because training shuffles within a few shards only, and data sets are often sorted by class.
    """
    number = -(-records.count // config.images_per_shard)
    order = rng.permutation(rng.key(0, rng.Stream.SHARD_ORDER), records.count).tolist()
    payloads = iter(records.payloads(order))
    found: list[dict[str, Any]] = []
    waiting: deque[Future[dict[str, Any]]] = deque()
    work = partial(write_shard, target=target, min_side=config.min_side)
    with (
        ProcessPoolExecutor(config.num_workers, initializer=_leave_signals) as pool,
        progress(desc=f"packing {split}", total=records.count, unit=" images") as bar,
    ):

        def collect(most: int) -> None:
            while len(waiting) > most:
                entry = waiting.popleft().result()
                found.append(entry)
                bar.update(entry["count"])

        try:
            for i in range(number):
                items = list(islice(payloads, config.images_per_shard))
                waiting.append(pool.submit(work, output / f"{split}-{i:05}.npy", items))
                collect(2 * config.num_workers)  # the encoded images of the others are in memory
            collect(0)
            unreadable = [line for entry in found for line in entry["unreadable"]]
            if unreadable and config.on_bad_image == "stop":
                _refuse(unreadable, records.count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for entry in found:
        if not entry["count"]:  # no image of it can be read
            (output / entry["name"]).unlink(missing_ok=True)
    shards = [{name: entry[name] for name in ("name", "count", "bytes", "sha256")} for entry in found if entry["count"]]
    if not shards:
        raise ValueError(f"split {split} has no image that can be read")
    labels_name = labels_sha256 = None
    if records.labels is not None:
        kept = [config.images_per_shard * i + row for i, entry in enumerate(found) for row in entry["rows"]]
        labels = [records.labels[order[i]] for i in kept]
        distinct = set(labels) - {None}
        own = [str(label) for label in in_order(distinct, records.class_names)]
        names = (names or []) + [name for name in own if name not in (names or [])]
        numbers = {name: i for i, name in enumerate(names)}
        labels_name = f"{split}-labels.npy"
        values = [-1 if label is None else numbers[str(label)] for label in labels]
        with replacing(output / labels_name) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array(values, np.int32))
        labels_sha256 = sha256_of(output / labels_name)
    skipped = [line for entry in found for line in entry["unreadable"]]
    images = sum(entry["count"] for entry in shards)
    entry = {"images": images, "shards": shards, "labels": labels_name, "labels_sha256": labels_sha256}
    return entry | {"skipped": skipped}, names


def _leave_signals() -> None:
    """Ctrl-C reaches all processes of a terminal: the main one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_shard(path: Path, items: list[tuple[str, Payload]], *, target: Target, min_side: int) -> dict[str, Any]:
    """Decode images into one shard, unless it is there and complete.

    Returns:
        Its `name`, `count`, `bytes` and `sha256`, the `rows` of items that are in it, and "name: reason" of those that
        cannot be read, `unreadable`.
    """
    noted = path.with_name(f".{path.stem}.json")  # written after the shard
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(noted.read_text(encoding="utf-8"))
        if path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
            return dict(entry)
    images, kept, unreadable = [], [], []
    for row, (name, payload) in enumerate(items):
        image, reason = attempt(partial(decode_checked, target=target, min_side=min_side), payload)
        if image is None:
            unreadable.append(f"{name}: {reason}")
        else:
            images.append(image)
            kept.append(row)
    shape = (len(images), target.channels, target.height, target.width)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(images, target.dtype).reshape(shape))
    entry = {"name": path.name, "count": len(images), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    entry |= {"rows": kept, "unreadable": unreadable}
    with replacing(noted) as temporary:
        temporary.write_text(json.dumps(entry), encoding="utf-8")
    return entry


if __name__ == "__main__":
    raise SystemExit(main())
