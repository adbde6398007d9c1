"""FOLDER: which files of a folder are its images, and which of its folders are splits, masks or thumbnails."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.data.content import Stat, hash_content, stat_of
from training.data.sources import Records, Source
from training.messages import some

SUFFIXES: tuple[str, ...] = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
)
SUFFIXES += (".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".npy")

# Names of folders, in lower case.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "valid", "validation": "validation"}
SPLITS |= {"test": "test", "testing": "test"}
THUMBNAILS = {"@eadir", "__macosx", "thumbnails", "thumbs", "_thumbs", "#recycle", "$recycle.bin", "lost+found"}
MASKS = {"mask", "masks", "ground_truth", "groundtruth", "gt", "annotation", "annotations", "segmentation"}
MASKS |= {"segmentations", "label", "labels"}
IMAGES = {"image", "images", "img", "imgs"}
# What a run, a model, an evaluation and a cache of this project hold: folders of images that no one took.
OUTPUTS: tuple[set[str], ...] = (
    {"config.yaml", "metrics.jsonl"},
    {"training.json"},
    {"model_index.json"},
    {"report.json", "report.md"},
)
OUTPUTS += ({"images.npy", "names.txt", "meta.json"},)


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
) -> Source:
    """All image files of one split of a folder, at any depth, in the order of their paths.

    Raises:
        ValueError: no such folder or split, no image in it, or symbolic links that lead out of it.
    """
    where = f"train_data_dir is {str(root)!r}"
    if not root.is_dir():
        raise ValueError(f"{where}: there is no such folder")
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    listing = list_images(root, cache_dir, wanted, follow_links, split_folders)
    listed = listing.files
    if not listed:
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
    if len(files) < len(listed):
        notes.append(f"{len(listed) - len(files)} left out by include and exclude")

    splits = _splits(files) if split_folders else {}
    all_splits = tuple(name for name in splits if name)
    if split not in (all_splits or ("train",)):
        allowed = " or ".join(all_splits or ["train"])
        hint = "" if splits else ", a folder without folders such as train and test has no other split"
        if split == "train":
            hint = ", or split_folders=false to train on all"
        raise ValueError(f"split is {split!r}: give {allowed}{hint}")
    labels = None
    if not splits and split_folders:
        notes += [f"the folder {top} is taken for a class, not a split" for top in _taken_for_a_class(files)]
    if splits:
        counts = {name: len(chosen) for name, chosen in splits.items()}
        files = splits[split]
        others = [f"{name} ({count})" for name, count in counts.items() if name not in (split, "")]
        if others:
            notes.insert(0, f"other splits, not in this one: {some(others)} (--split_folders false: they are classes)")
        if counts.get(""):
            notes.insert(0, f"{counts['']} images beside the folder {split} left out")
        labels = [_label(name) for name, _ in files]
    names = [name for name, _ in files]
    description = f"folder {root.resolve().name}" + (f", split {split}" if splits else "")
    description += f" ({listing.ignored} other files ignored)" if listing.ignored else ""
    return Source(
        ["folder", root.resolve().name, split, all_splits, hash_content(root, files, cache_dir / ".index")],
        description,
        lambda scratch: Records(len(names), lambda: ((name, root / name) for name in names), labels, all_splits),
        tuple(notes),
    )


def _patterns(name: str, value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    patterns = value.split(",") if isinstance(value, str) else list(value)
    if not all(isinstance(pattern, str) and pattern.strip() for pattern in patterns):
        raise ValueError(f"{name} is {value!r}: give patterns such as cats/* or *_photo.png, separated by commas")
    return [pattern.strip().removeprefix("./").rstrip("/").lower() for pattern in patterns]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path, a folder that it is in, or, if the pattern has no slash, one part of it."""
    parts = name.lower().split("/")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        any(
            fnmatch.fnmatchcase(text, pattern)
            for text in ([paths[-1], *paths] if "/" in pattern else [*parts, paths[-1]])
        )
        for pattern in patterns
    )


