"""A web server that misbehaves: real HTTP over real sockets on loopback, for tests of what downloads whatever strangers' URLs give.

The first part of a URL's path says how it is answered, the rest is a name, so that there may be many of each kind:

/good/NAME          the image                              /hang/NAME         nothing, ever
/files/NAME         what `files` holds under that name     /drip/NAME         headers, a byte at a time, without end
/empty/NAME         200, no bytes; /gzip-empty/: packed    /drip-body/NAME    the image, a byte at a time
/page/NAME          200, an HTML page called image/jpeg    /endless/NAME      a body without end
/truncated/NAME     half the image, then the end           /chunks/NAME       the image in chunks; /bad-chunks/: not quite
/reset/NAME         a reset before the answer              /bomb/NAME         64 MiB in 64 kB of gzip
/garbage/NAME       no HTTP                                /gzip/NAME         the image, compressed; /bad-gzip/: not quite
/status/N/NAME      that status                            /loop/NAME         a redirect to itself, by way of another
/flaky/N/T/NAME     T times status N, then the image       /hops/N/NAME       N redirects, then the image
/busy/T/S/NAME      T times 429 with Retry-After: S        /to/URL            a redirect there (percent-encoded)
/opt-out/TAG/NAME   the image, with X-Robots-Tag: TAG      /cookie/NAME       the image, and a cookie
/old/NAME           the image, in HTTP/1.0                 /swollen/NAME      the image, compressed, and zeros without end
/headers/NAME       headers without end                    /nothing/NAME      gzip without end, that stands for no bytes
"""

from __future__ import annotations

import gzip
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

_DRIP = 0.05  # seconds between two bytes
_GZIP = b"Content-Encoding: gzip\r\n\r\n"
_ENDLESS: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {  # what follows a status line, and what then comes again and again
    "endless": lambda image: (b"Content-Type: image/jpeg\r\n\r\n" + image, bytes(1)),
    "swollen": lambda image: (_GZIP + gzip.compress(image), bytes(1)),
    "nothing": lambda _: (_GZIP + gzip.compress(b"")[:10], b"\0\0\0\xff\xff"),  # an empty block
    "headers": lambda _: (b"", b"X-Filler: a\r\n"),
}


@dataclass(frozen=True)
class Seen:
    """A request: which of the connections it came by, its headers' names in lower case, and when (`time.monotonic`)."""

    path: str
    headers: dict[str, str]
    connection: int
    when: float


@dataclass
class Hostile:
    """`robots`: the body of robots.txt, or the status that it is answered with instead. `seen` holds what was asked for, robots.txt too."""

    image: bytes
    files: dict[str, bytes] = field(default_factory=dict)
    robots: bytes | int = 404
    delay: float = 0.0  # seconds, before any answer
    seen: list[Seen] = field(default_factory=list)
    most_at_once: int = 0  # requests
    most_open: int = 0  # connections
    port: int = 0

    def __post_init__(self) -> None:
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._under_way = self._open = 0
        self._times: Counter[str] = Counter()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    def paths(self) -> list[str]:
        """Of all requests but those for robots.txt."""
        return [seen.path for seen in list(self.seen) if seen.path != "/robots.txt"]

    def connected(self, change: int) -> None:
        with self._lock:
            self._open += change
            self.most_open = max(self.most_open, self._open)

    def begin(self, seen: Seen) -> int:
        """Returns how often this path was asked for before."""
        with self._lock:
            self.seen.append(seen)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self._times[seen.path] += 1
            return self._times[seen.path] - 1

    def end(self) -> None:
        with self._lock:
            self._under_way -= 1


