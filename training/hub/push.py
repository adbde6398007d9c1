"""THE PUSH: one commit with a tag, on top of the commit whose files were checked.

publish: check_account -> find_repo -> stage -> check_loading -> create_repo, if there is none -> push
and after the model, if it has a Space: find_repo -> create_repo, if there is none -> push
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.hub.check import check_loading, describe_differences
from training.hub.client import HubClient, HubError
from training.hub.files import CARD, MODEL, SPACE, RepoKind, digest, list_files
from training.hub.space import stage_space
from training.hub.stage import check_private_text, stage
from training.messages import some
from training.run.record import RunRecord

INITIAL_FILES = {".gitattributes", CARD, "LICENSE"}  # what the Hub may put into a new repository


def publish(
    run: str | Path,
    repo_id: str,
    *,
    space: str | None = None,
    private: bool = False,
    revision_tag: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    seconds: float = 600,
    log: Callable[[str], object] = print,
) -> str:
    """Publish a run: stage it, check that it loads, push it as one commit with a tag; then its demo, likewise.

    Args:
        run, revision_tag, license, fp16: as for `stage`.
        repo_id: "user/name", or "name" for the user of the token; created if it does not exist.
        space: likewise, of the Space with its demo; None: there is none. It is private if the model is.
        private: create it as private; an error if it exists and is public.
        seconds: deadline for all calls of the Hub together.
    Returns:
        The hash of the commit.
    Raises:
        HubError: the Hub refused or failed; if that was with the Space, the message says that the model is published.
        LoadingError: the folder does not load, or gives other images in one of the three ways. Nothing was sent.
        ValueError, OSError: the run is incomplete, or an argument is invalid.
    """
    hub = HubClient(seconds)
    repo_id = check_account(hub, repo_id, license=license)
    repo = find_repo(hub, MODEL, repo_id, private=private)
    if space is not None:
        space = check_account(hub, space, kind=SPACE)
        find_repo(hub, SPACE, space, private=private)  # an error before anything is sent
    with tempfile.TemporaryDirectory() as scratch:
        folder, demo = Path(scratch, "model"), Path(scratch, "space")
        tag = stage(run, folder, repo_id=repo_id, revision_tag=revision_tag, license=license, fp16=fp16, log=log)
        record = RunRecord.load(Path(run) / "pipeline")
        assert record is not None  # staging needs it too
        name = Path(run).resolve().name
        title = f"{name}, step {record.weights_step} ({digest(folder)[:12]})"  # identifies the contents
        if repo is not None and revision_tag is not None:
            check_tag(repo, revision_tag, title)
        if space is not None:
            stage_space(folder, demo, space_id=space, repo_id=repo_id, tag=tag)
            check_private_text(demo, Path(run))
        log(describe_differences(check_loading(folder)))
        if repo is None:  # only now: nothing is created for a run that cannot be published
            repo = read_repo_state(hub, MODEL, create_repo(hub, MODEL, repo_id, private=private))
        commit = push(hub, folder, repo, tag=tag, title=title)
        log(
            f"{'Published' if commit != repo.commit else 'Unchanged since it was published'}: "
            f"{hub.api.endpoint}/{repo_id}, commit {commit[:8]}, tag {tag}. To load it:\n"
            f"    from diffusers import DiffusionPipeline\n"
            f'    pipe = DiffusionPipeline.from_pretrained("{repo_id}", revision="{tag}")'
        )
        if space is not None:
            try:
                publish_space(hub, demo, space, repo_id=repo_id, tag=tag, log=log)
            except HubError as error:
                message = f"the model is published, its Space {space} is not: {error}"
                raise HubError(message, same_command=error.same_command) from error
    return commit


def publish_space(
    hub: HubClient, folder: Path, space_id: str, *, repo_id: str, tag: str, log: Callable[[str], object]
) -> None:
    """Push a staged Space as one commit. It is private if the model is.

    Raises:
        HubError: the Hub refused or failed.
    """
    private = bool(hub.call("read the repository", hub.api.repo_info, repo_id).private)
    repo = find_repo(hub, SPACE, space_id, private=private)
    if repo is None:
        repo = read_repo_state(hub, SPACE, create_repo(hub, SPACE, space_id, private=private))
    title = f"demo of {repo_id}, {tag} ({digest(folder)[:12]})"
    commit = push(hub, folder, repo, tag=None, title=title)
    log(
        f"{'Published' if commit != repo.commit else 'Unchanged since it was published'}: "
        f"{hub.api.endpoint}/spaces/{space_id}, commit {commit[:8]}"
        + ("\nIt is private, as the model: in its settings, add a secret HF_TOKEN with a token that may read the model"
           if private else "")
    )  # fmt: skip


def show(
    run: str | Path,
    repo_id: str,
    *,
    space: str | None = None,
    log: Callable[[str], object] = print,
    **options: Any,
) -> None:
    """Log what `publish` would send, the files with their sizes and the card, without a request to the Hub.

    Args:
        space: as for `publish`.
        options: revision_tag, license and fp16 of `stage`.
    Raises:
        LoadingError, ValueError, OSError: as `publish`.
    """
    from huggingface_hub.utils import validate_repo_id

    for name in (repo_id,) if space is None else (repo_id, space):
        validate_repo_id(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder, demo = Path(scratch, "model"), Path(scratch, "space")
        tag = stage(run, folder, repo_id=repo_id, log=log, **options)
        _show_files(folder, f"{repo_id} with the tag {tag}", log)
        log(describe_differences(check_loading(folder)) + "\n")
        log((folder / CARD).read_text(encoding="utf-8"))
        if space is not None:
            stage_space(folder, demo, space_id=space, repo_id=repo_id, tag=tag)
            check_private_text(demo, Path(run))
            _show_files(demo, f"the Space {space}", log)
            for name in (CARD, "app.py", "requirements.txt"):
                log((demo / name).read_text(encoding="utf-8"))


def _show_files(folder: Path, where: str, log: Callable[[str], object]) -> None:
    sizes = {name: (folder / name).stat().st_size for name in list_files(folder)}
    for name, size in sizes.items():
        log(f"{size:>13,}  {name}")
    log(f"{sum(sizes.values()):>13,}  bytes in {len(sizes)} files, for {where}\n")


# ---- The repository --------------------------------------------------------------------------------------------------


def check_access(hub: HubClient, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
    """Check that the token may write to the repository. If it does not exist, create it, private from the start.

    Returns:
        The full id of the repository, "user/name".
    Raises:
        HubError: there is no token, or it has no write access; the Hub failed; or the repository exists, is public and
            should be private.
        ValueError: the id or the licence is invalid.
    """
    return create_repo(hub, MODEL, check_account(hub, repo_id, license=license), private=private)


def check_account(hub: HubClient, repo_id: str, *, kind: RepoKind = MODEL, license: str | None = None) -> str:
    """Check that the repository is one of the token's user. Nothing is created.

    Returns:
        The full id of the repository, "user/name".
    Raises:
        HubError: there is no token, or the repository is somebody else's; or as `HubClient.call`.
        ValueError: the id or the licence is invalid.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    try:
        user = hub.call("identify the user", hub.api.whoami)
    except LocalTokenNotFoundError:
        raise HubError("no access token found: log in with `hf auth login`, or set HF_TOKEN") from None
    owner = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    if owner not in [user["name"], *(org["name"] for org in user.get("orgs", []))]:
        raise HubError(
            f"no write access to {repo_id}: the token belongs to {user['name']}; give a {kind.option} of this user, or "
            "use another token",
            same_command=False,
        )
    if license is not None:
        try:
            hub.call("check the licence", ModelCard(f"---\nlicense: {license}\n---\n").validate)
        except ValueError as error:
            raise ValueError(f"license is {license!r}, which the Hub does not accept: {str(error)[:200]} ...") from None
    return repo_id if "/" in repo_id else f"{owner}/{repo_id}"


