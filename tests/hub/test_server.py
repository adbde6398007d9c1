"""The Hub of server.py, used by the real huggingface_hub and diffusers in processes of their own.

These tests also hold what the client does when something goes wrong, because publishing is built on it. If one fails
with a new version of huggingface_hub, look at what publishing expects of it.

The children only report what they see; what is expected stands here.
"""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import httpx2
import pytest
from server import Hub, check_card

CARD = b"---\nlicense: apache-2.0\npipeline_tag: unconditional-image-generation\n---\nText\n"

BEGIN = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
import huggingface_hub as hf
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete

hf.utils.logging.set_verbosity_error()
api, given, report = hf.HfApi(), json.loads(sys.argv[1]), {}
home = os.environ["HF_HOME"]

def attempt(call):
    begin = time.monotonic()
    try:
        seen = {"value": call(), "error": None}
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        seen = {"error": type(error).__name__, "status": status, "said": str(error)}
    return seen | {"seconds": time.monotonic() - begin}

def push(repo, files, **options):
    contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
    operations = [Add(path, content) for path, content in contents.items()]
    return api.create_commit(repo, operations, **{"commit_message": "a push", **options})

def folder(name, files):
    for path, text in files.items():
        os.makedirs(os.path.dirname(f"{home}/{name}/{path}"), exist_ok=True)
        with open(f"{home}/{name}/{path}", "w") as file:
            file.write(text)
    return f"{home}/{name}"
"""


def start(hub, home, script, *, token="tok-a", given=None, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", f"{BEGIN}\n{script}\nprint(json.dumps(report, default=str))", json.dumps(given)],
        env=hub.environment(home, token) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(*args, **options):
    """What a new process reports that runs this script with this token."""
    with start(*args, **options) as child:
        try:
            out, err = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


# ---- Pushing ---------------------------------------------------------------------------------------------------------


def test_create_and_commit(hub, tmp_path):
    script = """
report["me"] = api.whoami()["name"]
report["url"] = api.create_repo("alice/x")
report["again"] = attempt(lambda: api.create_repo("alice/x"))
report["exist_ok"] = api.create_repo("alice/x", exist_ok=True).repo_id
report["secret"] = api.create_repo("secret", private=True).repo_id
report["foreign"] = attempt(lambda: api.create_repo("bob/x"))

start = api.repo_info("alice/x").sha
files = {"README.md": given, "unet/config.json": "{}", "unet/weights 1.bin": bytes(range(256)), "empty": ""}
one = push("alice/x", files, parent_commit=start, commit_message="one", commit_description="why")
report["one"] = [one, one.oid]
report["stale"] = attempt(lambda: push("alice/x", {"late": "?"}, parent_commit=start))
report["short"] = push("alice/x", {"unet/config.json": "[]"}, parent_commit=one.oid[:7]).oid
report["nothing new"] = push("alice/x", {"unet/config.json": "[]"}).oid

delete = [Delete("unet/"), Delete("empty")]
report["delete"] = api.create_commit("alice/x", delete, commit_message="delete").oid
report["delete again"] = attempt(lambda: api.create_commit("alice/x", delete, commit_message="delete"))
report["other branch"] = attempt(lambda: push("alice/x", {"a": ""}, revision="other"))
report["pull request"] = attempt(lambda: push("alice/x", {"a": ""}, create_pr=True))

