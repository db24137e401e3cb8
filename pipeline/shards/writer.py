"""One tar shard and its index: written to a local file, read back, and only then published."""

from __future__ import annotations

import errno
import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import INDEX_SCHEMA, ShardRecord, table_bytes
from pipeline.shards.samples import Sample

_BLOCK = 512  # a tar is made of these
_IMAGES = ("jpg", "png", "webp")


@dataclass(frozen=True)
class WrittenShard:
    """Its row in the table of shards, the least width and least height of its images, and its largest label (-1: none)."""

    record: ShardRecord
    smallest: tuple[int, int]
    largest_label: int


@dataclass(frozen=True)
class _Known:
    key: str
    label: int
    width: int
    height: int


def write_shard(directory: Storage, name: str, split: str, samples: Iterable[Sample]) -> WrittenShard | None:
    """Publish `name` and its index in `directory`; without samples nothing is written and None is returned.

    Raises:
        StorageError: `directory`, or the machine's temporary directory, cannot take it.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-shard-") as folder:
        tar = Path(folder, name)
        try:
            known = _write_tar(tar, samples)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise StorageError(f"{folder}: cannot write the shard {name} here, the disk is full (TMPDIR names another place)") from e
            raise
        if not known:
            return None
        rows, digest = read_index(tar, known)
        directory.put(tar, name)
        record = ShardRecord(name, split, len(rows), tar.stat().st_size, digest)
    directory.write(record.index_name, table_bytes(rows, INDEX_SCHEMA))
    smallest = (min(s.width for s in known), min(s.height for s in known))
    return WrittenShard(record, smallest, max(s.label for s in known))


def _write_tar(path: Path, samples: Iterable[Sample]) -> list[_Known]:
    """The same samples give the same bytes: no time, no owner, members in order of their names."""
    known = []
    with path.open("wb") as file, TarWriter(file, mtime=0, user="", group="", encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members()})
            known.append(_Known(sample.key, sample.label, sample.image.width, sample.image.height))
    return known


def read_index(path: Path, known: list[_Known]) -> tuple[list[dict[str, Any]], str]:
    """(rows of `INDEX_SCHEMA`, sha256 of the tar), from the bytes as they lie on disk."""
    samples: list[list[tarfile.TarInfo]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not samples or _key(samples[-1][0]) != _key(member):
                samples.append([])
            samples[-1].append(member)
    rows = []
    whole = hashlib.sha256()
    with path.open("rb") as file:
        for members, sample in zip(samples, known, strict=True):
            assert _key(members[0]) == sample.key, "samples come back in the order in which they were written"
            start, last = members[0].offset, members[-1]
            data = file.read(last.offset_data + -(-last.size // _BLOCK) * _BLOCK - start)
            whole.update(data)
            rows.append(_row(members, sample, data, start))
        while block := file.read(1 << 20):  # the end of the archive
            whole.update(block)
    return rows, whole.hexdigest()


def _row(members: list[tarfile.TarInfo], sample: _Known, data: bytes, start: int) -> dict[str, Any]:
    places = {m.name.partition(".")[2]: (m.offset_data, m.size) for m in members}
    image = next(places[suffix] for suffix in _IMAGES if suffix in places)
    row: dict[str, Any] = {"key": sample.key, "offset": start, "length": len(data)}
    for member, (offset, length) in {"image": image, "txt": places.get("txt", (-1, -1)), "json": places.get("json", (-1, -1))}.items():
        row |= {f"{member}_offset": offset, f"{member}_length": length}
    pixels = data[image[0] - start : image[0] - start + image[1]]
    return row | {
        "cls": sample.label,
        "width": sample.width,
        "height": sample.height,
        "crc32": zlib.crc32(data),
        "sha256": hashlib.sha256(pixels).hexdigest(),
    }


def _key(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]
