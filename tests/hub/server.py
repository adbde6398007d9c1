"""A Hub for tests: a server on 127.0.0.1 that unmodified huggingface_hub and diffusers push to and load from.

Clients run in processes of their own, because huggingface_hub reads HF_ENDPOINT once, when it is imported:

    with Hub(tokens={"tok-a": ("alice", "write")}) as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment(folder, token="tok-a"))
        assert list(hub.repo("alice/x").head.files) == [".gitattributes", "README.md"]

It answers what huggingface_hub 2.4 requests while a model is published and loaded (repositories.py): models of users,
one branch (main), every file "regular", so neither LFS nor Xet. Any other request gets 501. All data is in memory.
"""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.hub.repositories import REASONS, Answer, Refusal, Repositories, as_json

TOKENS = {"tok-a": ("alice", "write"), "tok-r": ("alice", "read"), "tok-b": ("bob", "write")}


@dataclass
class Request:
    """A line of the log. `status` is None until the answer is sent, and stays None if the connection is reset."""

    method: str
    path: str  # with the query, quoted
    user: str | None  # of its token
    time: float  # time.monotonic() on arrival
    status: int | None = None


@dataclass(eq=False)
class Fault:
    """What goes wrong with requests of this method and path, `times` times or until its with block ends.

    Options combine: with status and reset, the request is neither carried out nor answered.
    """

    hub: "Hub"
    method: str
    part: str  # of the path with the query
    status: int | None = None  # answer with this status, without carrying out the request
    retry_after: int = 0  # seconds, sent with 429
    silent: float = 0.0  # seconds before the answer; the request is carried out at once
    reset: bool = False  # reset the connection instead of answering
    times: int | None = None  # None: no limit
    seen: int = 0  # matching requests

    def answer(self) -> Answer:
        if self.status not in REASONS:  # 502, 503 and 504 come from the gateway, in HTML
            page = f"<html><body><h1>{self.status} {HTTPStatus(self.status).phrase}</h1></body></html>"
            return Answer(self.status, page.encode(), {"Content-Type": "text/html"})
        code = "RepoNotFound" if self.status == 404 else ""
        headers = {"Retry-After": str(self.retry_after)} if self.status == 429 else {}
        return Refusal(self.status, REASONS[self.status], code=code, headers=headers).answer

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.hub.end_fault(self)


class Hub(Repositories):
    """A running Hub. Leaving the with block ends it and every connection to it."""

    def __init__(self, tokens: Mapping[str, tuple[str, str]]):
        super().__init__(tokens)
        self._requests: list[Request] = []
        self._faults: list[Fault] = []
        self._errors: list[str] = []  # tracebacks of bugs in this server
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
        self._server.close_connections()
        if self._errors:  # the client took them for answers with status 500
            raise RuntimeError("the test server has a bug:\n" + "\n".join(self._errors))

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def requests_of(self, method: str, part: str) -> list[Request]:
        """The requests of this method with `part` in their path."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def fault(self, method: str, part: str, **options) -> Fault:
        """Make the next requests of this method with `part` in their path fail.

        The options are fields of Fault. Of several faults that match a request, the oldest applies.
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
        """All variables of a process that uses this Hub only and keeps its files in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if token is not None:
            variables["HF_TOKEN"] = token
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | variables

    # -- for the handler of a connection -------------------------------------------------------------------------------

    def log_request(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[Request, Fault | None]:
        """Log a request; the fault that applies to it."""
        request = Request(method, path, self.user_of(headers), time.monotonic())
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

    def log_error(self):
        with self._lock:
            self._errors.append(traceback.format_exc())

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        try:
            return super().answer(method, target, headers, body)
        except Exception:
            self.log_error()
            return as_json({"error": "the test server has a bug"}, 500)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with the default of 5, some of many simultaneous connections wait for seconds

    def __init__(self, hub: Hub):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self):
        """End the connections that clients keep open: they would be served even after the server is closed."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed or gave up
            self.hub.log_error()


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
        if len(body) < size:  # the client was killed while sending
            self.close_connection = True
            return
        request, fault = hub.log_request(self.command, self.path, self.headers)
        refused = fault and fault.status
        answer = fault.answer() if refused else hub.answer(self.command, self.path, self.headers, body)
        if fault and fault.silent:
            hub.wait(fault.silent)
        if fault and fault.reset:
            self.reset()
            return
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def reset(self):
        """Close the connection so that the client sees a reset, not an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it keeps the socket open
        self.connection.close()