api.create_repo("alice/gone")
api.delete_repo("alice/gone")
report["deleted"] = attempt(lambda: api.delete_repo("alice/gone"))
report["commit to none"] = attempt(lambda: push("alice/gone", {"a": ""}))
"""
    report = ask(hub, tmp_path, script, given=CARD.decode())
    repo = hub.repo("alice/x")
    assert hub.repos == ["alice/secret", "alice/x"]
    assert (report["me"], report["url"], report["exist_ok"]) == ("alice", f"{hub.url}/alice/x", "alice/x")
    assert report["secret"] == "alice/secret" and hub.repo("alice/secret").private and not repo.private
    assert (report["again"]["error"], report["again"]["status"]) == ("HfHubHTTPError", 409)
    assert (report["foreign"]["error"], report["foreign"]["status"]) == ("HfHubHTTPError", 403)

    initial, one, short, delete = repo.commits
    assert list(initial.files) == [".gitattributes"]
    assert report["one"] == [f"{hub.url}/alice/x/commit/{one.sha}", one.sha]
    assert (one.message, one.description, one.author) == ("one", "why", "alice")
    assert one.files == initial.files | {
        "README.md": CARD,
        "unet/config.json": b"{}",
        "unet/weights 1.bin": bytes(range(256)),
        "empty": b"",
    }
    assert report["short"] == report["nothing new"] == short.sha
    assert short.files == one.files | {"unet/config.json": b"[]"}
    assert report["delete"] == delete.sha and list(delete.files) == [".gitattributes", "README.md"]
    assert len({commit.sha for commit in repo.commits}) == 4 and all(len(commit.sha) == 40 for commit in repo.commits)

    assert report["stale"]["status"] == 412 and "A commit has happened since" in report["stale"]["said"]
    assert report["delete again"]["error"] == "RemoteEntryNotFoundError"
    assert report["other branch"]["error"] == "RevisionNotFoundError"
    assert report["pull request"]["status"] == 501
    assert report["deleted"]["error"] == report["commit to none"]["error"] == "RepositoryNotFoundError"
    assert {request.user for request in hub.requests} == {"alice"}


@pytest.mark.parametrize("xet", ["without", "with"])
def test_upload_folder(hub, tmp_path, xet):
    """With Xet the client has other code for this, though no file goes that way here."""
    script = """
files = {f"{i % 3}/{i}.txt": f"{i} {given}" for i in range(20)} | {"logs/run.txt": "not for others"}
options = {"folder_path": folder("up", files), "repo_id": "alice/x", "ignore_patterns": ["logs/*"]}
report["first"] = api.upload_folder(**options).oid
report["again"] = api.upload_folder(**options).oid
report["less"] = api.upload_folder(**options, allow_patterns="0/*", delete_patterns="1/*").oid
many = {f"{i}.txt": str(i) for i in range(300)}
report["many"] = api.upload_folder(folder_path=folder("many", many), repo_id="alice/many").oid
"""
    for name in ("alice/x", "alice/many"):
        hub.create(name)
    report = ask(hub, tmp_path, script, given=xet, HF_HUB_DISABLE_XET="0" if xet == "with" else "1")
    initial, first, less = hub.repo("alice/x").commits
    assert first.files == initial.files | {f"{i % 3}/{i}.txt": f"{i} {xet}".encode() for i in range(20)}
    assert report["first"] == report["again"] == first.sha
    assert report["less"] == less.sha and {path[0] for path in less.files} == {".", "0", "2"}

    commits = [len(commit.files) - 1 for commit in hub.repo("alice/many").commits]
    assert commits == ([0, 300] if xet == "without" else [0, 250, 300])
    assert report["many"] == hub.repo("alice/many").head.sha
    assert len(hub.asked("POST", "/many/preupload/")) == 2


def test_cards(hub, tmp_path):
    script = """
for name, card in given.items():
    report[name] = attempt(lambda: hf.ModelCard(card, ignore_metadata_errors=True).validate())
    report[f"push {name}"] = attempt(lambda: push("alice/x", {"README.md": card, "a.txt": name}))
"""
    cards = {
        "good": CARD.decode(),
        "list": "---\nlicense: [mit, other]\n---\n",
        "plain": "no block of YAML\n",
        "broken": "---\nlicense: [mit\n---\n",
        "no licence of theirs": "---\nlicense: Apache 2\n---\n",
        "number": "---\nlicense: 3\n---\n",
        "tags": "---\npipeline_tag: [a, b]\n---\n",
    }
    hub.create("alice/x")
    report = ask(hub, tmp_path, script, given=cards)
    good = ("good", "list", "plain")
    for name in cards:
        both = report[name], report[f"push {name}"]
        # the client cannot read a card whose YAML is broken, and so it never gets to ask about it
        error = None if name in good else "ValueError" if name != "broken" else "ParserError"
        assert [seen["error"] for seen in both] == [error, None if name in good else "ValueError"], both
    assert '"license" must be one of [afl-3.0' in report["number"]["said"]
    assert '"license" must be one of [afl-3.0' in report["push no licence of theirs"]["said"]
    assert report["tags"]["said"] == '"pipeline_tag" must be a string'
    assert "Invalid YAML" in report["push broken"]["said"]
    assert [commit.files.get("a.txt", b"").decode() for commit in hub.repo("alice/x").commits] == ["", *good]
    # a refused card ends a push before anything else is sent
    assert len(hub.asked("POST", "/preupload/")) == len(hub.asked("POST", "/commit/")) == len(good)


def test_a_commit_with_a_bad_card_is_refused(hub):
    """The client asks about the card first; one that does not gets the same answer from the commit."""
    card = base64.b64encode(b"---\nlicense: 3\n---\n").decode()
    hub.create("alice/x")
    lines = [
        {"key": "header", "value": {"summary": "m"}},
        {
            "key": "file",
            "value": {"path": "README.md", "encoding": "base64", "content": card},
        },
    ]
    body = "\n".join(map(json.dumps, lines))
    headers = {"Authorization": "Bearer tok-a"}
    answer = httpx2.post(f"{hub.url}/api/models/alice/x/commit/main", content=body, headers=headers, trust_env=False)
    assert answer.status_code == 400 and "license" in answer.json()["error"]
    assert len(hub.repo("alice/x").commits) == 1
    assert check_card("---\nlicense: 3\n---\n")[0] and check_card("---\n---\n") == check_card("")


# ---- Who may do what -------------------------------------------------------------------------------------------------


def test_who_may_do_what(hub, tmp_path):
    script = """