def _splits(files: Sequence[tuple[str, Stat]]) -> dict[str, list[tuple[str, Stat]]]:
    """The images of each split, {} if there are none. "" are those beside a folder train."""
    tops = {name.partition("/")[0] for name, _ in files if "/" in name}
    found = {SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    classes = [top for top in tops if top.lower() not in SPLITS]
    if not found or (found == {"train"} and len(classes) > 1):  # buses, cars and trains
        return {}
    if found != {"train"} and len(tops) == 1 and all("/" in name for name, _ in files):  # nothing else to train on
        return {}
    splits: dict[str, list[tuple[str, Stat]]] = {}
    for file in files:
        top, slash, _ = file[0].partition("/")
        beside = "" if "train" in found else "train"  # without a folder train, what is beside the others is it
        splits.setdefault(SPLITS.get(top.lower(), beside) if slash else beside, []).append(file)
    return dict(sorted(splits.items(), key=lambda item: list(SPLITS.values()).index(item[0]) if item[0] else -1))


def _taken_for_a_class(files: Sequence[tuple[str, Stat]]) -> list[str]:
    return sorted(
        {top for top in (name.partition("/")[0] for name, _ in files if "/" in name) if top.lower() in SPLITS}
    )


def _label(name: str) -> str:
    """The outermost folder that an image is in, within its split."""
    folders = name.split("/")[:-1]
    if folders and folders[0].lower() in SPLITS:
        folders = folders[1:]
    return folders[0] if folders else ""


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
    visited = {real_root}  # followed links may form a cycle
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as scan:
            entries = list(scan)
        if prefix and any(output <= {entry.name for entry in entries} for output in OUTPUTS):
            listing.left_out.setdefault("written by a run and left out", []).append(prefix)
            continue
        is_folder = {entry.name: entry.is_dir() for entry in entries}
        beside = {name.lower() for name, folder in is_folder.items() if folder}
        has_masks = split_folders and bool(beside & (IMAGES | SPLITS.keys()))
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            lower = entry.name.lower()
            folder = is_folder[entry.name]
            if entry.name.startswith(".") or not (folder or lower.endswith(SUFFIXES)):
                listing.ignored += 1
                continue
            if folder and lower not in named and (lower in THUMBNAILS or (has_masks and lower in MASKS)):
                reason = "thumbnails left out" if lower in THUMBNAILS else "masks left out"
                listing.left_out.setdefault(reason, []).append(name)
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not _is_inside(target, real_root):
                    if not follow_links and (folder or not _is_in_own_repository(entry.path, target)):
                        outside.append(name)
                        continue
                elif folder:  # its images are listed where they are
                    listing.ignored += 1
                    continue
            if not folder:
                listing.files.append((name, _stat(entry)))
                continue
            real = os.path.realpath(entry.path)
            if real != real_cache and real not in visited:  # whose .npy files are not images of the data set
                visited.add(real)
                folders.append(name)
    if outside:
        raise ValueError(
            f"train_data_dir is {str(root)!r}: symbolic links lead out of it: {some(sorted(outside))}: replace "
            "them, or give --follow_links"
        )
    listing.files.sort()
    for paths in listing.left_out.values():
        paths.sort()
    return listing


def _stat(entry: os.DirEntry[str]) -> Stat:
    try:
        return stat_of(entry.stat())
    except OSError:  # a broken link, which is reported as unreadable when it is opened
        return -1, 0, 0, 0, 0


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_in_own_repository(link: str, target: str) -> bool:
    """Whether a link in REPOSITORY/snapshots/COMMIT/ leads to REPOSITORY/blobs/, as in the cache of the Hub."""
    parents = Path(os.path.realpath(os.path.dirname(link))).parents
    place = Path(os.path.realpath(os.path.dirname(link)))
    repositories = [folder.parent for folder in [place, *parents] if folder.name == "snapshots"]
    return any(_is_inside(target, str(repository / "blobs")) for repository in repositories)
