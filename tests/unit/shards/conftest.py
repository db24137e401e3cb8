from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.fetch import hosts
from tests.hostile import Hostile, hostile_server
from tests.unit.shards.fetching import IMAGE


def _photo(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Smooth colours, so that JPEG keeps them, brighter to the top left, so that turning shows."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 - 4 * x - 2 * y, 250 - 6 * y, np.full_like(x, (seed * 37) % 256)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    return _photo


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def tree(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """40 cats, 40 dogs in PNG and JPEG, a caption each; a damaged image, an empty one, two files that are none."""
    root = tmp_path / "tree"
    for n in range(80):
        kind = ("cat", "dog")[n % 2]
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        suffix, name = (("JPEG", "jpg"), ("PNG", "png"))[n // 2 % 2]
        (folder / f"{n:03d}.{name}").write_bytes(encoded(_photo(40 + n % 5, 32, n), suffix))
        (folder / f"{n:03d}.txt").write_text(f"a {kind}, number {n}")
    good = encoded(_photo(64, 64), "JPEG")
    (root / "dog" / "damaged.jpg").write_bytes(good[:-40])
    (root / "cat" / "nothing.png").write_bytes(b"")
    (root / "README.md").write_text("about")
    (root / "cat" / "Thumbs.db").write_bytes(b"\0" * 99)
    return root


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """A web server that misbehaves, and short pauses between attempts."""
    monkeypatch.setattr(hosts, "PAUSE", 0.02)
    with hostile_server(IMAGE) as server:
        yield server


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes names resolve to given addresses, one after another where there are several; returns the names that were asked for."""
    real = socket.getaddrinfo

    def install(**names: list[str]) -> list[str]:
        asked: list[str] = []

        def lie(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
            name = str(host).split(".")[0]
            if name in names:
                asked.append(name)
                address = names[name].pop(0) if len(names[name]) > 1 else names[name][0]
                return real(address, port, *rest, **options)
            return real(host, port, *rest, **options)

        monkeypatch.setattr(socket, "getaddrinfo", lie)
        return asked

    return install