for token in ("tok-a", "tok-r", "tok-b", "tok-?", False):
    api = hf.HfApi(token=token)
    for name in ("public", "secret"):
        repo = f"alice/{name}"
        seen = {
            "info": attempt(lambda: api.repo_info(repo).private),
            "may write": attempt(lambda: api.auth_check(repo, write=True)),
            "push": attempt(lambda: push(repo, {f"of {token}": ""}).oid),
            "tag": attempt(lambda: api.create_tag(repo, tag=f"of {token}")),
            "file": attempt(lambda: api.hf_hub_download(repo, ".gitattributes", cache_dir=f"{home}/{token}")),
            "snapshot": attempt(lambda: api.snapshot_download(repo, cache_dir=f"{home}/{token} all")),
        }
        report[f"{token} {name}"] = {what: one["status"] if one["error"] else 200 for what, one in seen.items()}
        report[f"{token} {name} error"] = sorted({one["error"] for one in seen.values() if one["error"]})
    report[f"{token} create"] = attempt(lambda: api.create_repo("alice/new", exist_ok=True))
    report[f"{token} whoami"] = attempt(lambda: api.whoami()["name"])
"""
    hub.create("alice/public")
    hub.create("alice/secret", private=True)
    report = ask(hub, tmp_path, script)
    read, write = ("info", "file", "snapshot"), ("may write", "push", "tag")
    rights = {  # to read and to write the public one, to read and to write the private one
        "tok-a": (200, 200, 200, 200),
        "tok-r": (200, 403, 200, 403),
        "tok-b": (200, 403, 404, 404),
        "tok-?": (401, 401, 401, 401),
        "False": (200, 401, 401, 401),
    }
    for token, (read_public, write_public, read_secret, write_secret) in rights.items():
        public, secret = report[f"{token} public"], report[f"{token} secret"]
        assert public == dict.fromkeys(read, read_public) | dict.fromkeys(write, write_public), token
        assert secret == dict.fromkeys(read, read_secret) | dict.fromkeys(write, write_secret), token
    for name in ("tok-b", "False"):  # as if it did not exist
        assert report[f"{name} secret error"] == ["RepositoryNotFoundError"]
    assert report["tok-? public error"] == report["tok-? secret error"] == ["HfHubHTTPError"]
    for name in ("public", "secret"):
        assert list(hub.repo(f"alice/{name}").head.files) == [".gitattributes", "of tok-a"]
        assert list(hub.repo(f"alice/{name}").tags) == ["of tok-a"]

    users = {token: report[f"{token} whoami"].get("value") for token in rights}
    assert users == {"tok-a": "alice", "tok-r": "alice", "tok-b": "bob", "tok-?": None, "False": None}
    assert (report["tok-? whoami"]["error"], report["tok-? whoami"]["status"]) == ("HfHubHTTPError", 401)
    assert "HF_TOKEN" not in report["tok-? whoami"]["said"]  # the client says so only if it came from there
    # with exist_ok the client takes 403 for success where the repository can be read
    assert {token: report[f"{token} create"]["error"] for token in rights} == {
        "tok-a": None,
        "tok-r": None,
        "tok-b": None,
        "tok-?": "HfHubHTTPError",
        "False": None,
    }


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_download(hub, tmp_path):
    script = """
