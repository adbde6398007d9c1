"""The Hub of server.py, used by the real huggingface_hub in child processes.

Publishing relies on what the client does after a failure, so that is tested here too. If a test fails with a new
version of huggingface_hub, check what training/hub/client.py expects of it. The children only report.
"""

import json
import os
import socket
import time

import httpx2
import pytest

from tests.hub.commands import run_code, start
from tests.hub.server import Hub

CARD = "---\nlicense: apache-2.0\npipeline_tag: unconditional-image-generation\n---\nText\n"

PREAMBLE = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
import huggingface_hub as hf
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete

hf.utils.logging.set_verbosity_error()
api, args, report = hf.HfApi(), json.loads(sys.argv[1]), {}

def attempt(call):
    start = time.monotonic()
    try:
        outcome = {"value": call(), "error": None}
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        outcome = {"error": type(error).__name__, "status": status, "message": str(error)}
    return outcome | {"seconds": time.monotonic() - start}

def push(repo, files, **options):
    contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
    operations = [Add(path, content) for path, content in contents.items()]
    return api.create_commit(repo, operations, **{"commit_message": "a push", **options})
"""


def program(script):
    return f"{PREAMBLE}\n{script}\nprint(json.dumps(report, default=str))"


def run_child(hub, home, script, *, args=None, **options):
    """The report of a child process that runs this script."""
    return run_code(hub, home, program(script), json.dumps(args), timeout=600, **options)


# ---- Pushing ---------------------------------------------------------------------------------------------------------


def test_create_and_commit(hub, tmp_path):
    script = """
report["user"] = api.whoami()["name"]
report["url"] = api.create_repo("alice/x")
report["again"] = attempt(lambda: api.create_repo("alice/x"))
report["exist_ok"] = api.create_repo("alice/x", exist_ok=True).repo_id
report["secret"] = api.create_repo("secret", private=True).repo_id
report["foreign"] = attempt(lambda: api.create_repo("bob/x"))

initial = api.repo_info("alice/x").sha
files = {"README.md": args, "unet/config.json": "{}", "unet/weights 1.bin": bytes(range(256)), "empty": ""}
report["first"] = push("alice/x", files, parent_commit=initial, commit_message="first")
report["stale"] = attempt(lambda: push("alice/x", {"late": "?"}, parent_commit=initial))
report["second"] = push("alice/x", {"unet/config.json": "[]"}, parent_commit=report["first"].oid).oid
report["no change"] = push("alice/x", {"unet/config.json": "[]"}).oid
report["delete"] = api.create_commit("alice/x", [Delete("empty")], commit_message="delete").oid
report["missing"] = attempt(lambda: push("alice/missing", {"a": ""}))
report["unknown request"] = attempt(lambda: api.delete_repo("alice/x"))
"""
    report = run_child(hub, tmp_path, script, args=CARD)
    repo = hub.repo("alice/x")
    assert hub.repos == ["alice/secret", "alice/x"]
    assert (report["user"], report["url"], report["exist_ok"]) == ("alice", f"{hub.url}/alice/x", "alice/x")
    assert report["secret"] == "alice/secret" and hub.repo("alice/secret").private and not repo.private

    initial, first, second, delete = repo.commits
    assert list(initial.files) == [".gitattributes"]
    assert report["first"] == f"{hub.url}/alice/x/commit/{first.sha}"
    assert (first.message, first.author) == ("first", "alice")
    weights = {"unet/config.json": b"{}", "unet/weights 1.bin": bytes(range(256)), "empty": b""}
    assert first.files == initial.files | weights | {"README.md": CARD.encode()}
    assert report["second"] == report["no change"] == second.sha
    assert second.files == first.files | {"unet/config.json": b"[]"}
    assert report["delete"] == delete.sha and delete.files.keys() == second.files.keys() - {"empty"}
    assert len({commit.sha for commit in repo.commits}) == 4

    statuses = {"again": 409, "foreign": 403, "stale": 412, "missing": 404, "unknown request": 501}
    assert {name: report[name]["status"] for name in statuses} == statuses
    assert "A commit has happened since" in report["stale"]["message"]
    assert {request.user for request in hub.requests} == {"alice"}


def test_cards(hub, tmp_path):
    script = """
for name, card in args.items():
    report[name] = attempt(lambda: hf.ModelCard(card, ignore_metadata_errors=True).validate())
    report[f"push {name}"] = attempt(lambda: push("alice/x", {"README.md": card, "a.txt": name}))
