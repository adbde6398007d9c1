"""FOLDER: which files of a folder are its images, and which of its folders are splits, masks or thumbnails."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from training.data.content import Stat, hash_content, stat_of
from training.data.metadata import read_metadata
from training.data.sources import Records, Source
from training.messages import some

SUFFIXES: tuple[str, ...] = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp")
SUFFIXES += (".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".npy")

# Names of folders, in lower case.
SPLIT = re.compile(
    r"(train|val|valid|validation|test|dev|eval)(ing)?([-_ ]?(set|data|images|imgs))?([-_ ]?\d+)?"
)  # val2017, too
SPLITS = ("train", "val", "valid", "validation", "test")
THUMBNAILS = {"@eadir", "__macosx", "thumbnail", "thumbnails", "thumb", "thumbs", "_thumbs"}
THUMBNAILS |= {"#recycle", "$recycle.bin", "lost+found"}
MASKS = {"mask", "masks", "ground_truth", "groundtruth", "gt", "annotation", "annotations", "segmentation"}
MASKS |= {"segmentations", "label", "labels", "segmentationclass", "segmentationobject"}
IMAGES = {"image", "images", "img", "imgs", "jpegimages"}
MASK_FILE = re.compile(r"(.+)[-_. ](masks?|gt|ground_?truth|segmentation|seg|label)([-_ ]?\d+)?")  # (1): its image
# What a run, a model, an evaluation and a cache of this project hold: folders of images that no one took.
OUTPUTS: tuple[set[str], ...] = (
    {"config.yaml", "metrics.jsonl"},
    {"training.json"},
    {"model_index.json"},
    {"report.json", "report.md"},
)
OUTPUTS += ({"images.npy", "names.txt", "meta.json"},)

# Why files and folders are left out.
BY_RUN, THUMBNAILS_OUT = "written by a run and left out", "thumbnails left out"
MASKS_OUT = "masks left out (--split_folders false keeps them)"


@dataclass
class Listing:
    """What is in a folder."""

    files: list[tuple[str, Stat]] = field(default_factory=list)  # the images by path in the folder
    ignored: int = 0  # number of other files
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason: folders


def image_folder(
    root: Path,
    cache_dir: Path,
    split: str = "train",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    follow_links: bool = False,
    split_folders: bool = True,
    label_column: str | None = None,
) -> Source:
    """All image files of one split of a folder, at any depth, in the order of their paths.

    Their labels are those of metadata.csv or metadata.jsonl, see metadata.py, or, without one, folders: the outermost
    that is not a split and that not all images are in.

    Raises:
        ValueError: no such folder or split, no image in it, symbolic links that lead out of it, or wrong metadata.
    """
    where = f"train_data_dir is {str(root)!r}"
    if not root.is_dir():
        raise ValueError(f"{where}: there is no such folder")
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    listing = list_images(root, cache_dir, wanted, follow_links, split_folders)
    listed = listing.files
    if not listed:
        if next(root.rglob("*.parquet"), None):
            raise ValueError(f"{where}: this folder has parquet files: give it as dataset_name")
        left_out = "".join(f"; {reason}: {some(folders)}" for reason, folders in listing.left_out.items())
        raise ValueError(
            f"{where}: give a folder with images; their names end in {' '.join(sorted(SUFFIXES))}{left_out}"
        )
    files = listed
    if wanted or unwanted:
        files = [file for file in listed if _matches(file[0], wanted or ["*"]) and not _matches(file[0], unwanted)]
    if not files:
        raise ValueError(
            f"include is {include!r} and exclude is {exclude!r}: this leaves none of the {len(listed)} images, such as "
            f"{listed[0][0]}: give patterns such as cats/* or *_photo.png"
        )
    notes = [f"{reason}: {some(folders)}" for reason, folders in listing.left_out.items()]
    if patterns := wanted + unwanted:
        everything = [*(name for name, _ in listed), *(name for names in listing.left_out.values() for name in names)]
        unused = [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in everything)]
        if unused:
            notes.append(f"no image matches the pattern {some(unused)}")
    if len(files) < len(listed):
        notes.append(f"{len(listed) - len(files)} left out by include and exclude")

    splits, labels_of = _splits(files) if split_folders else ({}, [])
    all_splits = tuple(name for name in splits if name)
    if split not in (all_splits or ("train",)):
        allowed = " or ".join(all_splits or ["train"])
        hint = "" if splits else ", a folder without folders such as train and test has no other split"
        if split == "train":
            hint = ", or split_folders=false to train on all"
        raise ValueError(f"split is {split!r}: give {allowed}{hint}")
    labels = _class_folders(files)
    if splits:
        others = [f"{name} ({len(chosen)})" for name, chosen in splits.items() if name not in (split, "")]
        if others:
            notes.insert(0, f"other splits, not in this one: {some(others)} (--split_folders false: they are classes)")
        if "" in splits:
            notes.insert(0, f"{len(splits[''])} images beside the folder {split} left out")
        labels = [labels_of[i] for i in splits[split]]
        files = [files[i] for i in splits[split]]
    elif split_folders and (classes := _taken_for_a_class(files)):
        notes.append(f"taken for a class, not a split: {some(classes)} (--exclude leaves it out)")
    names = [name for name, _ in files]
    identity = ["folder", root.resolve().name, split, all_splits, hash_content(root, files, cache_dir / ".index")]
    metadata = read_metadata(root, [name for name, _ in listed], label_column)
    notes += metadata.notes
    if metadata.labels is not None:
        labels = [metadata.labels.get(name) for name in names]
        identity.append(hashlib.sha256(json.dumps(labels).encode()).hexdigest())
        if unlabelled := [name for name, label in zip(names, labels) if label is None]:
            notes.append(f"{len(unlabelled)} images without a label: {some(unlabelled)}")
    description = f"folder {root.resolve().name}" + (f", split {split}" if splits else "")
    description += f" ({listing.ignored} other files ignored)" if listing.ignored else ""
    return Source(
        identity,
        description,
        lambda scratch: Records(
            len(names), lambda numbers: ((names[i], root / names[i]) for i in numbers), labels, splits=all_splits
        ),
        tuple(notes),
    )


def _patterns(name: str, value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    patterns = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not all(isinstance(pattern, str) and pattern.strip() for pattern in patterns):
        raise ValueError(f"{name} is {value!r}: give patterns such as cats/* or *_photo.png, separated by commas")
    return [pattern.strip().removeprefix("./").rstrip("/").lower() for pattern in patterns]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path, a folder that it is in, or, if the pattern has no slash, one part of it."""
    parts = name.lower().split("/")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(text, pattern)
        for pattern in patterns
        for text in (paths if "/" in pattern else [*parts, paths[-1]])
    )