def read(where):
    return {path: open(f"{where}/{path}").read() for path in ("README.md", "unet/config.json")}

old, new = given
api.create_tag("alice/x", tag="v1", revision=old)
report["tag again"] = attempt(lambda: api.create_tag("alice/x", tag="v1"))
api.create_tag("alice/x", tag="v1", exist_ok=True)
api.create_tag("alice/x", tag="of/head", tag_message="newest")
report["tag of none"] = attempt(lambda: api.create_tag("alice/x", tag="v2", revision="v0"))

refs = api.list_repo_refs("alice/x")
report["refs"] = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags}
report["commits"] = [[commit.commit_id, commit.title] for commit in api.list_repo_commits("alice/x")]
report["before"] = [commit.commit_id for commit in api.list_repo_commits("alice/x", revision=old)]
report["sha"] = {name: api.repo_info("alice/x", revision=name).sha for name in (None, "main", "v1", "of/head", old)}
report["sizes"] = {one.rfilename: one.size for one in api.model_info("alice/x", files_metadata=True).siblings}
report["no revision"] = attempt(lambda: api.repo_info("alice/x", revision="v0"))
report["files"] = {name: api.list_repo_files("alice/x", revision=name) for name in ("v1", "main")}
report["top"] = sorted(one.path for one in api.list_repo_tree("alice/x"))
report["unet"] = [one.path for one in api.list_repo_tree("alice/x", "unet")]
report["no folder"] = attempt(lambda: list(api.list_repo_tree("alice/x", "vae")))
report["paths"] = [[one.path, type(one).__name__] for one in api.get_paths_info("alice/x", ["unet", "README.md", "?"])]
report["exists"] = [api.file_exists("alice/x", "unet/config.json"), api.file_exists("alice/x", "config.json")]

report["v1"] = read(hf.snapshot_download("alice/x", revision="v1"))
report["new"] = read(hf.snapshot_download("alice/x", revision=new))
report["main"] = read(hf.snapshot_download("alice/x"))
"""
    hub.create("alice/x")
    old = hub.push("alice/x", {"README.md": b"old", "unet/config.json": b"{}"}, "old")
    new = hub.push("alice/x", {"README.md": b"newer", "a b%20c?.txt": b"odd"}, "new")
    initial = hub.repo("alice/x").commits[0]
    report = ask(hub, tmp_path, script, given=[old.sha, new.sha])
    assert hub.repo("alice/x").tags == {"v1": old.sha, "of/head": new.sha}
    assert (report["tag again"]["error"], report["tag again"]["status"]) == ("HfHubHTTPError", 409)
    assert report["tag of none"]["error"] == report["no revision"]["error"] == "RevisionNotFoundError"
    assert report["refs"] == {"refs/heads/main": new.sha, "refs/tags/v1": old.sha, "refs/tags/of/head": new.sha}
    assert report["commits"] == [[new.sha, "new"], [old.sha, "old"], [initial.sha, "initial commit"]]
    assert report["before"] == [old.sha, initial.sha]
    assert list(report["sha"].values()) == [new.sha, new.sha, old.sha, new.sha, old.sha]
    assert report["sizes"] == {path: len(content) for path, content in new.files.items()}
    assert report["files"] == {"v1": list(old.files), "main": list(new.files)}
    assert report["top"] == [".gitattributes", "README.md", "a b%20c?.txt", "unet"]
    assert report["unet"] == ["unet/config.json"] and report["no folder"]["error"] == "RemoteEntryNotFoundError"
    assert report["paths"] == [["unet", "RepoFolder"], ["README.md", "RepoFile"]]
    assert report["exists"] == [True, False]
    assert report["v1"] == {"README.md": "old", "unet/config.json": "{}"}
    assert report["new"] == report["main"] == {"README.md": "newer", "unet/config.json": "{}"}
    assert any(path.read_bytes() == b"odd" for path in tmp_path.rglob("a b%20c?.txt"))


def test_cache(hub, tmp_path):
    """A file is fetched once, and again when it has changed; offline, what was fetched is there."""
    script = """
def get(**options):
    return attempt(lambda: open(hf.hf_hub_download("alice/x", "a.txt", **options)).read())
