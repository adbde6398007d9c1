"""Shards for the tests, and a server that is slow, forgetful or dead when it is told to be."""

import base64
import contextlib
import io
import json
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.image_files import cell, write_parquet


def pixels_of(i, side=8):
    """Image i, (side, side, 3): no two are equal."""
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png_of(i, side=8):
    stream = io.BytesIO()
    Image.fromarray(pixels_of(i, side)).save(stream, "png")
    return stream.getvalue()


def as_arrays(numbers, side=8):
    """The images as Pillow and NumPy have them, (n, C, H, W)."""
    return np.stack([pixels_of(i, side).transpose(2, 0, 1) for i in numbers])


def write_tables(folder, counts, split="train", side=8, labels=True):
    """Parquet files with images 0, 1, ... and the label i % 3."""
    start = 0
    for shard, count in enumerate(counts):
        numbers = range(start, start + count)
        columns = {"image": [cell(pixels_of(i, side)) for i in numbers]}
        if labels:
            columns["label"] = [i % 3 for i in numbers]
        write_parquet(folder / f"{split}-{shard:05}-of-{len(counts):05}.parquet", **columns)
        start += count


def write_tars(folder, counts, labels=True):
    """Tar files of WebDataset with images 0, 1, ... and the label i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for i in range(start, start + count):
                add(archive, f"{i:06}.png", png_of(i))
                if labels:
                    add(archive, f"{i:06}.cls", str(i % 3).encode())
        start += count


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_packed(folder, counts, split="train", side=8):
    """Packed shards as pack.py describes them, by NumPy alone."""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    shards, start = [], 0
    for shard, count in enumerate(counts):
        path = folder / f"{split}-{shard:05}.npy"
        np.save(path, as_arrays(range(start, start + count), side))
        content = path.read_bytes()
        entry = {
            "name": path.name,
            "count": count,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        shards.append(entry)
        start += count
    np.save(folder / f"{split}-labels.npy", np.arange(start, dtype=np.int32) % 3)
    entry = {"images": start, "shards": shards, "labels": f"{split}-labels.npy", "skipped": []}
    manifest = {
        "format": "ddpm_pipeline shards 1",
        "source": "test",
        "shape": [3, side, side],
        "dtype": "uint8",
        "class_names": ["0", "1", "2"],
        "splits": {split: entry},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Server(ThreadingHTTPServer):
    """Serves a folder over HTTP.

    Attributes:
        requests: the paths that were asked for with GET.
        slow: path: seconds before its answer.
        unannounced: path: how often the answer ends early without a length that would tell.
        cut: path: how often the connection ends in the middle of it.
        dead: while it is set, every answer is an error.
        code: of this error.
        head: answer HEAD with this error, or "no length"; "": as a web server.
        user: user and password that every request must have.
        by_number: answer /get.tar?id=N with N/000.tar.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests, self.slow, self.cut, self.dead = [], {}, {}, threading.Event()
        self.code, self.unannounced, self.head = 503, {}, ""
        self.user, self.by_number = "", False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def translate_path(self, path):
        return super().translate_path(f"/{path[-1]}/000.tar" if self.server.by_number else path)

    def is_refused(self):
        given = self.headers["Authorization"] or "Basic "
        if base64.b64decode(given.removeprefix("Basic ")).decode() == self.server.user:
            return False
        self.send_error(401)
        return True

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.is_refused():
            return
        if self.server.dead.is_set():
            self.send_error(self.server.code)
            return
        time.sleep(self.server.slow.get(self.path, 0))
        if self.server.cut.get(self.path, 0):
            self.server.cut[self.path] -= 1
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
            return
        if self.server.unannounced.get(self.path, 0):
            self.server.unannounced[self.path] -= 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(Path(self.translate_path(self.path)).read_bytes()[:4000])
            self.close_connection = True
            return
        super().do_GET()

    def do_HEAD(self):
        if self.is_refused():
            return
        if self.server.dead.is_set():
            self.send_error(self.server.code)
            return
        if self.server.head == "no length":
            self.send_response(200)
            self.end_headers()
        elif self.server.head:
            self.send_error(int(self.server.head))
        else:
            super().do_HEAD()


@contextlib.contextmanager
def serving(folder):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
