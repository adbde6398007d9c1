"""METADATA: the labels that metadata.csv and metadata.jsonl in a folder give its images, as `datasets` has them.

A file has a row for each image, with the column file_name, a path from the folder of the file. It is for the images at
any depth below; of two such files the deeper one counts.
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.sources import json_label
from training.messages import some

NAMES = ("metadata.csv", "metadata.jsonl")
FILE_NAME, LABEL = "file_name", "label"  # columns


@dataclass(frozen=True)
class Metadata:
    """Labels by the path of the image in the folder, for all images or some, None without a file that has labels; and
    what to say about them."""

    labels: dict[str, Any] | None
    notes: tuple[str, ...]


def read_metadata(root: Path, names: Sequence[str], label_column: str | None = None) -> Metadata:
    """The labels of images in a folder.

    Args:
        names: paths of all images in the folder.
        label_column: the column of the labels; None: "label", and files without it are not used.
    Raises:
        ValueError: a damaged file, two files in one folder, an image with two labels, or no such column.
    """
    folders = {folder for name in names for folder in _parents(name)}
    files = [file for folder in sorted(folders) if (file := _file_in(root, folder)) is not None]
    images, labels = set(names), dict[str, Any]()
    used, unknown, notes = list[str](), list[str](), list[str]()
    for file in files:
        rows, column = _rows(root, file), label_column or LABEL
        columns = {name: None for _, row in rows for name in row if name is not None}  # None: of more values than names
        if FILE_NAME not in columns or column not in columns:
            if label_column is not None:
                raise ValueError(
                    f"label_column is {label_column!r}: {file} needs it and the column {FILE_NAME}, but has "
                    f"{some(list(columns))}"
                )
            notes.append(
                f"{file} is not used: it needs the columns {FILE_NAME} and {LABEL} (--label_column), and has "
                f"{some(list(columns)) or 'no row'}"
            )
            continue
        own: dict[str, Any] = {}
        for line, row in rows:
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file), str(row.get(FILE_NAME))))
            label = json_label(row.get(column))
            if own.setdefault(name, label) != label:
                raise ValueError(f"{root / file}, line {line}: {name} is {own[name]!r} before and {label!r} here")
            if name not in images:
                unknown.append(name)
        labels |= {name: label for name, label in own.items() if name in images}
        used.append(f"{column} of {file}")
    if not used:
        if label_column is not None:
            raise ValueError(
                f"label_column is {label_column!r}: there is no {' or '.join(NAMES)} with the images: add one, or "
                "leave label_column out to have folders as labels"
            )
        return Metadata(None, tuple(notes))
    notes.append(f"labels: {some(used)}")
    if unknown:
        notes.append(f"{len(unknown)} rows there name no image: {some(unknown)}")
    return Metadata(_numbers(labels), tuple(notes))


def _parents(name: str) -> Iterator[str]:
    while name:
        name = posixpath.dirname(name)
        yield name


def _file_in(root: Path, folder: str) -> str | None:
    found = [name for name in NAMES if (root / folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{root / folder} has {' and '.join(found)}: keep one of them")
    return posixpath.join(folder, found[0]) if found else None


def _rows(root: Path, file: str) -> list[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row."""
    path = root / file
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            if file.endswith(".csv"):
                reader = csv.DictReader(lines, strict=True)
                return [(reader.line_num, row) for row in reader]
            rows = [(i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if wrong := [i for i, row in rows if not isinstance(row, dict)]:
        raise ValueError(f'{path}, line {wrong[0]}: give an object, such as {{"file_name": "a.png", "label": "cat"}}')
    return rows


def _numbers(labels: dict[str, Any]) -> dict[str, Any]:
    """Integers where every label is the text of one, as in a CSV file, so that 9 comes before 10."""
    texts = [label for label in labels.values() if label is not None]
    if not all(
        isinstance(text, str) and text.removeprefix("-").isdecimal() and str(int(text)) == text for text in texts
    ):
        return labels
    return {name: None if label is None else int(label) for name, label in labels.items()}
