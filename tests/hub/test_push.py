"""The push to the Hub of server.py when requests fail, and into repositories that are not empty."""

import json
import time

import pytest

from tests.hub.commands import run_code, start
from training.hub.files import FORMER_NAMES, HALF_WEIGHTS, WEIGHTS

CASES = {  # name: (method, part of the path, options of the fault, part of the error or None)
    "commit 401": ("POST", "/commit/", {"status": 401}, "401"),
    "commit 403": ("POST", "/commit/", {"status": 403}, "403"),
    "commit 404": ("POST", "/commit/", {"status": 404}, "404"),
    "commit 409": ("POST", "/commit/", {"status": 409}, "409"),
    "commit 412": ("POST", "/commit/", {"status": 412}, "412"),
    "commit 413": ("POST", "/commit/", {"status": 413}, "413"),
    "commit 429": ("POST", "/commit/", {"status": 429, "retry_after": 1, "times": 1}, None),
    "commit 500 twice": ("POST", "/commit/", {"status": 500, "times": 2}, None),
    "commit 503 always": ("POST", "/commit/", {"status": 503}, "503"),
    "commit reset after": ("POST", "/commit/", {"reset": True, "times": 1}, None),
    "commit reset before": ("POST", "/commit/", {"reset": True, "status": 500, "times": 1}, None),
    "commit silent": ("POST", "/commit/", {"silent": 60}, "no answer"),
    "preupload 503": ("POST", "/preupload/", {"status": 503, "times": 1}, None),
    "preupload 403": ("POST", "/preupload/", {"status": 403}, "403"),
    "tag reset after": ("POST", "/tag/", {"reset": True, "times": 1}, None),
    "tag 500 twice": ("POST", "/tag/", {"status": 500, "times": 2}, None),
    "tag 403": ("POST", "/tag/", {"status": 403}, "403"),
    "read 503 twice": ("GET", "/commits/", {"status": 503, "times": 2}, None),
    "read silent": ("GET", "/refs", {"silent": 60}, "no answer"),
}
PUSH = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from training.hub import client, push

def push_folder(repo_id):
    start = time.monotonic()
    try:
        hub, folder = client.HubClient(10), Path(sys.argv[1])
        push.check_access(hub, repo_id)
        repo = push.read_repo_state(hub, push.MODEL, repo_id)
        push.check_tag(repo, "v1", "a run, step 6")
        commit = push.push(hub, folder, repo, tag="v1", title="a run, step 6")
        return {"error": None, "commit": commit, "seconds": time.monotonic() - start}
    except client.HubError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}

with ThreadPoolExecutor(40) as pool:
    print(json.dumps(list(pool.map(push_folder, sys.argv[2:]))), flush=True)
os._exit(0)
"""


def push_to(hub, home, folder, repos):
    """The result of pushing a folder to each of these repositories, at the same time."""
    return dict(zip(repos, run_code(hub, home, PUSH, folder, *repos, timeout=600), strict=True))


@pytest.fixture
def folder(tmp_path):
    """A folder to push. The Hub does not look into it."""
    folder = tmp_path / "staged"
    (folder / "unet").mkdir(parents=True)
    for name in ("model_index.json", "pipeline.py", WEIGHTS):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    return folder


def test_errors_and_silence_of_the_hub(hub, tmp_path, folder):
    """Permanent errors are tried once, transient ones again; no commit is made twice; a silent Hub has a deadline."""
    repos = {name: f"alice/n{number:02}" for number, name in enumerate(CASES)}
    for name, (method, part, fault, _) in CASES.items():
        hub.create(repos[name])
        hub.fault(method, f"{repos[name]}{part}", **fault)
    results = push_to(hub, tmp_path / "home", folder, list(repos.values()))
    for name, (method, part, fault, error) in CASES.items():
        result, repo = results[repos[name]], hub.repo(repos[name])
        commits = len(repo.commits) - 1
        tries = len(hub.requests_of(method, f"{repos[name]}{part}"))
        assert commits <= 1, (name, result)
        if error is None:
            assert (result["error"], commits, repo.tags) == (None, 1, {"v1": repo.head.sha}), (name, result)
            assert result["commit"] == repo.head.sha
        else:
            assert result["error"] is not None and error in result["error"], (name, result)
            assert repo.tags == {}, name
            if fault.get("status") in (401, 403, 404, 409, 412, 413):
                assert tries == 1, (name, tries)
        assert result["seconds"] < 20, (name, result)
    assert len(hub.requests_of("POST", f"{repos['commit 503 always']}/commit/")) > 2


def test_repositories_with_other_files_and_of_other_users(hub, tmp_path, folder):
    hub.create("alice/full", files={"tokenizer.json": b"{}"})
    hub.create("alice/card", files={"README.md": b"---\nlicense: mit\n---\n"})  # created on the Hub's page
    hub.create("bob/x")
    hub.create("bob/secret", private=True)
    results = push_to(hub, tmp_path / "home", folder, ["alice/full", "alice/card", "bob/x", "bob/secret"])
    assert "tokenizer.json" in results["alice/full"]["error"] and len(hub.repo("alice/full").commits) == 2
    assert results["alice/card"]["error"] is None
    for name in ("bob/x", "bob/secret"):
        assert "no write access" in results[name]["error"], results[name]
        assert len(hub.repo(name).commits) == 1


def test_obsolete_files_are_deleted_in_the_same_commit(hub, tmp_path, folder):
    """Those of an earlier publication, also under the names of earlier versions. Other people's files stay."""
    earlier = ("model_index.json", "pipeline.py", *FORMER_NAMES, "samples.png", HALF_WEIGHTS, "notes.txt")
    hub.create("alice/x", files=dict.fromkeys(earlier, b"earlier"))
    results = push_to(hub, tmp_path / "home", folder, ["alice/x"])
    assert results["alice/x"]["error"] is None
    _, _, commit = hub.repo("alice/x").commits
    assert set(commit.files) == {"model_index.json", "pipeline.py", WEIGHTS, "README.md", "notes.txt", ".gitattributes"}
    assert commit.files["pipeline.py"] == b"pipeline.py"


def test_a_push_by_somebody_else_is_not_overwritten(hub, tmp_path, folder):
    """It comes between reading the newest commit and making ours."""
    hub.create("alice/x")
    hub.fault("GET", "alice/x/refs", silent=2)  # our push waits here
    with start(hub, tmp_path / "home", ["-c", PUSH, folder, "alice/x"]) as child:
        while not hub.requests_of("GET", "alice/x/refs"):
            assert child.poll() is None
            time.sleep(0.02)
        hub.push("alice/x", {"notes.txt": b"theirs"})
        out, _ = child.communicate(timeout=60)
    (result,) = json.loads(out.splitlines()[-1])
    assert "somebody else pushed" in result["error"]
    assert "notes.txt" in hub.repo("alice/x").head.files and len(hub.repo("alice/x").commits) == 2