"""
    broken, licence, tags = (
        "---\nlicense: [mit\n---\n",
        "---\nlicense: Apache 2\n---\n",
        "---\npipeline_tag: [a]\n---\n",
    )
    cards = {"complete": CARD, "plain": "no YAML block\n", "broken": broken, "licence": licence, "tags": tags}
    hub.create("alice/x")
    report = run_child(hub, tmp_path, script, args=cards)
    # the client cannot parse a card with broken YAML, and so does not ask the Hub about it
    errors = {"complete": None, "plain": None, "broken": "ParserError", "licence": "ValueError", "tags": "ValueError"}
    assert {name: report[name]["error"] for name in cards} == errors
    assert {name: report[f"push {name}"]["error"] for name in cards} == errors | {"broken": "ValueError"}
    assert report["licence"]["message"].startswith('"license" must be one of [apache-2.0')
    assert report["tags"]["message"] == '"pipeline_tag" must be a string'
    assert "Invalid YAML" in report["push broken"]["message"]
    assert [commit.files.get("a.txt") for commit in hub.repo("alice/x").commits] == [None, b"complete", b"plain"]
    # a refused card ends a push before anything else is sent
    assert len(hub.requests_of("POST", "/preupload/")) == len(hub.requests_of("POST", "/commit/")) == 2


# ---- Access and loading ----------------------------------------------------------------------------------------------


def test_access(hub, tmp_path):
    script = """
for token in ("tok-a", "tok-r", "tok-b", "tok-?", False):
    api = hf.HfApi(token=token)
    for name in ("public", "secret"):
        repo = f"alice/{name}"
        outcomes = {
            "info": attempt(lambda: api.repo_info(repo).private),
            "auth check": attempt(lambda: api.auth_check(repo, write=True)),
            "push": attempt(lambda: push(repo, {f"of {token}": ""}).oid),
            "tag": attempt(lambda: api.create_tag(repo, tag=f"of {token}")),
            "file": attempt(lambda: api.hf_hub_download(repo, ".gitattributes", cache_dir=f"{args}/{token}")),
        }
        report[f"{token} {name}"] = {
            call: [outcome["status"], outcome["error"]] if outcome["error"] else [200, None]
            for call, outcome in outcomes.items()
        }
    report[f"{token} create"] = attempt(lambda: api.create_repo("alice/new", exist_ok=True))["error"]
    report[f"{token} user"] = attempt(lambda: api.whoami()["name"]).get("value")
"""
    hub.create("alice/public")
    hub.create("alice/secret", private=True)
    report = run_child(hub, tmp_path, script, args=str(tmp_path))
    access = {  # read and write the public one, read and write the private one
        "tok-a": (200, 200, 200, 200),
        "tok-r": (200, 403, 200, 403),
        "tok-b": (200, 403, 404, 404),
        "tok-?": (401, 401, 401, 401),
        "False": (200, 401, 401, 401),
    }
    for token, statuses in access.items():
        for name, (read, write) in (("public", statuses[:2]), ("secret", statuses[2:])):
            expected = {"info": read, "auth check": write, "push": write, "tag": write, "file": read}
            assert {call: status for call, (status, _) in report[f"{token} {name}"].items()} == expected, (token, name)
    for token in ("tok-b", "False"):  # as if it did not exist
        assert {error for _, error in report[f"{token} secret"].values()} == {"RepositoryNotFoundError"}
    assert {error for _, error in report["tok-? public"].values()} == {"HfHubHTTPError"}
    for name in ("alice/public", "alice/secret"):
        assert list(hub.repo(name).head.files) == [".gitattributes", "of tok-a"]
        assert list(hub.repo(name).tags) == ["of tok-a"]
    assert [report[f"{token} user"] for token in access] == ["alice", "alice", "bob", None, None]
    # with exist_ok the client takes 403 for success where the repository can be read
    assert [report[f"{token} create"] for token in access] == [None, None, None, "HfHubHTTPError", None]


def test_revisions_and_the_cache(hub, tmp_path):
    """A file is downloaded once, and again when it has changed; offline, the cache is used."""
    script = """
old = args
def read(**options):
    folder = hf.snapshot_download("alice/x", **options)
    return {path: open(f"{folder}/{path}").read() for path in ("README.md", "unet/config.json")}

if not hf.constants.HF_HUB_OFFLINE:
    api.create_tag("alice/x", tag="v1", revision=old, exist_ok=True)
    api.create_tag("alice/x", tag="v1", exist_ok=True)
    report["tag again"] = attempt(lambda: api.create_tag("alice/x", tag="v1"))
    report["no revision"] = attempt(lambda: api.repo_info("alice/x", revision="v0"))
    refs = api.list_repo_refs("alice/x")
    report["refs"] = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags}
    report["commits"] = [[commit.commit_id, commit.title] for commit in api.list_repo_commits("alice/x")]
    report["sha"] = [api.repo_info("alice/x", revision=name).sha for name in (None, "main", "v1", old)]
    report["files"] = [api.list_repo_files("alice/x", revision=name) for name in ("v1", "main")]
