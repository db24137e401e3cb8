"""One tar shard and its index: written, indexed by the bytes as they are written, and only then published.

The tar is what webdataset's TarWriter writes, byte for byte (`tests/unit/shards/test_shards_tar_properties.py`), in less time:
no time, no owner, a sample's members in order of their names. Rows of the index are made as the bytes are, by what makes
those of any tar (`index.py`), which is told here where members lie, and need not look for them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import StorageError
from pipeline.core.files import write_all
from pipeline.core.storage import Storage
from pipeline.shards.index import TarIndex, index_schema, smallest
from pipeline.shards.manifest import ShardRecord, table_bytes
from pipeline.shards.samples import Sample
from pipeline.shards.tars import header

_BLOCK = 1 << 20  # bytes that are written at once
_AHEAD = 1 << 23  # bytes of blocks made and not yet written, and of their images once more, beside the block made last
_SYNCED = 1 << 25  # bytes after which the disk is told to begin, so that there is little left to wait for at the end
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


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
        where, other = (f"storage {directory.url}", "") if directory.is_local else (folder, " (TMPDIR names another place)")
        with _room_explained(where, f"{name} does not fit{other}"):
            rows, size, digest = _write_tar(tar, samples, keys, directory.is_local, hashed)
        if not keys:
            for left in (name, ShardRecord(name, split, 0, 0, "").index_name):
                directory.remove(left)  # of an attempt that was killed, to which hosts had answered otherwise
            return None
        assert [row["key"] for row in rows] == keys, "samples come back in the order in which they were written"
        assert tar.stat().st_size == size, f"{name}: {tar.stat().st_size} bytes came of {size}"
        tar.chmod(0o644)
        directory.put(tar, name, move=directory.is_local)
    record = ShardRecord(name, split, len(rows), size, digest)
    directory.write(record.index_name, table_bytes(rows, index_schema(hashed=hashed)))
    return WrittenShard(record, smallest(rows), max(row["cls"] for row in rows))


@contextmanager
def _room_explained(where: str, what: str) -> Iterator[None]:
    """Say of a disk that is full, `where`, `what` that means. Raises StorageError."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise StorageError(f"{where}: cannot write, {_FULL[e.errno]}: {what}") from e


def _write_tar(path: Path, samples: Iterable[Sample], keys: list[str], sync: bool, hashed: bool) -> tuple[list[dict[str, Any]], int, str]:
    """(rows of the index, bytes, sha256) of the tar; `keys` gets those of the samples."""
    digest, index, digests = hashlib.sha256(), TarIndex(hashed=hashed), list[str]()
    under_way = deque[tuple[int, Future[None], Future[list[str]]]]()  # bytes, and what is done with them

    def keep(block: bytes) -> None:
        write_all(file, block)
        digest.update(block)

    def settle(most: int) -> None:
        held = sum(length for length, *_ in under_way)
        while held > most:
            length, kept, hashed_images = under_way.popleft()
            kept.result()
            digests.extend(hashed_images.result())
            held -= length

    # This thread does all of Python's work, else threads would wait for each other; the others write, hash and sync whole blocks.
    size, synced, syncing = 0, 0, Future[None]()
    syncing.set_result(None)
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as disk,
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(1) as hasher,
    ):
        for block, images in _blocks(samples, keys, index):
            settle(_AHEAD)  # of those before it, so that one at least is under way while the next is made
            size += len(block)
            under_way.append((len(block), writer.submit(keep, block), hasher.submit(_digests, images)))
            if sync and size - synced >= _SYNCED and syncing.done():
                syncing.result()
                syncing, synced = disk.submit(os.fdatasync, file.fileno()), size
        settle(0)
        syncing.result()
    assert not index.dropped, f"{path.name}: {index.dropped[:1]}"
    rows = [{**row, "sha256": of_image} for row, of_image in zip(index.rows, digests, strict=True)]
    return rows, size, digest.hexdigest()


def _digests(images: list[bytes]) -> list[str]:
    return [hashlib.sha256(image).hexdigest() for image in images]


def _blocks(samples: Iterable[Sample], keys: list[str], index: TarIndex) -> Iterator[tuple[bytes, list[bytes]]]:
    """The bytes of a tar with the end-of-archive marker, which fills its last record, in blocks, each with the images that end in it;
    `index` is told of each sample."""
    pieces, images, begun, position = list[bytes](), list[bytes](), 0, 0  # `begun`: where the block at hand begins
    for sample in samples:
        start, first, members = position, len(pieces), list[tuple[str, int, bytes]]()
        for suffix, data in sorted(sample.members().items()):
            head, padding = header(f"{sample.key}.{suffix}", len(data)), bytes(-len(data) % tarfile.BLOCKSIZE)
            members.append((suffix, position + len(head), data))
            pieces += (head, data, padding)
            position += len(head) + len(data) + len(padding)
        crc = 0
        for piece in pieces[first:]:
            crc = zlib.crc32(piece, crc)
        index.add(sample.key, members, start, position, crc)
        keys.append(sample.key)
        images.append(sample.image.data)
        if position - begun >= _BLOCK:
            yield b"".join(pieces), images
            pieces, images, begun = [], [], position
    end = position + 2 * tarfile.BLOCKSIZE
    yield b"".join([*pieces, bytes(end - position + -end % tarfile.RECORDSIZE)]), images
