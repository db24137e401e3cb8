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
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# For a request's method and path: "error" (503, slow down), "reset", "stall", "cut" (half the body), or None for none.
Plan = Callable[[str, str], str | None]


class FaultyStore:
    """`plan` says what happens to each request; `seen` counts what happened, `requests` and `sent` what came and went."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.plan: Plan = lambda method, path: None
        self.stall = 30.0  # seconds
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

    def count(self, kind: str, path: str, sent: int) -> None:
        with self._lock:
            self.seen[kind] += 1
            self.requests[path] += 1
            self.sent += sent


@contextmanager
def faulty_store(target: str) -> Iterator[tuple[str, FaultyStore]]:
    """(endpoint, the store) of a proxy for the server at `target`."""
    store = FaultyStore(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def _handle(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = store.plan(self.command, path)
            if kind == "error":
                store.count(kind, path, 0)
                text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                self.send_response(503)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return
            if kind == "reset":
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
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(data)
            store.count(kind or "fine", path, len(data))

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815  the names http.server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", store
    finally:
        server.shutdown()
        server.server_close()
