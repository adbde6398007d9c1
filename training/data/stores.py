"""STORES: files on this machine or behind a URL: which there are, parts of them, copies of them, with patience.

http(s) is read with the standard library, everything else (hf://, s3://, gs://, ...) by fsspec. A request that fails is
made again, at longer and longer intervals, until PATIENCE is over, and a warning says so. A file that does not exist is
not waited for.
"""

from __future__ import annotations

import base64
import http.client
import io
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.data.disk import FULL

T = TypeVar("T")

TARS = (".tar", ".tar.gz", ".tgz")
SHARDS = (".parquet", *TARS)
PATIENCE = 300.0  # seconds from the first failure of a request until the last attempt
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
TIMEOUT = 30.0  # seconds without a byte after which a request has failed
QUIET = 60.0  # seconds between two warnings
BLOCK = 2**20  # bytes read at a time
NOT_FOUND = (404, 410)  # codes of HTTP
LATER = (408, 425, 429)  # codes of HTTP below 500 that ask to come back
REFUSED = (401, 403)  # codes of HTTP that stores have for files that do not exist
NO_HEAD = (401, 403, 405, 501)  # codes of HTTP: GET may be allowed all the same, a signed URL is for one of them
USER = re.compile(r"^(\w+://)([^/@]*)@")  # in a URL, with the password
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardError(ValueError):
    """A shard, or the list of them, cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class StoredFile:
    """A file and what tells it from another one of the same name.

    Args:
        url: where it is: a path on this machine or a URL.
        name: its path below the place that was searched, with slashes.
        size: bytes.
        version: changes with the content: an etag, a hash or a time, as the store has it; may be empty.
    """

    url: str
    name: str
    size: int
    version: str = ""


def is_remote(place: str) -> bool:
    return "://" in place


def is_pattern(place: str) -> bool:
    """Whether it names many files, as shard-{000..999}.tar. A folder on this machine may have any name."""
    return RANGE.search(path_of(place)) is not None and (is_remote(place) or not os.path.exists(place))


def is_http(place: str) -> bool:
    return place.lower().startswith(("http://", "https://"))


def path_of(place: str) -> str:
    """A place without what is not for others: the password in a URL, and what follows a web address, as a signature."""
    place = USER.sub(r"\1", place)
    return place.partition("?")[0] if is_http(place) else place


def join(place: str, name: str) -> str:
    """The place of a file in a folder; a signature that follows a web address, as ?sig=..., is for all in it."""
    folder, mark, signature = place.partition("?") if is_http(place) and "?" not in name else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{signature}"


def beside(folder: str, name: str) -> str:
    """The place of a file that an index in this folder names, by a name or an address of its own."""
    if is_remote(name):
        return name
    if not is_http(folder):
        return join(folder, name)
    folder, mark, signature = folder.partition("?")
    return urllib.parse.urljoin(join(folder, ""), name) + ("" if "?" in name else mark + signature)


def name_of(place: str) -> str:
    """What a file is called, with its folders, where a web address has a%20b for a space."""
    return urllib.parse.unquote(path_of(place)) if is_http(place) else place


def identity(file: StoredFile) -> list[Any]:
    """What tells a file from all others, wherever they are. A signature does not, if the server has a tag for files."""
    url = file.url if is_remote(file.url) else os.path.abspath(file.url)
    return [path_of(url) if file.version.startswith(('"', 'W/"')) else url, file.size, file.version]


def check_address(place: str) -> None:
    """Raises ValueError if a web address has no host or no valid port, which is not noticed by asking for it."""
    try:
        address = urllib.parse.urlsplit(place)
        is_valid = not is_http(place) or (address.hostname and address.port != 0)
        (address.hostname or "").encode("idna")
    except ValueError:  # of a port above 65535, of brackets, of labels that are empty or too long
        is_valid = False
    if not is_valid:
        raise ValueError(f"{path_of(place)} is no web address: give https://host/path, or https://host:port/path")


def user_of(place: str) -> str:
    """The user and the password in a URL; "" if there are none."""
    match = USER.match(place)
    return match[2] if match else ""


def patiently(name: str, work: Callable[[], T], stopped: threading.Event | None = None) -> T:
    """The result of `work`, which is tried again while the store does not answer.

    Args:
        name: of the file, for messages.
        stopped: once it is set, there is no further attempt. Waiting in the main thread ends with a signal, too.
    Raises:
        ShardError: the file does not exist, or PATIENCE is over.
        OSError: this machine's disk is full.
    """
    started, pause = None, FIRST_PAUSE
    stopped = stopped or threading.Event()
    while True:
        try:
            return work()
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in FULL:  # of the disk that a copy is written to
                raise
            now = time.monotonic()
            started = now if started is None else started
            if _is_final(error):
                raise ShardError(f"{name} cannot be read: {_reason(error)}") from error
            if now + pause - started > PATIENCE or stopped.is_set():
                raise ShardError(
                    f"{name} cannot be read, tried for {now - started:.0f} seconds, last: {_reason(error)}"
                ) from error
            _warn(f"{name} cannot be read: {_reason(error)}; it is tried again for {PATIENCE:.0f} seconds")
        stopped.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


_warned_at = -math.inf


def _warn(message: str) -> None:
    """At once, then once a minute: a thousand shards of a server fail together."""
    global _warned_at
    if time.monotonic() - _warned_at > QUIET:
        _warned_at = time.monotonic()
        print(f"WARNING: {message}", file=sys.stderr, flush=True)


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in LATER
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, socket.gaierror):
        return error.reason.errno == socket.EAI_NONAME  # another number if the name servers do not answer
    if isinstance(error, http.client.InvalidURL):
        return True
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason if isinstance(error.reason, Exception) else error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- Which files there are -------------------------------------------------------------------------------------------


def list_files(place: str) -> list[StoredFile]:
    """All files below a folder, or those that a pattern such as `shard-{000..999}.tar` names, by name.

    Raises:
        ValueError: nothing can be listed there.
        ShardError: the store does not answer, or a file of the pattern does not exist.
    """
    if is_pattern(place):
        before = path_of(place).partition("{")[0]
        start = len(name_of(before[: before.rfind("/") + 1]))  # of what differs
        return stat_all([(url, name_of(url)[start:]) for url in expand(place)])
    if not is_remote(place):
        root = Path(place)
        paths = _files_below(root, root) if root.is_dir() else [root]
        names = {path.relative_to(root).as_posix() if path != root else path.name: path for path in paths}
        return [stat(str(names[name]), name) for name in sorted(names)]
    if is_http(place):
        if path_of(place).lower().endswith(SHARDS):
            return stat_all([(place, name_of(place).rpartition("/")[2])])
        raise ValueError(
            f"{path_of(place)} cannot be listed: give the address of a packed folder, of an index.json, of a shard, or "
            "of all shards as in https://host/shard-{000..999}.tar"
        )

    def find() -> Any:
        filesystem, path = _filesystem(place)  # some connect here
        filesystem.invalidate_cache()
        return filesystem, path, filesystem.find(path, detail=True)

    filesystem, path, found = patiently(path_of(place), find)
    files = []
    for full, info in sorted(found.items()):
        name = full.removeprefix(path.rstrip("/") + "/") if full != path else full.rpartition("/")[2]
        if not _is_hidden(name):
            files.append(StoredFile(filesystem.unstrip_protocol(full), name, int(info["size"]), _version(info)))
    return files


def _files_below(folder: Path, root: Path) -> Iterator[Path]:
    """All files, also in folders that are links.

    Raises:
        ValueError: a link leads nowhere, or to a folder that it is in.
    """
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir():
            if path.is_symlink() and path.resolve() in (root.resolve(), *folder.resolve().parents, folder.resolve()):
                raise ValueError(f"{path} is a link to a folder that it is in: remove it")
            yield from _files_below(path, root)
        elif path.is_symlink():
            raise ValueError(f"{path} is a link that leads nowhere: replace it")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def expand(pattern: str) -> Iterator[str]:
    """shard-{08..10}.tar is shard-08.tar, shard-09.tar and shard-10.tar."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern}: {match[0]} counts down: give the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from expand(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def stat_all(urls_and_names: list[tuple[str, str]]) -> list[StoredFile]:
    """What is known of each of these files, asked for in parallel.

    Raises:
        ValueError: one does not exist.
    """
    try:
        return in_parallel(lambda pair, stopped: stat(pair[0], pair[1], stopped), urls_and_names)
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ValueError(str(error)) from error
        raise


def in_parallel(work: Callable[[Any, threading.Event], T], items: list[Any], threads: int = 16) -> list[T]:
    """`work(item, stopped)` on all items, in order. An error or a signal ends it, and sets `stopped`."""
    from concurrent.futures import ThreadPoolExecutor

    stopped = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(lambda item: work(item, stopped), items))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def stat(url: str, name: str, stopped: threading.Event | None = None) -> StoredFile:
    """Size and version of a file."""

    def ask() -> StoredFile:
        if not is_remote(url):
            status = os.stat(url)
            return StoredFile(url, name, status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns}")
        if is_http(url):
            headers = _headers(url)
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            return StoredFile(url, name, _length(url, headers), version)
        filesystem, path = _filesystem(url)
        info = filesystem.info(path)
        return StoredFile(url, name, int(info["size"]), _version(info))

    return patiently(path_of(url), ask, stopped)


def _headers(url: str) -> Any:
    """What a web server says of a file. Not all answer HEAD, and not all of these know the length."""
    try:
        with _request(url, method="HEAD") as answer:
            if answer.headers["Content-Length"]:
                return answer.headers
    except urllib.error.HTTPError as error:
        if error.code not in NO_HEAD:
            raise
    with _request(url, {"Range": "bytes=0-0"}) as answer:
        return answer.headers


def _length(url: str, headers: Any) -> int:
    """Of a file, by the headers of an answer with all or a part of it."""
    text = (headers["Content-Range"] or headers["Content-Length"] or "").rpartition("/")[2]
    if not text.isdecimal():
        raise ShardError(f"{path_of(url)} cannot be read: the server does not say how long it is")
    return int(text)


def _version(info: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "sha256", "blob_id", "md5", "LastModified", "last_modified", "updated", "mtime", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file; one attempt. OSError if there are fewer."""
    if not is_remote(url):
        with open(url, "rb") as file:
            file.seek(start)
            content = file.read() if end is None else file.read(end - start)
    elif is_http(url):
        headers = {} if (start, end) == (0, None) else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        with _request(url, headers) as answer:
            content = answer.read()
            if headers and answer.status != 206:  # a server that knows no ranges sends all
                content = content[start:end]
    else:
        filesystem, path = _filesystem(url)
        content = bytes(filesystem.cat_file(path, start=start, end=end))
    _check_length(len(content), 0 if end is None else end - start)
    return content


def read_optional(url: str) -> bytes | None:
    """A whole file; None if it does not exist."""
    try:
        return patiently(path_of(url), lambda: read(url))
    except ShardError as error:
        cause = error.__cause__
        is_refused = isinstance(cause, urllib.error.HTTPError) and cause.code in REFUSED
        if is_refused or isinstance(cause, FileNotFoundError | NotADirectoryError):
            return None
        raise


def download(file: StoredFile, to: Path, stopped: threading.Event | None = None) -> None:
    """Copy a file to this machine; one attempt.

    Raises:
        OSError: the connection ended early.
        ShardError: `stopped` was set.
    """
    if not is_http(file.url):
        if is_remote(file.url):
            filesystem, path = _filesystem(file.url)
            filesystem.get_file(path, str(to))
            _check_length(to.stat().st_size, int(filesystem.info(path)["size"]))
        else:
            shutil.copyfile(file.url, to)
        return
    with _request(file.url) as answer, open(to, "wb") as target:
        length = answer.headers["Content-Length"] or ""
        expected = int(length) if length.isdecimal() else file.size
        while block := answer.read(BLOCK):
            if stopped is not None and stopped.is_set():
                raise ShardError(f"{file.name} is not read: the run ends")
            target.write(block)
        _check_length(target.tell(), expected)


def _check_length(length: int, expected: int) -> None:
    if length < expected:
        raise OSError(f"only {length} of {expected} bytes came")


class RemoteFile(io.RawIOBase):
    """A file that is read by ranges, for readers that need a few of them."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._file.size)
        if end <= self._position:
            return 0
        content = patiently(path_of(self._file.url), lambda: read(self._file.url, self._position, end))
        buffer[: len(content)] = content
        self._position = end
        return len(content)


def _request(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    # Content-Length must be that of the file, not of a compressed copy.
    headers = {"User-Agent": "ddpm_pipeline", "Accept-Encoding": "identity"} | (headers or {})
    if user := user_of(url):
        headers["Authorization"] = f"Basic {base64.b64encode(urllib.parse.unquote(user).encode()).decode()}"
    url = urllib.parse.quote(USER.sub(r"\1", url), safe="%/:?&=+,;@!$'()*~[]")  # spaces, other alphabets, #
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in NOT_FOUND:
            raise FileNotFoundError(f"the server has no such file ({error})") from error
        raise


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the library of this protocol is not installed, or there is none
        raise ValueError(f"{url} cannot be read: {error}") from error
