"""What the Hub of server.py stores, and how it answers the requests of huggingface_hub."""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # of a new repository
LICENSES = set("apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 gpl-3.0 openrail other unknown".split())
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)

# The Hub's own words. Requests that our clients never send are refused in other words.
NO_TOKEN = "Invalid username or password."
REASONS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you must use a write token to upload to a repository.",
    404: "Repository not found",
    409: "Conflict: another operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    413: "Payload Too Large",
    429: "Too Many Requests",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


class Refusal(Exception):
    """The answer to a refused request. The client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None, **more):
        super().__init__(message)
        self.answer = as_json({"error": message, **more}, status)
        self.answer.headers |= {"X-Error-Message": message, **(headers or {})}
        if code:
            self.answer.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of the repository after it."""

    sha: str  # 40 hexadecimal digits
    message: str
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
        return self.id.removeprefix("spaces/").split("/")[0]

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
    """git's hash of a file with this content, which the client compares with its own."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the YAML block at the beginning of README.md.

    Of the Hub's rules: valid YAML, and the values of license and pipeline_tag.
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
    licenses = fields.get("license", [])
    licenses = licenses if isinstance(licenses, list) else [licenses]
    if not all(isinstance(name, str) and name in LICENSES for name in licenses):
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}, array]')
    if not isinstance(fields.get("pipeline_tag", ""), str):
        errors.append('"pipeline_tag" must be a string')
    return errors, []


class Repositories:
    """Repositories of models, "user/name", and Spaces, "spaces/user/name", with users who own them.

    Args:
        tokens: token: (user, role), role "read" or "write". A user owns the repositories "user/...".
    """

    url = ""  # of the server

    def __init__(self, tokens: Mapping[str, tuple[str, str]]):
        assert all(role in ("read", "write") for _, role in tokens.values()), tokens
        self.tokens = dict(tokens)
        self._repos: dict[str, Repo] = {}
        self._serial = itertools.count()
        self._lock = threading.RLock()

    # -- for tests -----------------------------------------------------------------------------------------------------

    def repo(self, repo_id: str) -> Repo:
        with self._lock:
            return self._repos[repo_id]

    @property
    def repos(self) -> list[str]:
        with self._lock:
            return sorted(self._repos)

    def create(self, repo_id: str, *, private: bool = False, files: Mapping[str, bytes] | None = None) -> Repo:
        """A repository that exists already, with a second commit if there are files."""
        with self._lock:
            assert repo_id not in self._repos, repo_id
            repo = self._repos[repo_id] = Repo(repo_id, private)
            self._add_commit(repo, repo.owner, "initial commit", INITIAL_FILES)
            if files:
                self.push(repo_id, files)
            return repo

    def push(self, repo_id: str, files: Mapping[str, bytes], message: str = "pushed by somebody else") -> Commit:
        """Commit these files as somebody else."""
        with self._lock:
            repo = self._repos[repo_id]
            return self._add_commit(repo, repo.owner, message, {**repo.head.files, **files})

    # -- requests ------------------------------------------------------------------------------------------------------

    def user_of(self, headers: Mapping[str, str]) -> str | None:
        return self.tokens.get(_token(headers), (None, None))[0]

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The answer to a request. A request that this server does not know gets 501."""
        try:
            with self._lock:
                return self._route(method, target, headers, body)
        except Refusal as refusal:
            return refusal.answer

    def _route(self, method, target, headers, body) -> Answer:
        token = _token(headers)
        if token and token not in self.tokens:
            raise Refusal(401, REASONS[401])
        caller = self.tokens.get(token, (None, None))
        url = urlsplit(target)
        query = parse_qs(url.query)
        # a revision or path is quoted into one part, so parts are unquoted only after the split
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "spaces":  # answered as a model whose owner is called "spaces/user"
            parts[:2] = [f"spaces/{parts[1]}"]
        elif parts[:2] == ["api", "spaces"]:
            parts[1:3] = ["models", f"spaces/{parts[2]}"]
        match method, parts:
            case "GET", ["api", "whoami-v2"]:
                return self._whoami(caller)
            case "POST", ["api", "repos", "create"]:
                return self._create(caller, json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"], headers.get("Accept", ""))
            case "GET", ["api", "models", owner, name]:
                return self._info(self._readable(caller, owner, name), "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                return self._info(self._readable(caller, owner, name), revision)
            case "GET", ["api", "models", owner, name, "auth-check", "write"]:
                self._writable(caller, owner, name)
                return Answer()
            case "GET", ["api", "models", owner, name, "refs"]:
                return self._refs(self._readable(caller, owner, name))
            case "GET", ["api", "models", owner, name, "commits", revision]:
                return self._commits(self._readable(caller, owner, name), revision)
            case "GET", ["api", "models", owner, name, "tree", revision]:
                return self._tree(self._readable(caller, owner, name), revision)
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                return self._preupload(self._writable(caller, owner, name), revision, json.loads(body))
            case "POST", ["api", "models", owner, name, "commit", "main"] if "create_pr" not in query:
                return self._commit(self._writable(caller, owner, name), caller[0], body)
            case "POST", ["api", "models", owner, name, "tag", revision]:
                return self._tag(self._writable(caller, owner, name), revision, json.loads(body))
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self._file(self._readable(caller, owner, name), revision, "/".join(path))
        raise Refusal(501, f"this server does not know {method} {target}")

    # -- access --------------------------------------------------------------------------------------------------------

    def _readable(self, caller, owner: str, name: str) -> Repo:
        """The repository, if the caller may read it; otherwise the same answer as if it did not exist."""
        repo = self._repos.get(f"{owner}/{name}")
        if repo is not None and (not repo.private or repo.owner == caller[0]):
            return repo
        if caller[0] is None:
            raise Refusal(401, NO_TOKEN, code="RepoNotFound")
        raise Refusal(404, REASONS[404], code="RepoNotFound")

    def _writable(self, caller, owner: str, name: str) -> Repo:
        repo = self._readable(caller, owner, name)
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        if user != repo.owner:
            raise Refusal(403, "Authorization error.")
        if role != "write":
            raise Refusal(403, REASONS[403])
        return repo

    def _whoami(self, caller) -> Answer:
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        auth = {"type": "access_token", "accessToken": {"displayName": "a token for tests", "role": role}}
        return as_json({"type": "user", "name": user, "orgs": [], "auth": auth})

    def _create(self, caller, request: dict) -> Answer:
        user, role = caller
        if user is None:
            raise Refusal(401, NO_TOKEN)
        kind = request.get("type") or "model"
        if kind not in ("model", "space"):
            raise Refusal(501, f"this server stores models and Spaces only, not {kind}")
        if kind == "space" and request.get("sdk") != "gradio":
            raise Refusal(400, "a Space needs an sdk")
        owner = request.get("organization") or user
        if (user, role) != (owner, "write"):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{'spaces/' * (kind == 'space')}{owner}/{request['name']}"
        created = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:  # with exist_ok the client continues with the url from the refusal
            raise Refusal(409, f"You already created this {kind} repo", **created)
        self.create(repo_id, private=request.get("visibility") == "private")
        return as_json(created)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _info(self, repo: Repo, revision: str) -> Answer:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.sha, "private": repo.private}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        info |= {"createdAt": _date(repo.commits[0].time), "lastModified": _date(commit.time)}
        return as_json(info)

    def _refs(self, repo: Repo) -> Answer:
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in repo.tags.items()]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}]
        return as_json({"branches": branches, "tags": tags, "converts": []})

    def _commits(self, repo: Repo, revision: str) -> Answer:
        number = repo.commits.index(repo.at(revision)) + 1
        return as_json(
            [
                {
                    "id": commit.sha,
                    "authors": [{"user": commit.author}],
                    "date": _date(commit.time),
                    "title": commit.message,
                    "message": "",
                }
                for commit in reversed(repo.commits[:number])
            ]
        )

    def _tree(self, repo: Repo, revision: str) -> Answer:
        """All files, without the folders that the Hub lists as well: list_repo_files drops them."""
        files = repo.at(revision).files
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": git_oid(files[path])} for path in files
        ]
        return as_json(entries)

    def _file(self, repo: Repo, revision: str, path: str) -> Answer:
        commit = repo.at(revision)
        if path not in commit.files:  # with the sha, the client remembers that this commit has no such file
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": commit.sha})
        content = commit.files[path]
        return Answer(200, content, {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": commit.sha})

    # -- writing -------------------------------------------------------------------------------------------------------

    def _validate(self, card: str, accepted: str) -> Answer:
        errors, warnings = check_card(card)
        status = 400 if errors else 200
        if accepted == "text/plain":  # ModelCard.validate shows the answer as it is, create_commit parses it
            return Answer(status, "\n".join(errors or warnings).encode(), {"Content-Type": "text/plain"})
        return as_json(
            {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]},
            status,
        )

    def _preupload(self, repo: Repo, revision: str, request: dict) -> Answer:
        files = repo.at(revision).files
        answers = []
        for path in (file["path"] for file in request["files"]):
            answer = {"path": path, "uploadMode": "regular", "shouldIgnore": False}
            if path in files:  # if it equals the client's hash, the client omits the file from its commit
                answer["oid"] = git_oid(files[path])
            answers.append(answer)
        return as_json({"files": answers})

    def _commit(self, repo: Repo, user: str, body: bytes) -> Answer:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "the first line must be a header with a summary")
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.head.sha:
            raise Refusal(412, REASONS[412])
        files = dict(repo.head.files)
        for operation in operations:
            _apply(files, operation["key"], operation["value"])
        errors, _ = check_card(files.get("README.md", b"").decode(errors="replace"))
        if errors:
            raise Refusal(400, "\n".join(["Invalid metadata in README.md.", *errors]).replace("\n", " "))
        commit = self._add_commit(repo, user, header["value"]["summary"], files)
        url = f"{self.url}/{repo.id}/commit/{commit.sha}"
        return as_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _add_commit(self, repo: Repo, user: str, message: str, files: Mapping[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{next(self._serial)} {repo.id} {message}".encode()).hexdigest()
        commit = Commit(sha, message, user, datetime.now(UTC), dict(sorted(files.items())))
        repo.commits.append(commit)
        return commit

    def _tag(self, repo: Repo, revision: str, request: dict) -> Answer:
        commit = repo.at(revision)
        if request["tag"] in repo.tags:
            raise Refusal(409, "Tag reference exists already")
        repo.tags[request["tag"]] = commit.sha
        return Answer()


def _token(headers: Mapping[str, str]) -> str:
    return headers.get("Authorization", "").removeprefix("Bearer ")


def _date(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03}Z"


def _apply(files: dict[str, bytes], key: str, value: dict):
    """Apply one operation of a commit."""
    path = value["path"]
    if key == "file":
        assert value["encoding"] == "base64"
        files[path] = base64.b64decode(value["content"])
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        del files[path]
    else:  # lfsFile, deletedFolder
        raise Refusal(501, f"this server does not apply {key}: {path}")
