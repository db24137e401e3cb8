from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.shards.images import Dropped
from pipeline.shards.layout import sample_key
from pipeline.shards.samples import Files, Recipe, Sample, make_sample, read_samples
from pipeline.shards.sources import FolderSource, Item


@pytest.fixture
def png(photo: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> bytes:
    return encoded(photo(), "PNG")


def make(png: bytes, path: str = "a.png", ids: dict[str, int] | None = None, **side: bytes) -> Sample | Dropped:
    folder = path.partition("/")[0] if "/" in path else None
    item = Item(path, len(png), folder, {suffix: f"a.{suffix}" for suffix in side})
    return make_sample("k", item, Files(png, side), Recipe(), ids or {})


def test_members(png: bytes) -> None:
    sample = make(png, "dog/a.png", {"cat": 0, "dog": 1}, txt="ein Hündchen".encode(), json=b'{"score": 0.5, "source": "x"}')
    assert isinstance(sample, Sample)
    members = sample.members()
    assert (members["png"], members["cls"], members["txt"].decode()) == (png, b"1", "ein Hündchen")
    assert json.loads(members["json"]) == {"score": 0.5, "source": "dog/a.png"}
    alone = make(png)
    assert isinstance(alone, Sample) and alone.label == -1 and sorted(alone.members()) == ["json", "png"]


def test_a_label_beside_a_flat_image(png: bytes) -> None:
    sample = make(png, cls=b" 7\n")
    assert isinstance(sample, Sample) and sample.label == 7


@pytest.mark.parametrize(
    ("reason", "side"),
    [
        ("bad-cls", {"cls": b"seven"}),
        ("bad-cls", {"cls": b"-1"}),
        ("bad-cls", {"cls": b"\xff"}),
        ("bad-cls", {"cls": b"1000000"}),
        ("bad-txt", {"txt": b"\xff\xfe"}),
        ("bad-json", {"json": b"[1, 2]"}),
        ("bad-json", {"json": b"{"}),
        ("bad-json", {"json": b'{"a": NaN}'}),
        ("bad-json", {"json": b"[" * 100_000}),
    ],
)
def test_bad_side_files_are_a_reason(png: bytes, reason: str, side: dict[str, bytes]) -> None:
    sample = make(png, **side)
    assert isinstance(sample, Dropped) and sample.reason == reason


def test_a_vanished_file_is_unreadable_but_a_vanished_folder_is_an_error(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.png").write_bytes(png)
    samples = [(sample_key(p), Item(p, 1)) for p in ("a.png", "b.png")]
    source = FolderSource(str(tmp_path / "in"))
    (_, first), (_, second) = read_samples(source, samples, Recipe(), [])
    assert first == Dropped("unreadable", "the file vanished after it was listed")
    assert isinstance(second, Sample)
    (tmp_path / "in").rename(tmp_path / "out")
    with pytest.raises(DataError, match="no longer there"):
        list(read_samples(source, samples, Recipe(), []))


def test_names_that_are_not_utf8(tmp_path: Path, png: bytes) -> None:
    import os

    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(png)
    listing = FolderSource(str(tmp_path)).scan()
    ((_, sample),) = read_samples(FolderSource(str(tmp_path)), [(sample_key(i.path), i) for i in listing.items], Recipe(), [])
    assert isinstance(sample, Sample)
    assert json.loads(sample.meta) == {"source": "caf\ufffd.png"}
