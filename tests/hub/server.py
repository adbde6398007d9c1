"""A Hub for tests: a server on 127.0.0.1 that huggingface_hub and diffusers push to and load from, unmodified.

Clients run in processes of their own, because huggingface_hub reads HF_ENDPOINT once, when it is imported:

    with Hub(tokens={"tok-a": ("alice", "write")}) as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment(folder, token="tok-a"))
        assert list(hub.repo("alice/x").head.files) == [".gitattributes", "README.md"]

It answers what the client of huggingface_hub 2.4 asks while it publishes and loads a model. It knows models only, users
but no organizations, one branch (main), and no pull requests; it takes every file as "regular", so no LFS and no Xet.
A request outside that gets 501 and its name. Everything is kept in memory and gone with the server.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What the Hub puts into a new repository, so that its first commit exists before anybody has pushed.
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}

# The list in the Hub's own answer to a licence that it does not know, May 2026; without its last entry, "array".
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


# ---- What is stored --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commit:
    """A commit with all files of the repository as they were after it."""

    sha: str  # 40 hexadecimal digits
    message: str
    description: str
    author: str
    time: datetime
    files: dict[str, bytes]


@dataclass
class Repo:
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of main, oldest first
    tags: dict[str, str] = field(default_factory=dict)  # name: sha

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a sha."""
        sha = self.head.sha if revision == "main" else self.tags.get(revision, revision)
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def git_oid(content: bytes) -> str:
    """The name that git gives to a file of this content; the client compares it with its own."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- What is asked and answered --------------------------------------------------------------------------------------


@dataclass
class Request:
    """A line of the log. `status` is None until the answer leaves, and stays None if the connection was cut."""

    method: str
    path: str  # with the query, quoted as it came
    user: str | None  # whose token came with it
    time: float  # time.monotonic() at its arrival
    status: int | None = None


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


class Refusal(Exception):
    """The answer to a request that is not granted. `code` is what the client chooses its exception by."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None, **more):
        super().__init__(message)
        self.answer = as_json({"error": message, **more}, status)
        self.answer.headers |= {"X-Error-Message": message, **(headers or {})}
        if code:
            self.answer.headers["X-Error-Code"] = code


NO_TOKEN = "Invalid username or password."
# How the Hub words its other refusals; what is wrong with a request that no client of ours sends is said in our words.
WORDS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you must use a write token to upload to a repository.",
    404: "Repository not found",
    409: "Conflict: another operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    413: "Payload Too Large",
    429: "Too Many Requests",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}


@dataclass(eq=False)
class Fault:
    """What goes wrong with the requests that it matches, until `times` of them came or its with block ends.

    The options can be combined: with status and cut, nothing is done and nothing answered.
    """

    hub: "Hub"
    method: str
    part: str  # of the path, with the query
    status: int | None = None  # answer this, and do not do what is asked
    retry_after: int = 0  # seconds, sent with 429
    silent: float = 0.0  # seconds that the answer comes late; what is asked is done at once
    cut: bool = False  # reset the connection instead of answering
    truncate: int | None = None  # bytes of the body that are sent before the connection is closed
    times: int | None = None  # None is for ever
    seen: int = 0  # requests that met it

    def answer(self) -> Answer:
        if self.status not in WORDS:  # it is the gateway that answers 502, 503 and 504, in HTML
            page = f"<html><body><h1>{self.status} {HTTPStatus(self.status).phrase}</h1></body></html>"
            return Answer(self.status, page.encode(), {"Content-Type": "text/html"})
        code = "RepoNotFound" if self.status == 404 else ""
        headers = {"Retry-After": str(self.retry_after)} if self.status == 429 else {}
        return Refusal(self.status, WORDS[self.status], code=code, headers=headers).answer

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.hub.end_fault(self)