def _class_folders(files: Sequence[tuple[str, Stat]]) -> list[str | None]:
    """The label of each image in a folder without splits: the outermost folder that not all images are in."""
    folders = [name.split("/")[:-1] for name, _ in files]
    pairs = zip(min(folders), max(folders))
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # of the folders that all images are in
    return [parts[depth] if len(parts) > depth else None for parts in folders]


def _splits(files: Sequence[tuple[str, Stat]]) -> tuple[dict[str, list[int]], list[str | None]]:
    """The indices of the images of each split, {} if there are none, and the label of each image.

    "" are the images beside a folder train. The folders of the splits may be below one that holds everything, as in
    data/train, or below each class, as in bottle/train and cable/train. The label is the outermost other folder.
    """
    folders = [name.split("/")[:-1] for name, _ in files]
    depth = 0  # of the first folder that is a split, or that not all images are in
    for first, last in zip(min(folders), max(folders)):
        if first != last or split_name(first):
            break
        depth += 1
    found, others = _splits_at(folders, depth)
    if not found and others:  # below each class?
        found, others = _splits_at(folders, depth + 1)
        if others or not {"train"} < found:
            return {}, []
        return _by_split(folders, depth + 1, found), [*(parts[depth] for parts in folders)]
    if not found or (found == {"train"} and len(others - {""}) > 1):  # buses, cars and trains
        return {}, []
    if "train" not in found and not others and len(found) == 1:  # nothing else to train on
        return {}, []
    below = [parts[depth + (len(parts) > depth and split_name(parts[depth]) != "") :] for parts in folders]
    return _by_split(folders, depth, found), [parts[0] if parts else None for parts in below]


def _splits_at(folders: Sequence[Sequence[str]], depth: int) -> tuple[set[str], set[str]]:
    """The splits among the folders at this depth, and the other folders, "" if there are images beside them."""
    names = {parts[depth] if len(parts) > depth else "" for parts in folders}
    return {split for name in names if (split := split_name(name))}, {name for name in names if not split_name(name)}


def _by_split(folders: Sequence[Sequence[str]], depth: int, found: set[str]) -> dict[str, list[int]]:
    beside = "" if "train" in found else "train"  # without a folder train, what is beside the others is it
    names = {name: split_name(name) or beside for parts in folders for name in parts[depth : depth + 1]}
    splits: dict[str, list[int]] = {name: [] for name in ("", *SPLITS)}
    for i, parts in enumerate(folders):
        splits[names[parts[depth]] if len(parts) > depth else beside].append(i)
    return {name: indices for name, indices in splits.items() if indices}


def split_name(folder: str) -> str:
    """The split that a folder of this name holds; "" if it is none."""
    found = SPLIT.fullmatch(folder.lower())
    return {"dev": "validation", "eval": "validation"}.get(found[1], found[1]) if found else ""


