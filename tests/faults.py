"""A store that stutters: a real HTTP server in front of another, which fails some requests on the way through."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# For a request's method and path: "error" (503, slow down), "reset", "half" (a reset, with half of the request's body read), "stall",
# "cut" (half the answer's body), "exists" (412), or None for none.
Plan = Callable[[str, str], str | None]
_REFUSALS = {
    "error": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "exists": (412, b'{"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}}'),
}


class FaultyStore:
    """`plan` says what happens to each request; `seen` counts what happened, `requests` and `sent` what came and went."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.plan: Plan = lambda method, path: None
        self.stall = 30.0  # seconds
        self.turn: AbstractContextManager[Any] = nullcontext()  # held while a request is served
        self.seen: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self._lock = threading.Lock()

    def randomly(self, share: float, kinds: str = "error reset", seed: int = 0, suffix: str = "") -> None:
        """Fail a share of the GET requests whose path ends with `suffix`."""
        dice = random.Random(seed)

        def plan(method: str, path: str) -> str | None:
            return dice.choice(kinds.split()) if method == "GET" and path.endswith(suffix) and dice.random() < share else None

        self.plan = plan

    def judge(self, method: str, target: str, body: bytes) -> str | None:
        """What happens to a request that the plan lets through; `target` is its path and its query."""
        return None

    def count(self, kind: str, path: str, sent: int) -> None:
        with self._lock:
            self.seen[kind] += 1
            self.requests[path] += 1
            self.sent += sent


@contextmanager
def faulty_store(target: str, host: str = "127.0.0.1", kind: type[FaultyStore] = FaultyStore) -> Iterator[tuple[str, FaultyStore]]:
    """(endpoint, the store) of a proxy at `host` for the server at `target`."""
    store = kind(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def _handle(self) -> None:
            with store.turn:
                self._serve()

        def _serve(self) -> None:
            path = self.path.partition("?")[0]
            kind = store.plan(self.command, path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length // 2 if kind == "half" else length)
            kind = kind or store.judge(self.command, self.path, body)
            if kind in _REFUSALS:
                store.count(kind, path, 0)
                status, text = _REFUSALS[kind]
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return
            if kind in ("reset", "half"):
                store.count(kind, path, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if kind == "stall":
                store.count(kind, path, 0)
                time.sleep(store.stall)
                self.close_connection = True
                return
            to = http.client.HTTPConnection(store.target)
            to.request(self.command, self.path, body, dict(self.headers.items()))
            answer = to.getresponse()
            data = answer.read()
            to.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            if kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(data)
            store.count(kind or "fine", path, len(data))

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815  the names http.server looks for

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}", store
    finally:
        server.shutdown()
        server.server_close()
