"""A store that speaks as much of S3 as s3fs asks for, in memory, and can be made to refuse or to keep silent."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MESSAGES = {
    "NoSuchBucket": (404, "The specified bucket does not exist"),
    "NoSuchKey": (404, "The specified key does not exist."),
    "AccessDenied": (403, "Access Denied"),
    "PreconditionFailed": (412, "At least one of the pre-conditions you specified did not hold"),
    "InternalError": (500, "We encountered an internal error. Please try again."),
}


class Store:
    """Attributes:
    objects: content by "bucket/key".
    buckets: those that are there.
    refuse: error code of every answer to come; empty for none.
    fail: how many requests to come end in InternalError.
    silent: whether requests are taken and never answered.
    requests: method and path of each request.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.buckets = {"bucket"}
        self.refuse, self.fail, self.silent = "", 0, False
        self.requests: list[tuple[str, str]] = []
        self.ended = threading.Event()


def handler_of(store: Store) -> type[BaseHTTPRequestHandler]:
    """The class that answers for a store."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def error(self, code: str) -> None:
            status, message = MESSAGES[code]
            self.answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            path, query = unquote(url.path).strip("/"), parse_qs(url.query)
            store.requests.append((self.command, path))
            if store.silent:
                store.ended.wait()
                return None
            if store.fail:
                store.fail -= 1
                return self.error("InternalError")
            if store.refuse:
                return self.error(store.refuse)
            bucket, _, key = path.partition("/")
            if bucket not in store.buckets:
                return self.error("NoSuchBucket")
            if self.command == "POST" and "delete" in parse_qs(url.query, keep_blank_values=True):
                for gone in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    store.objects.pop(f"{bucket}/{unescape(gone)}", None)
                return self.answer(200, b"<DeleteResult></DeleteResult>")
            if self.command == "PUT":
                if self.headers.get("If-None-Match") == "*" and path in store.objects:
                    return self.error("PreconditionFailed")
                store.objects[path] = body
                return self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
            if not key:
                prefix = query.get("prefix", [""])[0]
                found = sorted(name for name in store.objects if name.startswith(f"{bucket}/{prefix}"))
                listed = "".join(
                    f"<Contents><Key>{name.partition('/')[2]}</Key><Size>{len(store.objects[name])}</Size>"
                    f"<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                    for name in found
                )
                text = f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(found)}</KeyCount>{listed}"
                return self.answer(200, f"{text}<IsTruncated>false</IsTruncated></ListBucketResult>".encode())
            if path not in store.objects:
                return self.error("NoSuchKey")
            content = store.objects[path]
            headers = {
                "ETag": f'"{hashlib.md5(content).hexdigest()}"',
                "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            }
            if self.command == "HEAD":
                return self.answer(200, Content_Length=str(len(content)), **headers)
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                return self.answer(206, content[int(first) : int(last or len(content)) + 1], **headers)
            return self.answer(200, content, **headers)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

    return Handler


@contextmanager
def serving() -> Iterator[tuple[Store, str]]:
    """A store and its endpoint."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(store))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        store.ended.set()
        server.shutdown()
        server.server_close()