def _taken_for_a_class(files: Sequence[tuple[str, Stat]]) -> list[str]:
    folders = {name.rpartition("/")[0] for name, _ in files}
    parts = [folder.split("/") for folder in folders]
    return sorted({"/".join(p[: i + 1]) for p in parts for i, name in enumerate(p) if split_name(name)})


# ---- Listing ---------------------------------------------------------------------------------------------------------


def list_images(
    root: Path, cache_dir: Path, include: Sequence[str], follow_links: bool, split_folders: bool
) -> Listing:
    """All images in a folder. Left out are hidden files, thumbnails, masks, and what this project wrote.

    Raises:
        ValueError: symbolic links that lead out of the folder.
    """
    listing, outside = Listing(), list[str]()
    real_root, real_cache = os.path.realpath(root), os.path.realpath(cache_dir)
    named = {part for pattern in include for part in pattern.split("/")}  # an include pattern that names it keeps it
    visited = {real_root, real_cache}  # followed links may form a cycle; .npy files of the cache are not images
    folders, links_inside = [""], list[str]()
    while folders or links_inside:
        if folders:
            prefix = folders.pop()
        else:  # links to folders inside the root, whose images are listed where they are, unless they are hidden there
            prefix = links_inside.pop()
            if (real := os.path.realpath(root / prefix)) in visited:
                listing.ignored += 1
                continue
            visited.add(real)
        with os.scandir(root / prefix) as scan:
            entries = {entry.name: entry for entry in scan}
        if prefix and any(output <= entries.keys() for output in OUTPUTS):
            listing.left_out.setdefault(BY_RUN, []).append(prefix)
            continue
        is_folder = {name: entry.is_dir() for name, entry in entries.items()}
        beside = _Beside.find(is_folder) if split_folders else _Beside()
        for base, entry in entries.items():
            name = f"{prefix}/{base}" if prefix else base
            folder = is_folder[base]
            if base.startswith(".") or not (folder or base.lower().endswith(SUFFIXES)):
                listing.ignored += 1
                continue
            reason = beside.reason(base.lower(), folder, named)
            if folder and not prefix and base == "samples" and OUTPUTS[0] <= entries.keys():  # the run is in the root
                reason = BY_RUN
            if reason:
                listing.left_out.setdefault(reason, []).append(name)
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not _is_inside(target, real_root):
                    if not follow_links and (folder or not _is_in_own_repository(entry.path, target)):
                        outside.append(name)
                        continue
                elif folder:
                    links_inside.append(name)
                    continue
            if folder:
                real = os.path.realpath(entry.path)
                if real not in visited:
                    visited.add(real)
                    folders.append(name)
            elif (found := _stat(entry)) is not None:
                listing.files.append((name, found))
            else:
                listing.ignored += 1
    if outside:
        raise ValueError(
            f"train_data_dir is {str(root)!r}: symbolic links lead out of it: {some(sorted(outside))}: replace "
            "them, or give --follow_links"
        )
    listing.files.sort()
    for paths in listing.left_out.values():
        paths.sort()
    return listing


@dataclass
class _Beside:
    """What is in the same folder, by which masks are known."""

    stems: set[str] = field(default_factory=set)  # of image files, in lower case
    has_masks: bool = False  # whether a folder with the name of masks has them

    @classmethod
    def find(cls, is_folder: dict[str, bool]) -> _Beside:
        files = [name.lower() for name, folder in is_folder.items() if not folder]
        stems = {name.rpartition(".")[0] for name in files if name.endswith(SUFFIXES) and not name.startswith(".")}
        folders = [name.lower() for name, folder in is_folder.items() if folder]
        return cls(stems, bool(stems) or any(name in IMAGES or split_name(name) for name in folders))

    def reason(self, name: str, folder: bool, named: set[str]) -> str:
        """Why a file or folder is left out; "" if it is not."""
        if folder:
            if name in named:
                return ""
            return THUMBNAILS_OUT if name in THUMBNAILS else MASKS_OUT if self.has_masks and name in MASKS else ""
        mask = MASK_FILE.fullmatch(name.rpartition(".")[0]) if self.stems else None
        return MASKS_OUT if mask and mask[1] in self.stems and not any(mask[2] in part for part in named) else ""


def _stat(entry: os.DirEntry[str]) -> Stat | None:
    """None for what is no file, such as a pipe, which would never end."""
    try:
        found = entry.stat()
    except OSError:  # a broken link, which is reported as unreadable when it is opened
        return -1, 0, 0, 0, 0
    return stat_of(found) if stat.S_ISREG(found.st_mode) else None


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_in_own_repository(link: str, target: str) -> bool:
    """Whether a link in REPOSITORY/snapshots/COMMIT/ leads to REPOSITORY/blobs/, as in the cache of the Hub."""
    place = Path(os.path.realpath(os.path.dirname(link)))
    repositories = [folder.parent for folder in (place, *place.parents) if folder.name == "snapshots"]
    return any(_is_inside(target, str(repository / "blobs")) for repository in repositories)
