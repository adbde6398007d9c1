"""What the server answers: what the page asks for, and nothing else of what gradio would answer.

Of itself gradio also saves links, records runs, redirects to other hosts, and fetches an image from an address that a
visitor names.
"""

import json
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..files import folder_size
from .jobs import MAX_UPLOAD_BYTES

MAX_JOB_BYTES = 2**20  # of the arguments of a job, most of them a mask
MAX_FOLDER_BYTES = 2**30  # of all uploads that are on the disk
OK, NOT_FOUND = HTTPStatus.OK, HTTPStatus.NOT_FOUND
JOIN, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="
ANSWERED = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static)/.*"
    r"|/gradio_api/(startup-events|queue/data|upload_progress|cancel|reset|heartbeat/\w+)"
)


class Gate:
    """Middleware around gradio's server.

    Args:
        folder: where the server keeps uploads.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        path = request.url.path
        if path == JOIN:
            body = await _read(request)
            status, receive = self._check_job(body), _replay(body, receive)
        elif path == UPLOAD:
            status = self._check_upload(request)
        elif path.startswith(FILE):
            status = OK if self._is_upload(path.removeprefix(FILE)) else NOT_FOUND
        else:
            status = OK if ANSWERED.fullmatch(path) else NOT_FOUND
        answer = self.app if status is OK else PlainTextResponse(status.phrase, status)
        await answer(scope, receive, send)

    def _is_upload(self, path: Any) -> bool:
        """Whether it is a file there: gradio deletes what jobs were given, and stops at a folder."""
        if not isinstance(path, str) or not Path(path).is_absolute():
            return False
        try:
            file = Path(path).resolve()
            return file.is_relative_to(self.folder) and file.is_file()
        except (OSError, ValueError):  # a null character, half a character, a name that is too long
            return False

    def _check_upload(self, request: Request) -> HTTPStatus:
        """Its size must be known before it is read, and there must be room for it."""
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_UPLOAD_BYTES + 2**12:  # with what is around the file
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return OK if folder_size(self.folder) + int(length) <= MAX_FOLDER_BYTES else HTTPStatus.INSUFFICIENT_STORAGE

    def _check_job(self, body: bytes) -> HTTPStatus:
        """Every file among the arguments of a job must be an upload."""
        if len(body) > MAX_JOB_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        try:
            pending = [json.loads(body)]
        except (ValueError, RecursionError):
            return HTTPStatus.BAD_REQUEST
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                if "path" in value and not self._is_upload(value["path"]):
                    return HTTPStatus.BAD_REQUEST
                pending += value.values()
            elif isinstance(value, list):
                pending += value
        return OK


async def _read(request: Request) -> bytes:
    """The body, or its beginning if that is too long already."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_JOB_BYTES:
            break
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, which has been read, and then what `receive` gives."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay
