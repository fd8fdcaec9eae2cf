"""A proxy between a client and a store, which lets some requests or answers go wrong, as it is told."""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

_ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"
_KEPT = "<DeleteResult><Error><Key>a/x</Key><Code>{}</Code><Message>{}</Message></Error></DeleteResult>"

REFUSALS = {
    "503": (503, _ERROR.format("SlowDown", "Please reduce your request rate.")),
    "500": (500, _ERROR.format("InternalError", "We encountered an internal error. Please try again.")),
    "denied": (403, _ERROR.format("AccessDenied", "Access Denied")),
    "expired": (400, _ERROR.format("ExpiredToken", "The provided token has expired.")),
    "gone": (404, _ERROR.format("NoSuchUpload", "The specified upload does not exist.")),
    "kept for now": (200, _KEPT.format("InternalError", "We encountered an internal error. Please try again.")),
    "kept": (200, _KEPT.format("AccessDenied", "Access Denied")),
}
"""Status and content of answers given instead of asking the store. Those of a deletion report single objects within an
answer of success."""

PASSING = ("503", "500", "slow", "reset", "lost", "cut")
"""What may happen to any request on a bad day: a refusal; an answer after a while; a connection reset before the store
has heard of the request; reset after it has done what it was asked ("lost"); reset in the middle of the answer. What
is not drawn is the other REFUSALS, and "silent": the request is taken and never answered."""

SLOW = 0.05
"""Seconds that a slow answer takes."""


class Request(NamedTuple):
    """A request that arrived.

    Attributes:
        number: of those before it.
        method: such as "GET".
        target: path and query.
        fault: what became of it; empty if it was answered as the store answered.
    """

    number: int
    method: str
    target: str
    fault: str = ""


Plan = Callable[[Request], str]
"""Says for each request what shall become of it; "" lets it pass."""


def drawn(share: float, seed: int) -> Plan:
    """Let a share of all requests go wrong in one of the ways that pass, by their numbers alone."""

    def fault(request: Request) -> str:
        drawing = random.Random(f"{seed}/{request.number}")
        return drawing.choice(PASSING) if drawing.random() < share else ""

    return fault


def first(*kinds: str, method: str = "", target: str = "") -> Plan:
    """Let the first requests go wrong, each in its way, of those with a method and something in their target."""
    left = list(kinds)

    def fault(request: Request) -> str:
        return left.pop(0) if left and method in request.method and target in request.target else ""

    return fault


def always(kind: str) -> Plan:
    """Let all requests go wrong in one way."""
    return lambda _: kind


class Proxy:
    """Attributes:
    endpoint: its URL.
    plan: what shall become of requests to come.
    requests: those that arrived, with what became of them.
    """

    def __init__(self, store: str) -> None:
        self.store = urlsplit(store)
        self.endpoint = ""
        self.forgive()

    def forgive(self) -> None:
        """Let all requests to come pass, and forget those that came."""
        self.plan: Plan = always("")
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    @property
    def faults(self) -> Counter[str]:
        """How many requests went wrong in each way."""
        return Counter(request.fault for request in self.requests if request.fault)

    def receive(self, method: str, target: str) -> str:
        """Note a request and return what shall become of it."""
        with self._lock:
            request = Request(len(self.requests), method, target)
            fault = self.plan(request)
            self.requests.append(request._replace(fault=fault))
            return fault

    def ask_store(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
        """Return the whole answer of the store, its head and its body."""
        connection = http.client.HTTPConnection(self.store.hostname or "", self.store.port)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OF_CONNECTION]
        if "content-length" not in {name.lower() for name, _ in kept}:
            kept.append(("Content-Length", str(len(content))))
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in kept)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


_OF_CONNECTION = ("connection", "transfer-encoding", "keep-alive")


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reset(self) -> None:
            """End the connection so that the client's system is told that it broke."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.receive(self.command, self.path)
            if fault in REFUSALS:
                status, content = REFUSALS[fault]
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode() if self.command != "HEAD" else b"")
                return
            if fault == "reset":
                self.reset()
                return
            headers = [pair for pair in self.headers.items() if pair[0].lower() not in (*_OF_CONNECTION, "expect")]
            answer = proxy.ask_store(self.command, self.path, headers, body)
            if fault == "silent":
                self.connection.recv(1)  # until the client has had enough
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(SLOW)
            if fault in ("lost", "cut"):
                self.wfile.write(answer[: len(answer) // 2] if fault == "cut" else b"")
                self.reset()
                return
            self.wfile.write(answer)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

    return Handler


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that went away are what this is for."""


@contextmanager
def standing_before(store: str) -> Iterator[Proxy]:
    """Start a proxy before the store at a URL, and end it with the block."""
    proxy = Proxy(store)
    server = _Listener(("127.0.0.1", 0), _handler(proxy))
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
