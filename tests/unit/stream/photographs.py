"""Photographs that come with the libraries Tessera needs, for tests of what happens to pixels."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import matplotlib.cbook
import sklearn.datasets
from PIL import Image


@cache
def photographs() -> list[Image.Image]:
    """A temple and a flower (640 x 427), a portrait (512 x 600); RGB."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [Image.open(path).convert("RGB") for path in (folder / "china.jpg", folder / "flower.jpg", portrait)]


def photograph(width: int, height: int, which: int = 0) -> Image.Image:
    """Cut from the middle, then shrunk."""
    whole = photographs()[which]
    factor = min(whole.width / width, whole.height / height)
    w, h = width * factor, height * factor
    left, top = int(whole.width - w) // 2, int(whole.height - h) // 2
    return whole.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + int(w), top + int(h)))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
