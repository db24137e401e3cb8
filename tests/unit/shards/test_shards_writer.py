from __future__ import annotations

import errno
import hashlib
import io
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from pipeline.core.errors import DataError, StorageError
from pipeline.core.storage import Storage
from pipeline.shards import writer
from pipeline.shards.fill import in_order
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import INDEX_SCHEMA
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard


@pytest.fixture
def samples(photo: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> list[Sample]:
    made = []
    for n in range(10):
        kind, extension = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[n % 3]
        image = Checked(encoded(photo(20 + n, 30 - n, n), kind), extension, 20 + n, 30 - n)
        text = f"caption {n}".encode() if n % 2 else None
        made.append(Sample(sample_key(str(n)), image, n % 4 - 1, text, json.dumps({"source": f"{n}.x"}).encode()))
    return made


def test_offsets_point_at_the_bytes(tmp_path: Path, samples: list[Sample]) -> None:
    directory = Storage(str(tmp_path / "data"))
    written = write_shard(directory, "train-00000.tar", "train", samples)
    assert written is not None
    assert (written.smallest, written.largest_label) == ((20, 21), 2)
    record, tar = written.record, directory.read("train-00000.tar")
    assert (record.name, record.split, record.samples, record.bytes) == ("train-00000.tar", "train", 10, len(tar))
    assert record.sha256 == hashlib.sha256(tar).hexdigest()
    table = pq.read_table(io.BytesIO(directory.read("train-00000.index.parquet")))
    assert table.schema == INDEX_SCHEMA
    end = 0
    for row, sample in zip(table.to_pylist(), samples, strict=True):
        assert row["key"] == sample.key and row["cls"] == sample.label
        assert (row["width"], row["height"]) == (sample.image.width, sample.image.height)
        assert row["offset"] == end  # one after the other, nothing between
        end += row["length"]
        assert zlib.crc32(tar[row["offset"] : end]) == row["crc32"]

        def member(name: str, row: dict = row) -> bytes:
            return tar[row[f"{name}_offset"] :][: row[f"{name}_length"]]

        assert member("image") == sample.image.data
        assert hashlib.sha256(member("image")).hexdigest() == row["sha256"]
        assert member("json") == sample.meta
        if sample.text is None:
            assert (row["txt_offset"], row["txt_length"]) == (-1, -1)
        else:
            assert member("txt") == sample.text
    assert not tar[end:].strip(b"\0") and len(tar) - end >= 1024  # the end-of-archive marker


def test_plain_webdataset_reads_it(tmp_path: Path, samples: list[Sample]) -> None:
    write_shard(Storage(str(tmp_path)), "train-00000.tar", "train", samples)
    read = list(wds.WebDataset(str(tmp_path / "train-00000.tar"), shardshuffle=False).decode("pil"))
    assert [r["__key__"] for r in read] == [s.key for s in samples]
    for got, sample in zip(read, samples, strict=True):
        assert got.get("cls") == (sample.label if sample.label >= 0 else None)
        assert got.get("txt") == (sample.text.decode() if sample.text else None)
        assert got[sample.image.extension].size == (sample.image.width, sample.image.height)


def test_same_samples_same_bytes(tmp_path: Path, samples: list[Sample]) -> None:
    one, two = Storage(str(tmp_path / "1")), Storage(str(tmp_path / "2"))
    for directory in (one, two):
        write_shard(directory, "a.tar", "a", iter(samples))
    for name in ("a.tar", "a.index.parquet"):
        assert one.read(name) == two.read(name)
    assert one.names() == ["a.index.parquet", "a.tar"]


def test_no_samples_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"of an attempt that was killed")
    assert write_shard(Storage(str(tmp_path)), "a.tar", "a", []) is None
    assert list(tmp_path.iterdir()) == []