class _Handler(socketserver.StreamRequestHandler):
    """One connection; ends when a handler of a request says so."""

    server: _Server

    def handle(self) -> None:
        self.server.hostile.connected(1)
        try:
            self._requests(self.server.hostile, self.server.number())
        finally:
            self.server.hostile.connected(-1)

    def _requests(self, hostile: Hostile, number: int) -> None:
        while (request := self._request()) is not None:
            path, headers = request
            times = hostile.begin(Seen(path, headers, number, time.monotonic()))
            try:
                hostile.ending.wait(hostile.delay)
                stays = self._answer(path, times)
            finally:
                hostile.end()
            if not stays or headers.get("connection") == "close":
                return

    def finish(self) -> None:
        with suppress(OSError):  # the client left first
            super().finish()

    def _request(self) -> tuple[str, dict[str, str]] | None:
        try:
            if self.rfile.peek(1)[:1] == b"\x16":  # somebody begins to speak TLS
                self._raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return None
            line = self.rfile.readline()
            headers = {}
            while (header := self.rfile.readline()).strip():
                name, _, value = header.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
        except OSError:
            return None
        return (line.split()[1].decode("latin-1"), headers) if line.strip() else None

    def _answer(self, path: str, times: int) -> bool:
        """Returns whether the connection can be used again."""
        try:
            return self._misbehave(path, times)
        except OSError:  # the client has had enough
            return False

    def _misbehave(self, path: str, times: int) -> bool:
        hostile = self.server.hostile
        kind, _, name = path.lstrip("/").partition("/")
        match kind:
            case "robots.txt":
                return self._send(hostile.robots) if isinstance(hostile.robots, int) else self._send(200, hostile.robots)
            case "good":
                return self._send(200, hostile.image)
            case "files":
                return self._send(200, hostile.files[unquote(name)]) if unquote(name) in hostile.files else self._send(404)
            case "empty" | "gzip-empty":
                return self._send(200, b"", *(["Content-Encoding: gzip"] if kind == "gzip-empty" else []))
            case "page":
                return self._send(200, b"<!DOCTYPE html><title>Not found</title>", "Content-Type: image/jpeg")
            case "truncated":
                self._raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(hostile.image), hostile.image[: len(hostile.image) // 2])
            case "reset":
                self._reset()
            case "garbage":
                self._raw(b"220 mail.example.com ESMTP ready\r\n")
            case "status":
                return self._send(int(name.partition("/")[0]), b"no")
            case "flaky":
                status, most, _ = name.split("/", 2)
                return self._send(int(status), b"no") if times < int(most) else self._send(200, hostile.image)
            case "busy":
                most, after, _ = name.split("/", 2)
                return self._send(429, b"no", f"Retry-After: {unquote(after)}") if times < int(most) else self._send(200, hostile.image)
            case "opt-out":
                tag = unquote(name.partition("/")[0])
                return self._send(200, hostile.image, *(f"X-Robots-Tag: {line}" for line in tag.splitlines()))
            case "cookie":
                return self._send(200, hostile.image, "Set-Cookie: who=you")
            case "loop" | "loop-back":
                return self._send(302, b"", f"Location: /{'loop-back' if kind == 'loop' else 'loop'}/{name}")
            case "hops":
                left, _, rest = name.partition("/")
                return self._send(301, b"", f"Location: /hops/{int(left) - 1}/{rest}") if int(left) else self._send(200, hostile.image)
            case "to":
                return self._send(302, b"", f"Location: {unquote(name, 'latin-1')}")
            case "hang":
                hostile.ending.wait()
            case "drip":
                self._raw(b"HTTP/1.1 200 OK\r\nX-Filler: ")
                self._drip(b"a" * (1 << 30))
            case "drip-body":
                self._raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(hostile.image))
                self._drip(hostile.image)
            case "endless" | "swollen" | "nothing" | "headers":
                beginning, rest = _ENDLESS[kind](hostile.image)
                self._raw(b"HTTP/1.1 200 OK\r\n", beginning)
                while not hostile.ending.is_set():
                    self._raw(rest * ((1 << 16) // len(rest)))
            case "old":
                self._raw(b"HTTP/1.0 200 OK\r\n\r\n", hostile.image)
            case "chunks" | "bad-chunks":
                self._raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for start in range(0, len(hostile.image), 1000):
                    part = hostile.image[start : start + 1000]
                    self._raw(b"%x\r\n%s\r\n" % (len(part), part))
                self._raw(b"0\r\n\r\n" if kind == "chunks" else b"zz\r\n\r\n")
                return kind == "chunks"
            case "bomb":
                return self._send(200, gzip.compress(bytes(1 << 26)), "Content-Encoding: gzip")
            case "gzip" | "bad-gzip":
                packed = gzip.compress(hostile.image)
                return self._send(200, packed if kind == "gzip" else packed[:50] + bytes(50), "Content-Encoding: gzip")
            case _:
                return self._send(404)
        return False

    def _send(self, status: int, body: bytes = b"", *headers: str) -> bool:
        if status in (204, 304):  # have no body
            self._raw("\r\n".join([f"HTTP/1.1 {status} Whatever", *headers]).encode("latin-1") + b"\r\n\r\n")
            return True
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
        self._raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        return True

    def _raw(self, *parts: bytes) -> None:
        self.wfile.write(b"".join(parts))
        self.wfile.flush()

    def _drip(self, data: bytes) -> None:
        for byte in data:
            self._raw(bytes([byte]))
            if self.server.hostile.ending.wait(_DRIP):
                return

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], hostile: Hostile) -> None:
        super().__init__(address, _Handler)
        self.hostile = hostile
        self._number = iter(range(1 << 30))

    def number(self) -> int:
        return next(self._number)


@contextmanager
def hostile_server(image: bytes, address: str = "127.0.0.1", port: int = 0, **options: object) -> Iterator[Hostile]:
    """A server at `address`, whose every good answer is `image`; `options` are fields of `Hostile`."""
    hostile = Hostile(image, **options)  # type: ignore[arg-type]
    with _Server((address, port), hostile) as server:
        hostile.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hostile
        finally:
            hostile.ending.set()
            server.shutdown()
            thread.join()


@contextmanager
def witness(address: str, port: int = 0) -> Iterator[tuple[int, list[object]]]:
    """(port, connections made to it), of a socket to which nothing should ever come; the list is complete when the context ends."""
    came: list[object] = []
    with socket.create_server((address, port)) as listening:
        ending = threading.Event()

        def watch() -> None:
            listening.settimeout(0.05)
            while True:
                last = ending.is_set()  # whatever came until then lies in the backlog
                try:
                    connection, where = listening.accept()
                except TimeoutError:
                    if last:
                        return
                    continue
                came.append(where)
                connection.close()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1], came
        finally:
            ending.set()
            thread.join()