report["main"], report["again"], report["tag"] = get(), get(), get(revision="v1")
report["b"] = attempt(lambda: hf.hf_hub_download("alice/x", "b.txt"))
report["b known"] = hf.try_to_load_from_cache("alice/x", "b.txt") is hf.file_download._CACHED_NO_EXIST
report["snapshot"] = attempt(lambda: sorted(os.listdir(hf.snapshot_download("alice/x", revision="v1"))))
report["push"] = attempt(lambda: push("alice/x", {"c.txt": "c"}))
"""
    repo = hub.create("alice/x", files={"a.txt": b"one"})
    repo.tags["v1"] = repo.head.sha
    report = ask(hub, tmp_path, script)
    assert [report[name]["value"] for name in ("main", "again", "tag")] == ["one"] * 3
    assert report["b"]["error"] == "RemoteEntryNotFoundError" and report["b known"]
    assert report["snapshot"]["value"] == [".gitattributes", "a.txt"]
    assert len(hub.asked("GET", "/resolve/main/a.txt")) == 1  # by its ETag, all three are the same file
    assert len(hub.asked("HEAD", "/resolve/main/a.txt")) == 2
    assert len(hub.asked("GET", "/a.txt")) == 1

    hub.push("alice/x", {"a.txt": b"two"})
    before = len(hub.requests)
    report = ask(hub, tmp_path, script, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    # the first child's push moved main, but its cache does not know
    assert [report[name]["value"] for name in ("main", "again", "tag")] == ["one"] * 3
    assert report["b"]["error"] == "LocalEntryNotFoundError"
    assert report["snapshot"]["value"] == [".gitattributes", "a.txt"]
    assert report["push"]["error"] == "OfflineModeIsEnabled"

    report = ask(hub, tmp_path, script)
    assert [report[name]["value"] for name in ("main", "again", "tag")] == ["two", "two", "one"]


def test_diffusers_saves_and_loads(hub, tmp_path):
    script = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
def save(**options):
    unet = UNet2DModel(sample_size=4, layers_per_block=1, norm_num_groups=2, **blocks)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=5)).save_pretrained(home + "/saved", **options)
    return unet
old = save(push_to_hub=True, repo_id="alice/x", private=True)
api.create_tag("alice/x", tag="v1")
new = save(push_to_hub=True, repo_id="alice/x")

for name, unet, options in (("v1", old, {"revision": "v1"}), ("main", new, {})):
    pipe = DiffusionPipeline.from_pretrained("alice/x", **options)
    same = all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), unet.parameters()))
    report[name] = [type(pipe).__name__, pipe.scheduler.config.num_train_timesteps, same]
strange = {"token": False, "cache_dir": f"{home}/elsewhere"}
report["without token"] = attempt(lambda: DiffusionPipeline.from_pretrained("alice/x", **strange))
"""
    report = ask(hub, tmp_path, script)
    repo = hub.repo("alice/x")
    assert report["v1"] == report["main"] == ["DDPMPipeline", 5, True]
    assert report["without token"]["error"] == "OSError"
    assert repo.private and len(repo.commits) == 3
    weights = [commit.files["unet/diffusion_pytorch_model.safetensors"] for commit in repo.commits[1:]]
    assert weights[0] != weights[1]


# ---- What goes wrong -------------------------------------------------------------------------------------------------

# Each call fails in a repository of its own, so that one child makes all at once and waits for all at once.
CALLS = """
calls = {
    "info": lambda repo: api.repo_info(repo),
    "preupload": lambda repo: push(repo, {"a.txt": "a"}),
    "commit": lambda repo: push(repo, {"a.txt": "a"}),
    "folder": lambda repo: api.upload_folder(repo_id=repo, folder_path=given["folder"]),
    "folder with parent": lambda repo: api.upload_folder(
        repo_id=repo, folder_path=given["folder"], parent_commit=api.repo_info(repo).sha
    ),
    "tag": lambda repo: api.create_tag(repo, tag="v1"),
    "tree": lambda repo: api.list_repo_files(repo),
    "head": lambda repo: open(hf.hf_hub_download(repo, "big")).read(),
    "get": lambda repo: open(hf.hf_hub_download(repo, "big")).read(),
}
with ThreadPoolExecutor(100) as pool:
    seen = pool.map(lambda case: attempt(lambda: calls[case[0]](case[1])), given["cases"])
    report["seen"] = list(seen)
"""
WHERE = {
    "info": ("GET", "/api/models/{}"),
    "preupload": ("POST", "{}/preupload/"),
    "commit": ("POST", "{}/commit/"),
    "folder": ("POST", "{}/commit/"),
    "folder with parent": ("POST", "{}/commit/"),
    "tag": ("POST", "{}/tag/"),
    "tree": ("GET", "{}/tree/"),
    "head": ("HEAD", "{}/resolve/"),
    "get": ("GET", "{}/resolve/"),
}
BIG = b"0123456789" * 10