def test_it_is_what_webdatasets_own_writer_writes(tmp_path: Path, samples: list[Sample]) -> None:
    assert write_shard(Storage(str(tmp_path)), "a.tar", "a", samples) is not None
    with (tmp_path / "b.tar").open("wb") as file, wds.TarWriter(file, mtime=0, user="", group="", encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members()})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_more_than_one_block(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, found = Storage(str(tmp_path)), []
    for block, synced in ((1 << 20, 1 << 25), (1, 1), (3000, 5000)):
        monkeypatch.setattr(writer, "_BLOCK", block)
        monkeypatch.setattr(writer, "_SYNCED", synced)
        found.append((write_shard(directory, "a.tar", "a", iter(samples)), directory.read("a.tar"), directory.read("a.index.parquet")))
    assert found[0] == found[1] == found[2]


def test_a_source_that_fails_leaves_nothing(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_BLOCK", 1)

    def failing() -> Iterator[Sample]:
        yield from samples
        raise DataError("the source has gone")

    with pytest.raises(DataError, match="the source has gone"):
        write_shard(Storage(str(tmp_path)), "a.tar", "a", failing())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_indexed_is_not_published(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """However much comes behind it: the writer does not wait for an index that has failed."""
    monkeypatch.setattr(writer, "_BLOCK", 1)
    bad = replace(samples[0], key="bad", meta=b"[]")
    with pytest.raises(AssertionError, match="bad-json"):
        write_shard(Storage(str(tmp_path)), "a.tar", "a", [bad, *samples])
    monkeypatch.setattr(writer, "TarIndex", lambda hashed: None)
    with pytest.raises(AttributeError):
        write_shard(Storage(str(tmp_path)), "a.tar", "a", [replace(samples[0], key=str(n)) for n in range(50)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "error", "told"),
    [
        ("", errno.ENOSPC, "storage .*: cannot write, the disk is full: a.tar does not fit$"),
        ("s3://b/c", errno.ENOSPC, "a.tar does not fit .TMPDIR"),
        ("", errno.EDQUOT, "storage .*: cannot write, the disk quota is used up: a.tar does not fit$"),
    ],
)
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, url: str, error: int, told: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(error, "no room")

    monkeypatch.setattr(writer, "_write_tar", full)
    with pytest.raises(StorageError, match=told):
        write_shard(Storage(url or str(tmp_path)), "a.tar", "a", samples)
    assert list(tmp_path.iterdir()) == []


class _Full(FileIO):
    """On a disk with room for some bytes, fewer than the images have."""

    room = 500

    def write(self, data: Any) -> int:
        part = memoryview(data)[: self.room]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(part)
        return super().write(part)


def test_where_images_wait_for_those_before_them_may_be_another_disk(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the disk that is full: not that of the dataset."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: _Full(tmp_path / "waiting", "w+b"))
    late = [*enumerate(samples)][::-1]
    assert list(in_order(iter(late), len(samples), 1 << 20)) == late[::-1]

    def made() -> Iterator[Sample]:
        for _, sample in in_order(iter(late), len(samples), 0):
            assert isinstance(sample, Sample)
            yield sample

    told = rf"^{tempfile.gettempdir()}: cannot write here what is being put together, the disk is full \(TMPDIR"
    with pytest.raises(StorageError, match=told):
        write_shard(Storage(str(tmp_path / "out")), "a.tar", "a", made())


def test_large_samples_do_not_pile_up(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks larger than what may wait, one is on its way and one is made."""
    monkeypatch.setattr(writer, "_BLOCK", 1)
    monkeypatch.setattr(writer, "_AHEAD", 1)
    kept, most, real = 0, 0, writer.write_all

    def keep(file: FileIO, data: bytes) -> None:
        nonlocal kept
        time.sleep(0.005)  # longer than it takes to make one
        real(file, data)
        kept += 1

    def made() -> Iterator[Sample]:
        nonlocal most
        for number, sample in enumerate(samples):
            most = max(most, number - kept)
            yield sample

    monkeypatch.setattr(writer, "write_all", keep)
    assert write_shard(Storage(str(tmp_path)), "a.tar", "a", made()) is not None
    assert most == 1 and kept == len(samples) + 1