report["missing file"] = attempt(lambda: hf.hf_hub_download("alice/x", "b.txt"))
report["v1"], report["main"] = read(revision="v1"), read()
"""
    hub.create("alice/x")
    old = hub.push("alice/x", {"README.md": b"old", "unet/config.json": b"{}"}, "old")
    new = hub.push("alice/x", {"README.md": b"newer"}, "new")
    initial = hub.repo("alice/x").commits[0]
    report = run_child(hub, tmp_path, script, args=old.sha)
    assert hub.repo("alice/x").tags == {"v1": old.sha}
    assert report["tag again"]["status"] == 409
    assert report["no revision"]["error"] == "RevisionNotFoundError"
    assert report["refs"] == {"refs/heads/main": new.sha, "refs/tags/v1": old.sha}
    assert report["commits"] == [[new.sha, "new"], [old.sha, "old"], [initial.sha, "initial commit"]]
    assert report["sha"] == [new.sha, new.sha, old.sha, old.sha]
    assert report["files"] == [list(old.files), list(new.files)]
    assert report["missing file"]["error"] == "RemoteEntryNotFoundError"
    contents = {"v1": {"README.md": "old", "unet/config.json": "{}"}}
    contents["main"] = {"README.md": "newer", "unet/config.json": "{}"}
    assert report | contents == report
    assert len(hub.requests_of("GET", "/unet/config.json")) == 1  # by its ETag, it is the same file in both

    hub.push("alice/x", {"README.md": b"newest"})
    before = len(hub.requests)
    report = run_child(hub, tmp_path, script, HF_HUB_OFFLINE="1")
    assert report | contents == report and report["missing file"]["error"] == "LocalEntryNotFoundError"
    assert len(hub.requests) == before
    report = run_child(hub, tmp_path, script, args=old.sha)
    assert report["main"]["README.md"] == "newest" and report["v1"] == contents["v1"]


# ---- Failures --------------------------------------------------------------------------------------------------------

CALLS = """
calls = {
    "info": lambda repo: api.repo_info(repo).id,
    "preupload": lambda repo: push(repo, {"a.txt": "a"}),
    "commit": lambda repo: push(repo, {"a.txt": "a"}),
    "tag": lambda repo: api.create_tag(repo, tag="v1"),
    "tree": lambda repo: api.list_repo_files(repo),
}
with ThreadPoolExecutor(100) as pool:
    report = list(pool.map(lambda case: attempt(lambda: calls[case[0]](case[1])), args))
"""
PATHS = {
    "info": ("GET", "/api/models/{}"),
    "preupload": ("POST", "{}/preupload/"),
    "commit": ("POST", "{}/commit/"),
    "tag": ("POST", "{}/tag/"),
    "tree": ("GET", "{}/tree/"),
}


def test_what_the_client_does_after_a_failure(hub, tmp_path):
    """It retries only some requests, waits for an answer without a limit, and never learns of a commit whose answer is
    lost. Each call fails in a repository of its own, so that one child can make all calls at once."""
    cases = {}  # (call, fault): options of the fault, then error, number of requests and commits
    for call in PATHS:
        tries, commits = 3 if call in ("preupload", "tree") else 1, int(call in ("preupload", "commit"))
        for status in (401, 403, 404, 409, 412, 413):
            error = "RepositoryNotFoundError" if status == 404 else "HfHubHTTPError"
            cases[call, status] = {"status": status}, error, 1, 0
        for status in (429, 500, 503):
            error = None if tries > 1 else "HfHubHTTPError"
            cases[call, status] = {"status": status, "times": 2}, error, tries, int(call == "preupload")
        lost = (None, 2) if tries > 1 else ("ReadError", 1)
        cases[call, "lost"] = {"reset": True, "times": 1}, *lost, commits  # carried out, and the answer is lost
        cases[call, "late"] = {"silent": 1.5, "times": 1}, None, 1, commits
    cases["preupload", "wait"] = {"status": 429, "retry_after": 2, "times": 1}, None, 2, 1
    cases["commit", "not made"] = {"reset": True, "status": 500, "times": 1}, "ReadError", 1, 0
    cases["commit", "late refusal"] = {"silent": 1, "status": 403}, "HfHubHTTPError", 1, 0

    repos = {case: f"alice/n{number:03}" for number, case in enumerate(cases)}
    faults = {}
    for (call, label), (fault, *_) in cases.items():
        hub.create(repos[call, label])
        method, path = PATHS[call]
        faults[call, label] = hub.fault(method, path.format(repos[call, label]), **fault)
    outcomes = run_child(hub, tmp_path, CALLS, args=[(case[0], repos[case]) for case in cases])
    for case, outcome in zip(cases, outcomes, strict=True):
        _, error, tries, commits = cases[case]
        requests = hub.requests_of(faults[case].method, faults[case].part)
        repo = hub.repo(repos[case])
        assert (outcome["error"], len(requests), len(repo.commits) - 1) == (error, tries, commits), (case, outcome)
        if error is not None:
            status = {"lost": None, "not made": None, "late refusal": 403}.get(case[1], case[1])
            assert outcome["status"] == requests[0].status == status, (case, outcome)
        assert outcome["seconds"] >= {"late": 1.5, "wait": 2, "late refusal": 1}.get(case[1], 0), (case, outcome)
        assert len(repo.tags) == (case in {("tag", "lost"), ("tag", "late")})
    assert not issubclass(httpx2.ReadError, OSError)


def test_nothing_before_the_first_file_is_retried(hub, tmp_path):
    """An answer that is not JSON makes a card that nobody has checked look invalid: JSONDecodeError is a ValueError."""
    script = """
