"""TARS: samples of a tar file in the format of WebDataset: the files of one have the same name up to the first dot."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_pipeline.decode import Payload
from training.data.folder import SUFFIXES
from training.data.sources import json_label

DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)

IMAGES = tuple(suffix for suffix in SUFFIXES if suffix != ".npy")  # what an array is, its path says
Members = dict[str, tarfile.TarInfo]


class Header(tarfile.TarInfo):
    """A header of a tar file. The one of zeros at its end is noted: where the file is cut off, there is none."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed does not have it
            archive.has_end = True
            raise


def open_tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, tarinfo=Header)


def samples(archive: tarfile.TarFile) -> Iterator[Members]:
    """The samples of a tar file: their members, by what follows the name that they share.

    Members that follow each other belong together if their names are equal up to the first dot after the last slash.
    """
    name, members = "", Members()
    try:
        for member in archive:
            is_file = member.isfile() or member.islnk() or member.issym()
            if not is_file or member.name.rpartition("/")[2].startswith("."):
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if (key := folder + slash + stem) != name:
                if members:
                    yield members
                name, members = key, {}
            while (ending := ending.lower()) in members:  # the first one counts
                ending = f"again.{ending}"
            members[ending] = member
        _check_end(archive)
    except DAMAGED:
        if members:
            yield members
        raise
    if members:
        yield members


def images_of(members: Members) -> list[str]:
    """The endings of a sample's images, in order."""
    return [ending for ending in members if f".{ending}".endswith(IMAGES)]


def image_of(members: Members, column: str | None) -> str | None:
    """The ending of the image of a sample that is used: `column`, by default the first; None if it has none."""
    images = images_of(members)
    return next((ending for ending in images if column is None or ending == column.lower()), None)


def _check_end(archive: Any) -> None:
    """Raises ReadError unless zeros follow the last member, to the end: tarfile takes every cut in a header for it."""
    if not getattr(archive, "has_end", False):
        raise tarfile.ReadError("unexpected end of data")
    archive.fileobj.seek(archive.offset + tarfile.BLOCKSIZE)
    while block := archive.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("there is more after its end")


def is_whole_tar(path: Path) -> bool:
    """Whether a tar file has its end, and nothing after it."""
    try:
        with open_tar(path) as archive:
            archive.getmembers()
            _check_end(archive)
    except DAMAGED:
        return False
    return True


def label_of(archive: tarfile.TarFile, members: Members, column: str | None) -> Any:
    """That in this column of NAME.json or, without a column, that of NAME.cls or "label" of NAME.json; None: none."""
    try:
        if "cls" in members and column is None:
            text = _content(archive, members["cls"]).decode(errors="backslashreplace").strip()
            return json_label(int(text) if re.fullmatch(r"-?\d+", text) else text)
        if "json" in members:
            return json_label(dict(json.loads(_content(archive, members["json"]))).get(column or "label"))
    except (*DAMAGED, ValueError, TypeError):
        pass
    return None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError):
        file = None
    if file is None:
        raise tarfile.ReadError(f"it is a link to {member.linkname}, which is no file of this archive")
    return file.read()


def tar_rows(path: Path, column: str | None) -> Iterator[tuple[str, Payload | Exception]]:
    with open_tar(path) as archive:
        for members in samples(archive):
            if (ending := image_of(members, column)) is None:
                continue
            image = members[ending]
            name = image.name.encode(errors="backslashreplace").decode()  # it may not be in UTF-8
            try:
                yield name, _content(archive, image)
            except DAMAGED as error:
                yield name, error
