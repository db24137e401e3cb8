"""One tar shard and its index: written, indexed by the bytes as they are written, and only then published.

The tar is what webdataset's TarWriter writes, byte for byte (`tests/unit/shards/test_shards_tar_properties.py`), in less time:
no time, no owner, a sample's members in order of their names. Its bytes go to a file, and at the same time through what reads
any tar (`index.py`), which makes the rows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.shards.index import TarIndex, index_schema, smallest
from pipeline.shards.manifest import ShardRecord, table_bytes
from pipeline.shards.samples import Sample
from pipeline.shards.tars import Tape, header

_BLOCK = 1 << 20  # bytes that are written at once
_AHEAD = 8  # blocks indexed and not yet written
_SYNCED = 1 << 25  # bytes after which the disk is told to begin, so that there is little left to wait for at the end


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
    if directory.is_local:
        os.makedirs(directory.path, exist_ok=True)
    # Beside its place, so that it is published by its name alone; what a killed process leaves has a name that is no shard's.
    with tempfile.TemporaryDirectory(prefix=".tmp-shard-", dir=directory.path if directory.is_local else None) as folder:
        tar, keys = Path(folder, name), list[str]()
        try:
            rows, size, digest = _write_tar(tar, samples, keys, directory.is_local, hashed)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            where = f"storage {directory.url}" if directory.is_local else folder
            other = "" if directory.is_local else " (TMPDIR names another place)"
            raise StorageError(f"{where}: cannot write, the disk is full: {name} does not fit{other}") from e
        if not keys:
            directory.remove(name)  # of an attempt that was killed, to which hosts had answered otherwise
            return None
        assert [row["key"] for row in rows] == keys, "samples come back in the order in which they were written"
        assert tar.stat().st_size == size, f"{name}: {tar.stat().st_size} bytes came of {size}"
        tar.chmod(0o644)
        directory.put(tar, name, move=directory.is_local)
    record = ShardRecord(name, split, len(rows), size, digest)
    directory.write(record.index_name, table_bytes(rows, index_schema(hashed=hashed)))
    return WrittenShard(record, smallest(rows), max(row["cls"] for row in rows))


def _write_tar(path: Path, samples: Iterable[Sample], keys: list[str], sync: bool, hashed: bool) -> tuple[list[dict[str, Any]], int, str]:
    """(rows of the index, bytes, sha256) of the tar; `keys` gets those of the samples."""
    digest, index, failed = hashlib.sha256(), TarIndex(hashed=hashed), list[BaseException]()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as pool:

        def keep(block: bytes) -> None:
            left = memoryview(block)
            while left:  # where the disk is nearly full a part is written, and the next attempt says so
                left = left[file.write(left) :]
            digest.update(block)

        def passing() -> Iterator[bytes]:
            keeping, syncing, unsynced = deque[Future[None]](), Future[None](), 0
            syncing.set_result(None)
            try:
                for block in _blocks(samples, keys):
                    keeping.append(pool.submit(keep, block))
                    yield block
                    if len(keeping) > _AHEAD:
                        keeping.popleft().result()
                    unsynced += len(block)
                    if sync and unsynced >= _SYNCED and syncing.done():
                        syncing.result()
                        syncing, unsynced = disk.submit(os.fdatasync, file.fileno()), 0
                for future in (*keeping, syncing):
                    future.result()
            except BaseException as e:  # noqa: BLE001  raised below; not to be mistaken for a damaged tar by what reads this
                failed.append(e)

        # One thread for all of Python's work, else they would wait for each other; the others write, hash and sync whole blocks.
        tape = Tape(passing(), hashed=False)
        end = index.read(tape)
        tape.drain()
    if failed:
        raise failed[0]
    assert end.kind == "whole" and not index.dropped, f"{path.name}: {end}, {index.dropped[:1]}"
    return index.rows, tape.position, digest.hexdigest()


def _blocks(samples: Iterable[Sample], keys: list[str]) -> Iterator[bytes]:
    """The bytes of a tar with the end-of-archive marker, which fills its last record."""
    pieces, held, size = list[bytes](), 0, 0
    for sample in samples:
        for suffix, data in sorted(sample.members().items()):
            pieces += (header(f"{sample.key}.{suffix}", len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE))
            held += tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE))
        keys.append(sample.key)
        if held >= _BLOCK:
            yield (block := b"".join(pieces))
            pieces, held, size = [], 0, size + len(block)
    pieces.append(bytes(2 * tarfile.BLOCKSIZE))
    size += sum(map(len, pieces))
    yield b"".join([*pieces, bytes(-size % tarfile.RECORDSIZE)])