for status in args:
    report[f"{status} whoami"] = attempt(lambda: api.whoami())
    report[f"{status} create"] = attempt(lambda: api.create_repo("alice/x", exist_ok=True))
    report[f"{status} card"] = attempt(lambda: push("alice/x", {"README.md": "Text"}))
"""
    hub.create("alice/x")
    statuses = (429, 500, 503)
    for status in statuses:
        for method, part in (("GET", "whoami-v2"), ("POST", "/repos/create"), ("POST", "/validate-yaml")):
            hub.fault(method, part, status=status, times=1)
    report = run_child(hub, tmp_path, script, args=statuses)
    assert len(hub.requests) == len(report) == 9
    html = report.pop("503 card")
    assert (html["error"], html["status"]) == ("JSONDecodeError", None)
    assert issubclass(json.JSONDecodeError, ValueError)
    for name, outcome in report.items():
        assert (outcome["error"], str(outcome["status"])) == ("HfHubHTTPError", name[:3]), (name, outcome)


def test_a_client_killed_while_it_waits(hub, tmp_path):
    """Its commit is made. Leaving the Hub waits for no client and closes the connections that are kept open."""
    hub.create("alice/x")
    hub.fault("POST", "/commit/", silent=60)
    with start(hub, tmp_path, ["-c", program('push("alice/x", {"a.txt": "a"})'), "null"]) as child:
        while len(hub.repo("alice/x").commits) == 1 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
    assert hub.repo("alice/x").head.files["a.txt"] == b"a"
    assert [request.status for request in hub.requests_of("POST", "/commit/")] == [None]
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"{hub.url}/api/models/alice/x").status_code == 200
        start_time = time.monotonic()
        hub.__exit__()
        assert time.monotonic() - start_time < 5
        with pytest.raises(httpx2.TransportError):
            client.get(f"{hub.url}/api/models/alice/x")


def test_a_client_killed_while_it_sends(hub):
    """Half a request is ignored."""
    hub.create("alice/x")
    with socket.create_connection(("127.0.0.1", int(hub.url.split(":")[-1]))) as connection:
        head = b"POST /api/models/alice/x/commit/main HTTP/1.1", b"Authorization: Bearer tok-a", b"Content-Length: 999"
        connection.sendall(b"\r\n".join([*head, b"", b'{"key": "header", "value": {"summary": "half"}}']))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert len(hub.repo("alice/x").commits) == 1 and hub.requests == []


# ---- The test interface ----------------------------------------------------------------------------------------------


def test_faults_apply_in_order_and_end(hub):
    hub.create("alice/x")

    def statuses(count):
        return [httpx2.get(f"{hub.url}/api/models/alice/x", trust_env=False).status_code for _ in range(count)]

    with hub.fault("GET", "/alice/x", status=503, times=2) as first, hub.fault("GET", "/alice/", status=429) as second:
        assert statuses(4) == [503, 503, 429, 429]
        head = httpx2.head(f"{hub.url}/alice/x/resolve/main/.gitattributes", trust_env=False)
        assert head.status_code == 200 and head.content == b"" and int(head.headers["Content-Length"]) > 0
    assert (first.seen, second.seen) == (2, 2)
    assert statuses(1) == [200]
    assert [request.status for request in hub.requests] == [503, 503, 429, 429, 200, 200]


def test_a_bug_in_the_server_fails_the_test():
    hub = Hub({"tok-a": ("alice", "write")}).__enter__()
    headers = {"Authorization": "Bearer tok-a"}
    answer = httpx2.post(f"{hub.url}/api/repos/create", content="{", headers=headers, trust_env=False)
    assert answer.status_code == 500
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        hub.__exit__()


def test_the_environment_of_a_client_knows_this_hub_only(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "of somebody else")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "of somebody else")
    environment = hub.environment(tmp_path)
    assert environment["PATH"] == os.environ["PATH"]
    assert "of somebody else" not in environment.values() and "HF_HUB_OFFLINE" not in environment
    assert hub.environment(tmp_path, "tok-a") == environment | {"HF_TOKEN": "tok-a"}