def create_repo(hub: HubClient, kind: RepoKind, repo_id: str, *, private: bool) -> str:
    """Create the repository if it does not exist, private from the start, and check write access. Returns its id.

    Raises:
        HubError: the token has no write access; the repository exists, is public and should be private; or as
            `HubClient.call`.
    """
    # None leaves it to the owner's settings; False would make it public where an organisation defaults to private.
    created = hub.call(
        "create the repository",
        hub.api.create_repo,
        repo_id,
        private=private or None,
        exist_ok=True,
        repo_type=kind.type,
        space_sdk="gradio" if kind is SPACE else None,
    )
    check_existing_repo(hub, kind, created.repo_id, private=private)
    return created.repo_id


def check_existing_repo(hub: HubClient, kind: RepoKind, repo_id: str, *, private: bool) -> None:
    """Check write access and whether the repository is private.

    Raises:
        HubError: the token has no write access; the repository is public and should be private; or as
            `HubClient.call`.
    """
    hub.call("check write access", hub.api.auth_check, repo_id, repo_type=kind.type, write=True)
    if private and not hub.call("read the repository", hub.api.repo_info, repo_id, repo_type=kind.type).private:
        raise HubError(
            f"{repo_id} exists and is public: make it private in its settings, or "
            + ("omit --hub_private_repo" if kind is MODEL else "give another space, since the model is private"),
            same_command=False,
        )