def suffer(hub, home, cases, **variables):
    """Let each (call, name of the fault) of `cases` meet its fault: what the client saw of it, and did.

    Adds to what the child reports the number of attempts and that of commits.
    """
    (home / "up").mkdir()
    (home / "up" / "a.txt").write_text("a")
    repos = {case: f"alice/n{number:03}" for number, case in enumerate(cases)}
    faults = {}
    for case, fault in cases.items():
        hub.create(repos[case], files={"big": BIG})
        method, part = WHERE[case[0]]
        faults[case] = hub.fault(method, part.format(repos[case]), **fault)
    given = {"folder": str(home / "up"), "cases": [(case[0], repos[case]) for case in cases]}
    found = dict(zip(cases, ask(hub, home, CALLS, given=given, **variables)["seen"], strict=True))
    for case, seen in found.items():
        seen["attempts"] = len(hub.asked(faults[case].method, faults[case].part))
        seen["commits"] = len(hub.repo(repos[case]).commits) - 2
    return found


@pytest.mark.parametrize("xet", ["without", "with"])
def test_what_will_not_pass_is_tried_once(hub, tmp_path, xet):
    statuses = {401: "HfHubHTTPError", 403: "HfHubHTTPError", 404: "RepositoryNotFoundError", 409: "HfHubHTTPError"}
    statuses |= {412: "HfHubHTTPError", 413: "HfHubHTTPError"}
    calls = ("info", "preupload", "commit", "tag", "folder") if xet == "without" else ("folder",)
    cases = {(call, status): {"status": status} for call in calls for status in statuses}
    found = suffer(hub, tmp_path, cases, HF_HUB_DISABLE_XET="0" if xet == "with" else "1")
    for (call, status), seen in found.items():
        assert (seen["error"], seen["status"]) == (statuses[status], status), (call, seen)
        assert (seen["attempts"], seen["commits"]) == (1, 0), (call, seen)


def test_nothing_before_the_first_file_is_tried_again(hub, tmp_path):
    """And an answer that is no JSON makes a card that nobody has judged look like a bad one: ValueError."""
    script = """
for status in given:
    report[f"{status} whoami"] = attempt(lambda: api.whoami())
    report[f"{status} create"] = attempt(lambda: api.create_repo("alice/x", exist_ok=True))
    report[f"{status} card"] = attempt(lambda: push("alice/x", {"README.md": "Text"}))
"""
    hub.create("alice/x")
    statuses = (429, 500, 503)
    for status in statuses:
        for method, part in (("GET", "whoami-v2"), ("POST", "/repos/create"), ("POST", "/validate-yaml")):
            hub.fault(method, part, status=status, times=1)
    report = ask(hub, tmp_path, script, given=statuses)
    assert len(hub.requests) == len(report) == 9
    no_json = report.pop("503 card")
    assert (no_json["error"], no_json["status"]) == ("JSONDecodeError", None)
    assert issubclass(json.JSONDecodeError, ValueError)
    for name, seen in report.items():
        assert (seen["error"], str(seen["status"])) == ("HfHubHTTPError", name[:3]), (name, seen)


TWICE = {  # what becomes of a call whose first two requests fail: attempts, and the error if it gave up
    "preupload": {429: (3, None), 500: (3, None), 503: (3, None)},
    "tree": {429: (3, None), 500: (3, None), 503: (3, None)},
    "head": {429: (3, None), 500: (3, None), 503: (3, None)},
    "get": {429: (3, None), 500: (1, "HfHubHTTPError"), 503: (1, "HfHubHTTPError")},
    "info": dict.fromkeys((429, 500, 503), (1, "HfHubHTTPError")),
    "commit": dict.fromkeys((429, 500, 503), (1, "HfHubHTTPError")),
    "folder": dict.fromkeys((429, 500, 503), (1, "HfHubHTTPError")),
    "tag": dict.fromkeys((429, 500, 503), (1, "HfHubHTTPError")),
}


