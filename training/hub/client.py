"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

WAITS = (1, 2, 4, 8)  # seconds before what failed is tried again
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others a little later
Result = TypeVar("Result")


class HubError(RuntimeError):
    """The Hub, or the way to it, failed. What is on this machine is as it was."""


@dataclass
class Hub:
    """The Hub's client with what it lacks: one deadline for everything, and another try where that is safe."""

    seconds: float  # from now on, for all that is asked of it

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self.api = HfApi()
        # All that goes wrong between here and the Hub: its answers, and no answer at all.
        http_error: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
        self._errors: tuple[type[Exception], ...] = (
            http_error,
            ConnectionError,
            TimeoutError,
            json.JSONDecodeError,
        )
        self._until = time.monotonic() + self.seconds

    def ask(self, what: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call a function of the client that may be called twice.

        Raises:
            HubError: the Hub said no, or nothing, or that it is busy, five times.
        """
        for wait in (*WAITS, None):
            try:
                return self._in_time(what, function, *args, **options)
            except self._errors as error:
                self._pause_or_fail(what, error, wait)
        raise AssertionError("the last wait is None")

    def commit(self, repo_id: str, parent: str, title: str, operations: list[Any]) -> str:
        """Make one commit on top of `parent`, and no second one if an answer gets lost: its hash.

        Raises:
            HubError: as `ask`, or somebody else has pushed since.
        """
        for wait in (*WAITS, None):
            try:
                made = self._in_time(
                    "the commit", self.api.create_commit, repo_id, operations, commit_message=title,
                    parent_commit=parent,
                )  # fmt: skip
                return made.oid
            except self._errors as error:
                if _status(error) != 412:  # 412: the parent is not the newest commit any more
                    self._pause_or_fail("the commit", error, wait)
                newest = self.ask("the newest commit", self.api.list_repo_commits, repo_id)[0]
                if newest.commit_id != parent:
                    if newest.title == title:  # it was made, and the answer got lost
                        return newest.commit_id
                    raise HubError(
                        f"somebody else has pushed to {repo_id} in these seconds ({newest.title!r}): look at it, and "
                        "publish again"
                    ) from error
                if _status(error) == 412:
                    raise self._failed("the commit", error) from error
        raise AssertionError("the last wait is None")

    def _in_time(self, what: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call it in a thread of its own, which may be left behind: the client itself waits for ever."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                outcome.put((function(*args, **options), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=call, daemon=True).start()
        try:
            value, error = outcome.get(timeout=max(0.0, self._until - time.monotonic()))
        except queue.Empty:
            raise HubError(f"{what}: the Hub has not answered, and its {self.seconds:g} seconds are over") from None
        if error is not None:
            raise error
        return value

    def _pause_or_fail(self, what: str, error: Exception, wait: float | None) -> None:
        status = _status(error)
        if wait is None or (status is not None and status not in MAY_PASS):
            raise self._failed(what, error) from error
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        wait = max(wait, float(asked)) if asked.isdecimal() else wait
        if time.monotonic() + wait > self._until:
            raise self._failed(what, error) from error
        time.sleep(wait)

    def _failed(self, what: str, error: Exception) -> HubError:
        status = _status(error)
        hint = {
            401: "; log in with `hf auth login`, or set HF_TOKEN to a token of yours",
            403: "; take a token that may write there",
        }.get(status or 0, "")
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return HubError(f"{what}: {status or type(error).__name__}: {said}{hint}")


def _status(error: Exception) -> int | None:
    """The number of the Hub's answer; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)
