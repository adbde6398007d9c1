"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.hub.check import check_loading, told
from training.hub.client import Hub, HubError
from training.hub.stage import CARD, PUBLISHED, _read, digest, files_of, stage

HUBS_OWN = {".gitattributes", CARD, "LICENSE"}  # what the Hub, or its page for a new model, puts into one


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision_tag: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    seconds: float = 600,
    say: Callable[[str], object] = print,
) -> str:
    """Publish a run: stage it, look whether it loads, push it as one commit with a tag.

    Args:
        run, revision_tag, license, fp16, say: see `stage`.
        repo_id: "user/name", or "name" of the user whose token it is; made if it is missing.
        private: make it private; an error if it is there and public.
        seconds: that the Hub may take for everything.
    Returns:
        The hash of the commit.
    Raises:
        HubError: the Hub failed or refused.
        LoadingError: it does not load, or not to the same pictures in the three ways. Nothing was sent then.
        ValueError, OSError: the run is not complete, or a name is none.
    """
    hub = Hub(seconds)
    repo_id = check_access(hub, repo_id, private=private, license=license)
    seen = look(hub, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tag = stage(run, folder, repo_id=repo_id, revision_tag=revision_tag, license=license, fp16=fp16, say=say)
        title = f"{Path(run).resolve().name}, step {_read(Path(run) / 'pipeline' / 'training.json')['step']}"
        title += f" ({digest(folder)[:12]})"  # by which a commit is known again
        if revision_tag is not None:
            check_tag(seen, revision_tag, title)
        say("It loads in three ways: " + told(check_loading(folder)))
        commit = push(hub, folder, seen, tag=tag, title=title)
    news = "Published" if commit != seen.commit else "Nothing has changed since it was published"
    say(
        f"{news}: {hub.api.endpoint}/{repo_id}, commit {commit[:8]}, tag {tag}. To load it:\n"
        f"    from diffusers import DiffusionPipeline\n"
        f'    pipe = DiffusionPipeline.from_pretrained("{repo_id}", revision="{tag}")'
    )
    return commit


def check_access(hub: Hub, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
    """Make the repository if it is missing, private from its first moment if wanted; make sure it may be written to.

    Returns:
        Its whole name, "user/name".
    Raises:
        HubError: no token, or none that may write there; the Hub cannot be reached; or it is public and shall not be.
        ValueError: that is no name for a repository, or for a licence.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    try:
        user = hub.ask("who you are", hub.api.whoami)
    except LocalTokenNotFoundError:
        raise HubError("there is no token: log in with `hf auth login`, or set HF_TOKEN") from None
    owner = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    if owner not in [user["name"], *(org["name"] for org in user.get("orgs", []))]:
        raise HubError(f"{repo_id} is not yours to write: the token is of {user['name']}")
    if license is not None:
        try:
            hub.ask("the licence", ModelCard(f"---\nlicense: {license}\n---\n").validate)
        except ValueError as error:
            raise ValueError(f"license is {license!r}, which the Hub does not know: {str(error)[:200]} ...") from None
    # False would make a new one public where an organisation wants private ones: None leaves it to its settings.
    made = hub.ask("making the repository", hub.api.create_repo, repo_id, private=private or None, exist_ok=True)
    repo_id = made.repo_id
    hub.ask("the right to write", hub.api.auth_check, repo_id, write=True)
    if private and not hub.ask("the repository", hub.api.model_info, repo_id).private:
        raise HubError(
            f"{repo_id} is there already and is public: make it private in its settings, or leave hub_private_repo out"
        )
    return repo_id


@dataclass(frozen=True)
class Seen:
    """What a repository holds before it is pushed to."""

    repo_id: str
    commit: str  # hash of the newest
    title: str  # of the newest
    files: list[str]
    tags: dict[str, str]  # name: hash of its commit


def look(hub: Hub, repo_id: str) -> Seen:
    """Look at a repository.

    Raises:
        HubError: it holds something that is no published model; or see Hub.
    """
    newest = hub.ask("the newest commit", hub.api.list_repo_commits, repo_id)[0]
    files = hub.ask("its files", hub.api.list_repo_files, repo_id, revision=newest.commit_id)
    if not {"model_index.json", "pipeline.py"} <= set(files) and (foreign := sorted(set(files) - HUBS_OWN)):
        raise HubError(f"{repo_id} holds other things ({', '.join(foreign[:5])}): give another hub_model_id")
    refs = hub.ask("its tags", hub.api.list_repo_refs, repo_id)
    return Seen(repo_id, newest.commit_id, newest.title, files, {ref.name: ref.target_commit for ref in refs.tags})


def check_tag(seen: Seen, tag: str, title: str) -> None:
    """Raise HubError if a tag is on another commit than the one that this push makes, or has made before."""
    there = seen.tags.get(tag)
    if there is not None and not (seen.title == title and there == seen.commit):
        raise HubError(f"{seen.repo_id} has a tag {tag} already, on commit {there[:8]}: give another revision_tag")


def push(hub: Hub, folder: Path, seen: Seen, *, tag: str, title: str) -> str:
    """Push a staged folder as one commit on top of the one that was seen, with a tag.

    Files on the list that an earlier publication left, and this one has not, go in the same commit. Done twice, the
    second changes nothing.

    Returns:
        The hash of the commit.
    Raises:
        HubError: see Hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    commit = seen.commit
    if seen.title != title:
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files_of(folder)]
        gone = [name for name in seen.files if name in PUBLISHED and not (folder / name).exists()]
        operations += [CommitOperationDelete(name) for name in gone]
        commit = hub.commit(seen.repo_id, seen.commit, title, operations)
    if tag not in seen.tags:
        hub.ask("the tag", hub.api.create_tag, seen.repo_id, tag=tag, revision=commit, exist_ok=True)
    return commit