def test_only_some_requests_are_tried_again(hub, tmp_path):
    cases = {(call, status): {"status": status, "times": 2} for call in TWICE for status in TWICE[call]}
    cases["preupload", "wait"] = {"status": 429, "retry_after": 2, "times": 1}
    found = suffer(hub, tmp_path, cases)
    wait = found.pop(("preupload", "wait"))
    for (call, status), seen in found.items():
        assert (seen["attempts"], seen["error"]) == TWICE[call][status], (call, status, seen)
        assert seen["error"] is None or seen["status"] == status, (call, seen)
        pushed = call in ("preupload", "commit", "folder") and not seen["error"]
        assert seen["commits"] == pushed, (call, seen)
    assert found["head", 500]["value"] == BIG.decode()
    assert wait["attempts"] == 2 and wait["seconds"] >= 2


def test_upload_folder_with_xet_tries_its_commit_again(hub, tmp_path):
    """And so a lost answer makes two commits, unless parent_commit tells the Hub."""
    cases = {("folder", status): {"status": status, "times": 2} for status in (429, 500, 503)}
    cases |= {(call, "cut"): {"cut": True, "times": 1} for call in ("folder", "folder with parent")}
    found = suffer(hub, tmp_path, cases, HF_HUB_DISABLE_XET="0")
    for status in (429, 500, 503):
        seen = found["folder", status]
        assert (seen["error"], seen["attempts"], seen["commits"]) == (None, 3, 1), (status, seen)
    lost = found["folder", "cut"]
    assert (lost["error"], lost["attempts"], lost["commits"]) == (None, 2, 2)
    told = found["folder with parent", "cut"]
    assert (told["error"], told["status"], told["attempts"], told["commits"]) == ("HfHubHTTPError", 412, 2, 1)


def test_lost_answers(hub, tmp_path):
    """A commit whose answer is lost is made, once, and ends with an error that is no OSError."""
    cases = {(call, "cut"): {"cut": True, "times": 1} for call in WHERE if call != "folder with parent"}
    cases["commit", "not made"] = {"cut": True, "status": 500, "times": 1}
    found = suffer(hub, tmp_path, cases)
    for (call, _), seen in found.items():
        again = call in ("preupload", "tree")
        assert (seen["attempts"], seen["error"]) == ((2, None) if again else (1, "ReadError")), (call, seen)
    assert [found[call, "cut"]["commits"] for call in ("preupload", "commit", "folder")] == [1, 1, 1]
    assert found["commit", "not made"]["commits"] == 0
    assert len([1 for name in hub.repos if hub.repo(name).tags]) == 1
    assert not issubclass(httpx2.ReadError, OSError)
    assert all(request.status is None for request in hub.asked("POST", "/commit/")[:1])


def test_silence(hub, tmp_path):
    """The client waits as long as it takes, but for files: there it has time-outs. What was asked is done at once."""
    cases = {("commit", "late"): {"silent": 2.5}, ("tag", "late"): {"silent": 2.5}, ("info", "late"): {"silent": 2.5}}
    cases["head", "late"] = {"silent": 2.5, "times": 1}
    cases["get", "late"] = {"silent": 2.5, "times": 1}
    cases["commit", "late refusal"] = {"silent": 1, "status": 403}
    found = suffer(hub, tmp_path, cases, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    for call in ("commit", "tag", "info"):
        seen = found[call, "late"]
        assert (seen["error"], seen["attempts"]) == (None, 1) and seen["seconds"] >= 2.5, (call, seen)
    for call in ("head", "get"):
        seen = found[call, "late"]
        assert (seen["value"], seen["attempts"]) == (BIG.decode(), 2), (call, seen)
    assert found["commit", "late refusal"]["status"] == 403 and found["commit", "late refusal"]["commits"] == 0


def test_a_client_that_is_killed_in_silence(hub, tmp_path):
    """Its commit is there, and leaving the Hub waits for nobody and ends the connections that are kept."""
    hub.create("alice/x")
    hub.fault("POST", "/commit/", silent=60)
    with start(hub, tmp_path, 'push("alice/x", {"a.txt": "a"})') as child:
        while len(hub.repo("alice/x").commits) == 1 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
    assert hub.repo("alice/x").head.files["a.txt"] == b"a"
    assert [request.status for request in hub.asked("POST", "/commit/")] == [None]
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"{hub.url}/api/models/alice/x").status_code == 200
        begin = time.monotonic()
        hub.__exit__()
        assert time.monotonic() - begin < 5
        with pytest.raises(httpx2.TransportError):
            client.get(f"{hub.url}/api/models/alice/x")