# ---- Model cards -----------------------------------------------------------------------------------------------------


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the block of YAML that README.md begins with.

    Of the Hub's rules: that it is YAML, and what license and pipeline_tag may be. Not those about the other fields.
    """
    match = FRONT_MATTER.match(text)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if fields is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(fields, dict):
        return ["the YAML metadata must be a mapping"], []
    errors = []
    names = fields.get("license", [])
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name in LICENSES for name in names):
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}, array]')
    if not isinstance(fields.get("pipeline_tag", ""), str):
        errors.append('"pipeline_tag" must be a string')
    return errors, []


# ---- The server ------------------------------------------------------------------------------------------------------


class Hub:
    """A running Hub. Leaving the with block ends it and every connection to it.

    Args:
        tokens: token: (user, role), role "read" or "write". A user owns the repositories "user/...", nobody others'.
    """

    def __init__(self, tokens: Mapping[str, tuple[str, str]]):
        assert all(role in ("read", "write") for _, role in tokens.values()), tokens
        self.tokens = dict(tokens)
        self._repos: dict[str, Repo] = {}
        self._requests: list[Request] = []
        self._faults: list[Fault] = []
        self._broken: list[str] = []  # tracebacks of mistakes in this file
        self._serial = itertools.count()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        if self._broken:  # the client took these for answers of 500
            raise RuntimeError("the server of the test is broken:\n" + "\n".join(self._broken))

    # -- for tests -----------------------------------------------------------------------------------------------------

    def repo(self, repo_id: str) -> Repo:
        with self._lock:
            return self._repos[repo_id]

    @property
    def repos(self) -> list[str]:
        with self._lock:
            return sorted(self._repos)

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests of this method with this in their path."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def create(self, repo_id: str, *, private: bool = False, files: Mapping[str, bytes] | None = None) -> Repo:
        """A repository that was there before, with a second commit if it is given files."""
        with self._lock:
            assert repo_id not in self._repos, repo_id
            repo = self._repos[repo_id] = Repo(repo_id, private)
            self._commit(repo, repo.owner, "initial commit", "", FIRST_FILES)
            if files:
                self.push(repo_id, files)
            return repo

    def push(self, repo_id: str, files: Mapping[str, bytes], message: str = "pushed by another") -> Commit:
        """A commit that adds these files, as if somebody else had made it."""
        with self._lock:
            repo = self._repos[repo_id]
            return self._commit(repo, repo.owner, message, "", {**repo.head.files, **files})

    def fault(self, method: str, part: str, **options) -> Fault:
        """Let something go wrong with the next requests of this method that have this in their path.

        The options are fields of Fault. Of several faults that match a request, the oldest has it.
        """
        fault = Fault(self, method, part, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def end_fault(self, fault: Fault):
        with self._lock:
            if fault in self._faults:
                self._faults.remove(fault)

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """All variables for a process that is to know no other Hub than this and to keep its files under `home`."""
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if token is not None:
            ours["HF_TOKEN"] = token
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours

    # -- for the handler of a connection -------------------------------------------------------------------------------

    def note(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[Request, Fault | None]:
        """Enter a request into the log, and choose the fault that it meets."""
        user, _ = self.tokens.get(_token(headers), (None, None))
        request = Request(method, path, user, time.monotonic())
        with self._lock:
            self._requests.append(request)
            for fault in self._faults:
                if fault.method == method and fault.part in path:
                    fault.seen += 1
                    if fault.seen == fault.times:
                        self._faults.remove(fault)
                    return request, fault
        return request, None

    def wait(self, seconds: float):
        self._closing.wait(seconds)

    def broke(self):
        with self._lock:
            self._broken.append(traceback.format_exc())

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        try:
            with self._lock:
                return self._answer(method, target, headers, body)
        except Refusal as refusal:
            return refusal.answer
        except Exception:
            self.broke()
            return as_json({"error": "the server of the test is broken"}, 500)

    def _answer(self, method, target, headers, body) -> Answer:
        token = _token(headers)
        if token and token not in self.tokens:
            raise Refusal(401, WORDS[401])
        caller = self.tokens.get(token, (None, None))
        url = urlsplit(target)
        query = parse_qs(url.query)
        if "create_pr" in query:
            raise Refusal(501, "this server knows no pull requests")

        # a revision or path comes quoted, as one part; so parts are unquoted only after the split
        match method, [unquote(part) for part in url.path.strip("/").split("/")]:
            case "GET", ["api", "whoami-v2"]:
                return self._whoami(caller)
            case "POST", ["api", "repos", "create"]:
                return self._create(caller, json.loads(body))
            case "DELETE", ["api", "repos", "delete"]:
                return self._delete(caller, json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"], headers.get("Accept", ""))
            case "GET", ["api", "models", owner, name]:
                return self._info(self._seen(caller, owner, name), "main", query)
            case "GET", ["api", "models", owner, name, "revision", revision]:
                return self._info(self._seen(caller, owner, name), revision, query)
            case "GET", ["api", "models", owner, name, "auth-check"]:
                self._seen(caller, owner, name)
                return Answer()
            case "GET", ["api", "models", owner, name, "auth-check", "write"]:
                self._writable(caller, owner, name)
                return Answer()
            case "GET", ["api", "models", owner, name, "refs"]:
                return self._refs(self._seen(caller, owner, name))
            case "GET", ["api", "models", owner, name, "commits", revision]:
                return self._commits(self._seen(caller, owner, name), revision)
            case "GET", ["api", "models", owner, name, "tree", revision, *folder]:
                return self._tree(self._seen(caller, owner, name), revision, "/".join(folder), query)
            case "POST", ["api", "models", owner, name, "paths-info", revision]:
                return self._paths_info(self._seen(caller, owner, name), revision, parse_qs(body.decode()))
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                return self._preupload(self._writable(caller, owner, name), revision, json.loads(body))
            case "POST", ["api", "models", owner, name, "commit", branch]:
                return self._push(self._writable(caller, owner, name), caller[0], branch, body)
            case "POST", ["api", "models", owner, name, "tag", revision]:
                return self._tag(self._writable(caller, owner, name), revision, json.loads(body))
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self._file(self._seen(caller, owner, name), revision, "/".join(path), headers.get("Range"))
        raise Refusal(501, f"this server does not know {method} {target}")

    # -- users and repositories ----------------------------------------------------------------------------------------

    def _seen(self, caller, owner: str, name: str) -> Repo:
        """The repository, if the caller may read it; else the same answer as if it did not exist."""
        repo = self._repos.get(f"{owner}/{name}")
        if repo is not None and (not repo.private or repo.owner == caller[0]):
            return repo
        if caller[0] is None:
            raise Refusal(401, NO_TOKEN, code="RepoNotFound")
        raise Refusal(404, WORDS[404], code="RepoNotFound")

    def _writable(self, caller, owner: str, name: str) -> Repo:
        repo = self._seen(caller, owner, name)
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        if user != repo.owner:
            raise Refusal(403, "Authorization error.")
        if role != "write":
            raise Refusal(403, WORDS[403])
        return repo

    def _whoami(self, caller) -> Answer:
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        auth = {"type": "access_token", "accessToken": {"displayName": "a token of the test", "role": role}}
        return as_json({"type": "user", "name": user, "orgs": [], "auth": auth})

    def _named(self, caller, wish: dict) -> str:
        """The id that a request means, which only its owner may create or delete."""
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        if wish.get("type") not in (None, "model"):
            raise Refusal(501, f"this server knows models only, not {wish['type']}")
        owner = wish.get("organization") or user
        if (user, role) != (owner, "write"):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        return f"{owner}/{wish['name']}"

    def _create(self, caller, wish: dict) -> Answer:
        repo_id = self._named(caller, wish)
        where = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:  # with exist_ok the client goes on, and takes the url out of the refusal
            raise Refusal(409, "You already created this model repo", **where)
        self.create(repo_id, private=wish.get("visibility") == "private")
        return as_json(where)

    def _delete(self, caller, wish: dict) -> Answer:
        repo_id = self._named(caller, wish)
        if self._repos.pop(repo_id, None) is None:
            raise Refusal(404, WORDS[404], code="RepoNotFound")
        return Answer()

    # -- reading -------------------------------------------------------------------------------------------------------

    def _info(self, repo: Repo, revision: str, query) -> Answer:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in query:
            for sibling in siblings:
                content = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(content), "blobId": git_oid(content)}
        info = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.sha, "private": repo.private}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        info |= {"createdAt": _date(repo.commits[0].time), "lastModified": _date(commit.time)}
        return as_json(info)

    def _refs(self, repo: Repo) -> Answer:
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in repo.tags.items()]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}]
        return as_json({"branches": branches, "tags": tags, "converts": []})

    def _commits(self, repo: Repo, revision: str) -> Answer:
        until = repo.commits.index(repo.at(revision)) + 1
        return as_json(
            [
                {
                    "id": commit.sha,
                    "authors": [{"user": commit.author}],
                    "date": _date(commit.time),
                    "title": commit.message,
                    "message": commit.description,
                }
                for commit in reversed(repo.commits[:until])
            ]
        )

    def _tree(self, repo: Repo, revision: str, folder: str, query) -> Answer:
        files = repo.at(revision).files
        inside = f"{folder}/" if folder else ""
        if folder and not any(path.startswith(inside) for path in files):
            raise Refusal(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        paths = [path for path in [*_folders(files), *files] if path.startswith(inside)]
        return as_json([_entry(files, path) for path in sorted(paths) if deep or "/" not in path[len(inside) :]])

    def _paths_info(self, repo: Repo, revision: str, query) -> Answer:
        files = repo.at(revision).files
        known = {*files, *_folders(files)}
        return as_json([_entry(files, path) for path in query.get("paths", []) if path in known])

    def _file(self, repo: Repo, revision: str, path: str, wanted: str | None) -> Answer:
        commit = repo.at(revision)
        if path not in commit.files:  # the sha lets the client remember that this commit has no such file
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": commit.sha})
        content = commit.files[path]
        headers = {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if wanted is None:
            return Answer(200, content, headers)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
        if not first:  # "-5" is the last five bytes
            first, last = max(0, len(content) - int(last)), ""
        begin, end = int(first), min(int(last or len(content)), len(content) - 1)
        if begin > end:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        return Answer(206, content[begin : end + 1], headers | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"})

    # -- writing -------------------------------------------------------------------------------------------------------

    def _validate(self, card: str, accepted: str) -> Answer:
        errors, warnings = check_card(card)
        status = 400 if errors else 200
        if accepted == "text/plain":  # ModelCard.validate shows the answer as it is, create_commit takes it apart
            return Answer(status, "\n".join(errors or warnings).encode(), {"Content-Type": "text/plain"})
        return as_json(
            {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]},
            status,
        )

    def _preupload(self, repo: Repo, revision: str, wish: dict) -> Answer:
        files = repo.at(revision).files
        answers = []
        for path in (file["path"] for file in wish["files"]):
            answer = {"path": path, "uploadMode": "regular", "shouldIgnore": False}
            if path in files:  # if it is the client's own, the client leaves the file out of its commit
                answer["oid"] = git_oid(files[path])
            answers.append(answer)
        return as_json({"files": answers})

    def _push(self, repo: Repo, user: str, branch: str, body: bytes) -> Answer:
        if branch != "main":
            raise Refusal(404, f"Invalid rev id: {branch}", code="RevisionNotFound")
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "the first line must be a header with a summary")
        parent = header["value"].get("parentCommit")
        if parent is not None and not repo.head.sha.startswith(parent.lower()):  # it may be shortened
            raise Refusal(412, WORDS[412])
        files = dict(repo.head.files)
        for operation in operations:
            _apply(files, operation["key"], operation["value"])
        errors, _ = check_card(files.get("README.md", b"").decode(errors="replace"))
        if errors:
            raise Refusal(400, "\n".join(["Invalid metadata in README.md.", *errors]).replace("\n", " "))
        header = header["value"]
        commit = self._commit(repo, user, header["summary"], header.get("description", ""), files)
        url = f"{self.url}/{repo.id}/commit/{commit.sha}"
        return as_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _commit(self, repo: Repo, user: str, message: str, description: str, files: Mapping[str, bytes]) -> Commit:
        # the number makes it another commit, even if a repository is deleted and made again with the same files
        sha = hashlib.sha1(f"{next(self._serial)} {repo.id} {message}".encode()).hexdigest()
        commit = Commit(sha, message, description, user, datetime.now(UTC), dict(sorted(files.items())))
        repo.commits.append(commit)
        return commit

    def _tag(self, repo: Repo, revision: str, wish: dict) -> Answer:
        commit = repo.at(revision)
        if wish["tag"] in repo.tags:
            raise Refusal(409, "Tag reference exists already")
        repo.tags[wish["tag"]] = commit.sha
        return Answer()


def _token(headers: Mapping[str, str]) -> str:
    return headers.get("Authorization", "").removeprefix("Bearer ")


def _date(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03}Z"


def _folders(files: Iterable[str]) -> set[str]:
    parts = (path.split("/") for path in files)
    return {"/".join(names[:depth]) for names in parts for depth in range(1, len(names))}


def _entry(files: Mapping[str, bytes], path: str) -> dict:
    """What the Hub says of a path in a list; a folder's oid is not that of git, nobody compares it."""
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": git_oid(files[path])}
    return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}


