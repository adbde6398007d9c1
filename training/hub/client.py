"""THE HUB CLIENT: huggingface_hub with one deadline for all calls, and retries where they are safe.

HfApi itself waits for an answer without a limit, retries few of its requests, and, if the answer to a commit gets lost,
reports an error although the Hub has made the commit.
"""

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

RETRY_DELAYS = (1, 2, 4, 8)  # seconds
TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
INVALID_STATUSES = {400, 413, 422}  # the request itself is wrong, and will be wrong tomorrow
HINTS = {
    401: "; log in with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "; use a token with write permission for it",
}
Result = TypeVar("Result")


class HubError(RuntimeError):
    """The Hub refused, failed or could not be reached. Nothing on this machine has changed.

    Args:
        same_command: whether the same command may succeed later; otherwise the message says what to change in it.
    """

    def __init__(self, message: str, *, same_command: bool = True) -> None:
        super().__init__(message)
        self.same_command = same_command


@dataclass
class HubClient:
    """Calls of the Hub's API. By the deadline each has returned a result or raised HubError.

    Args:
        seconds: time for all calls together, from the creation of this object.
    """

    seconds: float

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self.api = HfApi()
        # The base class of refusals and of connection failures is of httpx or of httpx2, depending on the version.
        http_error: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
        self._errors: tuple[type[Exception], ...] = (
            http_error,
            ConnectionError,
            TimeoutError,
            json.JSONDecodeError,  # an HTML page from a gateway
        )
        self._deadline = time.monotonic() + self.seconds

    def call(self, action: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call a function of the API that is safe to call twice.

        Args:
            action: what the call does, for messages.
        Raises:
            HubError: the Hub refused, did not answer before the deadline, or failed five times.
        """
        for delay in (*RETRY_DELAYS, None):
            try:
                return self._call_once(action, function, *args, **options)
            except self._errors as error:
                self._wait_or_raise(action, error, delay)
        raise AssertionError("the last delay is None")

    def commit(self, repo_id: str, repo_type: str, parent: str, title: str, operations: list[Any]) -> str:
        """Make exactly one commit on top of `parent`, even if an answer gets lost.

        Args:
            repo_type: "model" or "space".
        Returns:
            The hash of the commit.
        Raises:
            HubError: as `call`, or somebody else pushed in the meantime.
        """
        action = "create the commit"
        for delay in (*RETRY_DELAYS, None):
            try:
                created = self._call_once(
                    action,
                    self.api.create_commit,
                    repo_id,
                    operations,
                    commit_message=title,
                    parent_commit=parent,
                    repo_type=repo_type,
                )
                return created.oid
            except self._errors as error:
                parent_is_stale = _status(error) == 412
                if not parent_is_stale:
                    self._wait_or_raise(action, error, delay)
                commits = self.call("read the newest commit", self.api.list_repo_commits, repo_id, repo_type=repo_type)
                newest = commits[0]
                if newest.commit_id != parent:
                    if newest.title == title:  # the commit was made, and the answer got lost
                        return newest.commit_id
                    raise HubError(
                        f"somebody else pushed to {repo_id} in the meantime ({newest.title!r}): check that commit, "
                        "then publish again"
                    ) from error
                if parent_is_stale:
                    raise _hub_error(action, error) from error
        raise AssertionError("the last delay is None")

    def _call_once(self, action: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call it in its own thread, which is abandoned at the deadline: the API itself waits without a limit."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                outcome.put((function(*args, **options), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=call, daemon=True).start()
        try:
            value, error = outcome.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise HubError(f"{action}: no answer from the Hub within its {self.seconds:g} seconds") from None
        if error is not None:
            raise error
        return value

    def _wait_or_raise(self, action: str, error: Exception, delay: float | None) -> None:
        """Wait before the next try. Raise HubError if there is none (delay is None), if it is useless, or too late."""
        status = _status(error)
        if delay is None or (status is not None and status not in TRANSIENT_STATUSES):
            raise _hub_error(action, error) from error
        retry_after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        if retry_after.isdecimal():
            delay = max(delay, float(retry_after))
        if time.monotonic() + delay > self._deadline:
            raise _hub_error(action, error) from error
        time.sleep(delay)


def _hub_error(action: str, error: Exception) -> HubError:
    status = _status(error)
    message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return HubError(
        f"{action}: {status or type(error).__name__}: {message}{HINTS.get(status or 0, '')}",
        same_command=status not in INVALID_STATUSES,
    )


def _status(error: Exception) -> int | None:
    """The HTTP status of the answer; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)