def test_a_client_that_leaves_while_it_sends(hub):
    """Half a request is none."""
    hub.create("alice/x")
    with socket.create_connection(("127.0.0.1", int(hub.url.split(":")[-1]))) as connection:
        head = b"POST /api/models/alice/x/commit/main HTTP/1.1", b"Authorization: Bearer tok-a", b"Content-Length: 999"
        connection.sendall(b"\r\n".join([*head, b"", b'{"key": "header", "value": {"summary": "half"}}']))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert len(hub.repo("alice/x").commits) == 1 and hub.requests == []


def test_truncated_downloads(hub, tmp_path):
    """The client goes on where it was cut off, in steps of the 10 MB that it takes at once."""
    script = """
for name in given:
    path = hf.hf_hub_download("alice/x", name)
    report[name] = [os.path.getsize(path), hashlib.sha256(open(path, "rb").read()).hexdigest()]
"""
    files = {"small": BIG, "large": b"".join(b"%08d" % i for i in range(2_500_000))}  # 20 MB
    hub.create("alice/x", files=files)
    hub.fault("GET", "/small", truncate=30, times=1)
    hub.fault("GET", "/large", truncate=15_000_000, times=1)
    report = ask(hub, tmp_path, f"import hashlib\n{script}", given=list(files))
    for name, content in files.items():
        assert report[name] == [len(content), hashlib.sha256(content).hexdigest()], name
    assert [request.status for request in hub.asked("GET", "/small")] == [200, 200]
    assert [request.status for request in hub.asked("GET", "/large")] == [200, 206]


def test_ranges(hub):
    hub.create("alice/x", files={"big": BIG})
    url = f"{hub.url}/alice/x/resolve/main/big"
    ranges = {"bytes=0-9": (0, 10), "bytes=95-": (95, 100), "bytes=-5": (95, 100), "bytes=90-999": (90, 100)}
    for wanted, (begin, end) in ranges.items():
        answer = httpx2.get(url, headers={"Range": wanted}, trust_env=False)
        assert (answer.status_code, answer.content) == (206, BIG[begin:end]), wanted
        assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/100"
    assert httpx2.get(url, headers={"Range": "bytes=100-"}, trust_env=False).status_code == 416
    head, get = httpx2.head(url, trust_env=False), httpx2.get(url, trust_env=False)
    assert (head.content, get.content) == (b"", BIG)
    for name in ("Content-Length", "ETag", "X-Repo-Commit"):
        assert head.headers[name] == get.headers[name]


def test_faults_come_in_order_and_end(hub):
    hub.create("alice/x")

    def statuses(count):
        return [httpx2.get(f"{hub.url}/api/models/alice/x", trust_env=False).status_code for _ in range(count)]

    with hub.fault("GET", "/alice/x", status=503, times=2) as first, hub.fault("GET", "/alice/", status=429) as second:
        assert statuses(4) == [503, 503, 429, 429]
        assert httpx2.head(f"{hub.url}/alice/x/resolve/main/.gitattributes", trust_env=False).status_code == 200
    assert (first.seen, second.seen) == (2, 2)
    assert statuses(1) == [200]
    assert [request.status for request in hub.requests] == [503, 503, 429, 429, 200, 200]


def test_a_mistake_in_the_server_fails_the_test():
    hub = Hub({"tok-a": ("alice", "write")}).__enter__()
    headers = {"Authorization": "Bearer tok-a"}
    answer = httpx2.post(f"{hub.url}/api/repos/create", content="{", headers=headers, trust_env=False)
    assert answer.status_code == 500
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        hub.__exit__()


def test_environment(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "of somebody else")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "of somebody else")
    environment = hub.environment(tmp_path)
    assert environment["PATH"] == os.environ["PATH"]
    assert "of somebody else" not in environment.values() and "HF_HUB_OFFLINE" not in environment
    assert hub.environment(tmp_path, "tok-a") == environment | {"HF_TOKEN": "tok-a"}
