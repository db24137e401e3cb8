"""One tar shard and its index: written to a local file, read back, and only then published."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.shards.index import TarIndex, index_schema, smallest
from pipeline.shards.manifest import ShardRecord, table_bytes
from pipeline.shards.samples import Sample
from pipeline.shards.tars import Tape

_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class WrittenShard:
    """Its row in the table of shards, the least width and least height of its images, and its largest label (-1: none)."""

    record: ShardRecord
    smallest: tuple[int, int]
    largest_label: int


def write_shard(directory: Storage, name: str, split: str, samples: Iterable[Sample], hashed: bool = False) -> WrittenShard | None:
    """Publish `name` and its index in `directory`, with perceptual hashes where it is to be `hashed`; without samples nothing is written
    and None is returned.

    Raises:
        StorageError: `directory`, or the machine's temporary directory, cannot take it.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-shard-") as folder:
        tar = Path(folder, name)
        try:
            keys = _write_tar(tar, samples)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise StorageError(f"{folder}: cannot write the shard {name} here, the disk is full (TMPDIR names another place)") from e
            raise
        if not keys:
            return None
        rows, digest = _read_back(tar, keys, hashed)
        directory.put(tar, name)
        record = ShardRecord(name, split, len(rows), tar.stat().st_size, digest)
    directory.write(record.index_name, table_bytes(rows, index_schema(hashed=hashed)))
    return WrittenShard(record, smallest(rows), max(row["cls"] for row in rows))


def _write_tar(path: Path, samples: Iterable[Sample]) -> list[str]:
    """The keys written. The same samples give the same bytes: no time, no owner, members in order of their names."""
    keys = []
    with path.open("wb") as file, TarWriter(file, mtime=0, user="", group="", encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members()})
            keys.append(sample.key)
    return keys


def _read_back(path: Path, written: list[str], hashed: bool) -> tuple[list[dict[str, Any]], str]:
    """(rows of the index, sha256 of the tar), from the bytes as they lie on disk; `written` are the keys of its samples."""
    index = TarIndex(hashed=hashed)
    with path.open("rb") as file:
        tape = Tape(iter(partial(file.read, _BLOCK), b""))
        end = index.read(tape)
        tape.drain()
    rows = index.rows
    assert end.kind == "whole" and not index.dropped, f"{path.name}: {end}, {index.dropped[:1]}"
    assert [row["key"] for row in rows] == written, "samples come back in the order in which they were written"
    return rows, tape.whole.hexdigest()