def _apply(files: dict[str, bytes], key: str, value: dict):
    """Carry out one line of a commit."""
    path = value["path"].rstrip("/")
    if key == "file":
        assert value["encoding"] == "base64"
        files[path] = base64.b64decode(value["content"])
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(f"{path}/")]
        if not inside:
            raise Refusal(404, f"A folder with this name doesn't exist: {path}", code="EntryNotFound")
        for name in inside:
            del files[name]
    else:  # lfsFile: nobody was told to send one
        raise Refusal(400, f"this server takes no {key}: {path}")


# ---- Connections -----------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with the usual 5, some of many connections at once waited for seconds

    def __init__(self, hub: Hub):
        self.hub = hub
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self):
        """End the connections that clients keep, which would be answered even after the server was closed."""
        for request in list(self.open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed or gave up
            self.hub.broke()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for an ACK
    server: _Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server.hub
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client was killed while it sent this
            self.close_connection = True
            return
        request, fault = hub.note(self.command, self.path, self.headers)
        refuse = fault and fault.status
        answer = fault.answer() if refuse else hub.answer(self.command, self.path, self.headers, body)
        if fault and fault.silent:
            hub.wait(fault.silent)
        if fault and fault.cut:
            self.reset()
            return
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.truncate is not None:
            self.close_connection = True
            answer.body = answer.body[: fault.truncate]
        self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def reset(self):
        """End the connection in a way that the client notices as a reset, not as an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()
