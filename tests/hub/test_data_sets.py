"""A data set on the Hub, loaded by the real `datasets` in child processes: its commit is part of the cache key."""

import io
import json
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.hub.commands import run_code
from tests.hub.repositories import as_json, git_oid
from tests.hub.server import TOKENS, Hub

SCRIPT = """
import json, sys
from training.data.cache import load_images
try:
    report = int(load_images(dataset_name="alice/set", cache_dir=sys.argv[1]).images.max())
except ValueError as error:
    report = str(error)
print(json.dumps(report))
"""


class DataSetHub(Hub):
    """Data sets are answered as models are, and their folders are listed."""

    def _route(self, method, target, headers, body):
        target = target.replace("/api/datasets/", "/api/models/", 1).removeprefix("/datasets")
        match [unquote(part) for part in urlsplit(target).path.strip("/").split("/")]:
            case ["api", "models", owner, name, "tree", revision, *path]:
                recursive = "recursive=true" in target.lower()
                return self._listing(f"{owner}/{name}", revision, "".join(f"{part}/" for part in path), recursive)
            case ["api", "models", owner, name, "paths-info", revision]:
                asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
                listing = json.loads(self._listing(f"{owner}/{name}", revision, "", True).body)
                return as_json([entry for entry in listing if entry["path"] in asked["paths"]])
        return super()._route(method, target, headers, body)

    def _listing(self, repo, revision, start, recursive):
        files = {path: data for path, data in self.repo(repo).at(revision).files.items() if path.startswith(start)}
        folders = {start + path[len(start) :].rpartition("/")[0] for path in files if "/" in path[len(start) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        for path, data in files.items():
            if recursive or "/" not in path[len(start) :]:
                entries.append({"type": "file", "path": path, "size": len(data), "oid": git_oid(data)})
        return as_json(entries)


def parquet(value):
    image, table = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(image, "png")
    pq.write_table(pa.table({"image": [{"bytes": image.getvalue(), "path": None}]}), table)
    return {"data/train-00000-of-00001.parquet": table.getvalue()}


@pytest.fixture
def hub():
    with DataSetHub(TOKENS) as hub:
        yield hub


def test_a_new_commit_is_loaded_and_without_a_connection_the_last(hub, tmp_path):
    def load(cache, **variables):
        return run_code(hub, tmp_path / "home", SCRIPT, tmp_path / cache, timeout=60, **variables)

    hub.create("alice/set", files=parquet(100))
    assert load("cache") == 100
    number = len(hub.requests)
    assert load("cache") == 100
    assert len(hub.requests) == number + 1  # asks for the commit alone
    hub.push("alice/set", parquet(200))
    assert load("cache", HF_HUB_OFFLINE="1") == 100
    assert load("cache") == 200
    assert load("cache", HF_HUB_OFFLINE="1") == 200
    assert load("cache", HF_ENDPOINT="http://127.0.0.1:9") == 200
