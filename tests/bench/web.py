"""A fast web server for benchmarks: photographs from memory, in a process of its own.

    python -m tests.bench.web FOLDER        prints its port; /<number>.jpg is file <number> modulo how many there are

`/times` gives, as JSON, when the first image was asked for since the last time that somebody asked for it, and how many.
"""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tests.unit.stream.photographs import photographs

LEAST, MOST = 300, 800  # pixels a side


def photograph(seed: int) -> bytes:
    """A part of a real photograph (`photographs`), between 300 and 800 pixels a side, as a JPEG of quality 90."""
    random = np.random.default_rng(seed)
    whole = photographs()[int(random.integers(len(photographs())))]
    width, height = (int(n) for n in random.integers(LEAST, MOST + 1, 2))
    scale = random.uniform(0.7, 1.0) * min(whole.width / width, whole.height / height)
    left, top = random.uniform(0, whole.width - scale * width), random.uniform(0, whole.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    part = whole.resize((width, height), Image.Resampling.BICUBIC, box)
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    part.save(data := io.BytesIO(), "JPEG", quality=90)
    return data.getvalue()


def make_photographs(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for n, data in enumerate(pool.map(photograph, range(count), chunksize=50)):
            (folder / f"{n:05d}.jpg").write_bytes(data)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a well-behaved client needs it."""

    files: list[bytes]
    first = 0.0
    asked = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            request, self._received = self._received[:end], self._received[end + 4 :]
            self._answer(request.split(b" ", 2)[1])
            if b"connection: close" in request.lower():
                self._transport.close()
                return

    def _answer(self, path: bytes) -> None:
        if path.endswith(b".jpg"):
            count = _Connection
            count.first, count.asked = count.first if count.asked else time.time(), count.asked + 1
            self._send(b"200 OK", b"image/jpeg", self.files[int(path[1:-4]) % len(self.files)])
        elif path == b"/times":
            self._send(b"200 OK", b"application/json", json.dumps([_Connection.first, _Connection.asked]).encode())
            _Connection.asked = 0
        else:
            self._send(b"404 Not Found", b"text/plain", b"")

    def _send(self, status: bytes, kind: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body))
        self._transport.writelines([head, body])


async def _serve(folder: Path) -> None:
    _Connection.files = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The port of a server of the JPEGs in `folder`."""
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.web", str(folder)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


def times(port: int) -> tuple[float, int]:
    """(when the first image was asked for, in seconds since 1970; how many were) since this was called last."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/times") as answer:
        first, asked = json.load(answer)
    return float(first), int(asked)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