@dataclass(frozen=True)
class RepoState:
    """A repository before the push."""

    kind: RepoKind
    repo_id: str
    commit: str  # hash of the newest commit
    title: str  # of the newest commit
    files: list[str]
    tags: dict[str, str]  # name: hash of the commit


def find_repo(hub: HubClient, kind: RepoKind, repo_id: str, *, private: bool) -> RepoState | None:
    """What the repository holds now; None if it does not exist. Nothing is created.

    Raises:
        HubError: as `check_existing_repo` and `read_repo_state`.
    """
    if not hub.call("look for the repository", hub.api.repo_exists, repo_id, repo_type=kind.type):
        return None
    check_existing_repo(hub, kind, repo_id, private=private)
    return read_repo_state(hub, kind, repo_id)


def read_repo_state(hub: HubClient, kind: RepoKind, repo_id: str) -> RepoState:
    """What the repository holds now.

    Raises:
        HubError: it has files, and they are not what we publish; or as `HubClient.call`.
    """
    of_kind = {"repo_type": kind.type}
    newest = hub.call("read the newest commit", hub.api.list_repo_commits, repo_id, **of_kind)[0]
    files = hub.call("list the files", hub.api.list_repo_files, repo_id, revision=newest.commit_id, **of_kind)
    if not kind.marks <= set(files) and (foreign := sorted(set(files) - INITIAL_FILES)):
        raise HubError(
            f"{repo_id} has files that are not part of {kind.content} ({some(foreign)}): give another {kind.option}",
            same_command=False,
        )
    tags = {
        ref.name: ref.target_commit
        for ref in hub.call("list the tags", hub.api.list_repo_refs, repo_id, **of_kind).tags
    }
    return RepoState(kind, repo_id, newest.commit_id, newest.title, files, tags)


def check_tag(repo: RepoState, tag: str, title: str) -> None:
    """Raise HubError if the tag exists, unless it marks the newest commit and this push repeats that commit."""
    commit = repo.tags.get(tag)
    if commit is not None and not (repo.title == title and commit == repo.commit):
        raise HubError(
            f"{repo.repo_id} already has the tag {tag}, on commit {commit[:8]}: give another revision_tag",
            same_command=False,
        )


def push(hub: HubClient, folder: Path, repo: RepoState, *, tag: str | None, title: str) -> str:
    """Push a staged folder as one commit on top of `repo.commit`, and tag it. Repeating it changes nothing.

    The same commit deletes files of an earlier publication that this one does not have.

    Returns:
        The hash of the commit.
    Raises:
        HubError: as `HubClient.call` and `HubClient.commit`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    commit = repo.commit
    if repo.title != title:
        names = list_files(folder)
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        obsolete = [name for name in repo.files if repo.kind.holds(name) and name not in names]
        operations += [CommitOperationDelete(name) for name in obsolete]
        commit = hub.commit(repo.repo_id, repo.kind.type, repo.commit, title, operations)
    if tag is not None and tag not in repo.tags:
        hub.call("create the tag", hub.api.create_tag, repo.repo_id, tag=tag, revision=commit, exist_ok=True)
    return commit
