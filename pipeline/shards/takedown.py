"""Takedown lists: keys, URLs (or paths in the source) and sha256 of images that must go, matched with the samples of a dataset.

What is matched becomes `deny/takedown.parquet`; the shards stay as they are. A sample is matched by its key; by the sha256 of its image;
or by where it came from. Of a dataset made here from URLs the key is the hash of the URL, so its indices alone are looked at. Of others,
where a list has URLs or paths, the samples' json is read: its `source` and `url`, which our tars and img2dataset's have.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import split_file
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.deny import DenyListWriter, find_about
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import ShardRecord, read_manifest
from pipeline.shards.passes import over_shards
from pipeline.shards.rows import Row, read_index, read_rows

NAME = "takedown"
_KEY, _SHA256, _SOURCE = 0, 1, 2  # what a digest is of, and what an entry was given as
_WHAT = ("key", "sha256", "source")
_Digested = tuple[int, str, int]  # what it is of, the value, what the entry was given as
_DIGEST = 16  # bytes: of 1,000 million entries and as many samples, two agree by chance with probability 3e-21
_COLUMNS = ("key", "url", "sha256")
_ROWS = 1 << 16  # of a Parquet list, at a time
_BATCH = 1024  # samples whose json is read at a time
_HEX = re.compile(r"[0-9a-fA-F]+")


@dataclass(frozen=True)
class Listed:
    """Lists as they are matched, 25 bytes a digest, of which a URL has two: `digests` (D,) S16, sorted; of which entry each is,
    int64 (D,), and what that was given as, uint8 (D,). `hash` is of the lists' contents."""

    digests: np.ndarray
    entries: np.ndarray
    kinds: np.ndarray
    count: int
    hash: str

    @property
    def has_sources(self) -> bool:
        return bool((self.kinds == _SOURCE).any())


@dataclass(frozen=True)
class Takedown:
    """What a takedown did: `samples` denied; `entries` of the lists, of which `unmatched` are of no sample."""

    samples: int
    entries: int
    unmatched: int


def take_down(directory: Storage, lists: Sequence[str], workers: int | None = None, where: str = "shard.takedown") -> Takedown:
    """Publish `deny/takedown.parquet` (key, by) of the dataset at `directory`, over one that was there: the samples that an entry of
    `lists` (files at URLs) is of. Needs a Ray that is initialised; a list and dataset that were matched before are not matched again.

    Raises:
        ConfigError: a list is none. DataError, StorageError: the dataset, or a list, is missing or cannot be read.
    """
    manifest, listed = read_manifest(directory), read_lists(lists, directory.endpoint, where)
    made_of, about = {"dataset": manifest.hash, "lists": listed.hash}, find_about(directory, NAME)
    if about is None or not made_of.items() <= about.items():
        matched = np.zeros(listed.count, dtype=bool)
        with DenyListWriter(directory, NAME, {"by": pa.string()}) as out:
            found = over_shards("takedown", directory, match_shard, (directory, listed), lambda: f"{out.rows:,} taken down", workers)
            for rows, entries in found:
                out.add(rows)
                matched[entries] = True
            about = made_of | {"entries": listed.count, "unmatched": listed.count - int(matched.sum())}
            about["keys"] = out.publish(about)
    done = Takedown(about["keys"], about["entries"], about["unmatched"])
    say(f"takedown     {done.samples:,} samples denied; of {done.entries:,} entries {done.unmatched:,} are of no sample")
    return done


def check_lists(lists: Sequence[str], endpoint: str | None, where: str = "shard.takedown") -> None:
    """Preflight. Raises DataError for a list that is not there."""
    for n, url in enumerate(lists):
        directory, name = split_file(url, endpoint)
        if not directory.exists(name):
            raise DataError(f"{where}.{n}: there is no file {url}")


def read_lists(lists: Sequence[str], endpoint: str | None, where: str = "shard.takedown") -> Listed:
    """Text files, an entry a line: a key, a URL or path as the samples' json has it under `source`, or a sha256 in hexadecimal; or Parquet
    with columns `key`, `url`, `sha256`, any of them, an entry a row. Raises as `take_down`."""
    digests, entries, kinds, count, whole = bytearray(), bytearray(), bytearray(), 0, hashlib.sha256()
    for n, url in enumerate(lists):
        with tempfile.TemporaryDirectory(prefix="tessera-list-") as folder:
            path = Path(folder, "list")
            directory, name = split_file(url, endpoint)
            try:
                directory.get(name, path)
            except FileNotFoundError:
                raise DataError(f"{where}.{n}: there is no file {url}") from None
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
            for entry in _entries(path, f"{where}.{n}: {url}"):
                for kind, value, given in entry:
                    digests += _digest(kind, value)
                    entries += count.to_bytes(8, "little")
                    kinds.append(given)
                count += 1
    made = np.frombuffer(digests, dtype=f"S{_DIGEST}")
    order = np.argsort(made, kind="stable")
    found = Listed(
        made[order], np.frombuffer(entries, dtype="<i8")[order], np.frombuffer(kinds, dtype=np.uint8)[order], count, whole.hexdigest()
    )
    if not count:
        raise DataError(f"{where}: {', '.join(lists)}: there is no entry in any of them")
    return found


def match_shard(record: ShardRecord, directory: Storage, listed: Listed) -> tuple[pa.Table, np.ndarray]:
    """(rows of the deny-list, numbers of the entries that they are of) of one shard (the body of a Ray task)."""
    index = read_index(directory, record.index_name)
    keys = index["key"].to_pylist()
    found: dict[int, set[int]] = {}  # row -> places in `listed`

    def look(rows: Sequence[int], kind: int, values: Sequence[str]) -> None:
        if not rows:
            return
        wanted = np.array([_digest(kind, value) for value in values], dtype=f"S{_DIGEST}")
        first, end = np.searchsorted(listed.digests, wanted), np.searchsorted(listed.digests, wanted, side="right")
        for hit in np.flatnonzero(first < end):
            found.setdefault(rows[int(hit)], set()).update(range(first[hit], end[hit]))

    look(range(len(keys)), _KEY, keys)
    look(range(len(keys)), _SHA256, index["sha256"].to_pylist())
    if listed.has_sources and not _keys_are_urls(directory, record, index):
        row = 0
        for batch in read_rows(directory, record.name, index, frozenset({"json"}), _BATCH):
            told = [(row + n, source) for n, sample in enumerate(batch) for source in _sources(sample)]
            look([number for number, _ in told], _SOURCE, [source for _, source in told])
            row += len(batch)
    rows = sorted(found)
    # Of several entries the first listed says why.
    by = [_WHAT[listed.kinds[min(found[row], key=lambda place: (listed.entries[place], place))]] for row in rows]
    places = sorted(set().union(*found.values()))
    return pa.table({"key": pa.array([keys[row] for row in rows], pa.string()), "by": pa.array(by, pa.string())}), listed.entries[places]


def _entries(path: Path, what: str) -> Iterator[list[_Digested]]:
    """What each entry of a list may be of."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    try:
        yield from _of_parquet(path, what) if is_parquet else _of_text(path)
    except UnicodeDecodeError as e:
        raise DataError(f"{what} is neither Parquet nor UTF-8 text ({e})") from e
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{what} cannot be read ({e})") from e


def _of_text(path: Path) -> Iterator[list[_Digested]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not (entry := line.strip()):
                continue
            key = (_KEY, entry, _KEY)
            if "://" in entry:  # nobody's key
                yield _places(entry)
            elif not _HEX.fullmatch(entry):
                yield [key, *_places(entry)]
            else:  # others' keys may look like a sha256
                yield [key, (_SHA256, entry.lower(), _SHA256)] if len(entry) == 64 else [key]


def _of_parquet(path: Path, what: str) -> Iterator[list[_Digested]]:
    file = pq.ParquetFile(path)
    names = {name.lower(): name for name in file.schema_arrow.names if name.lower() in _COLUMNS}
    if not names:
        raise ConfigError(f"{what} has no column {', '.join(_COLUMNS)} (there: {', '.join(file.schema_arrow.names)})")
    for batch in file.iter_batches(_ROWS, columns=list(names.values())):
        for row in batch.to_pylist():
            given = {column: str(row[name]).strip() for column, name in names.items() if row[name] is not None}
            key = [(_KEY, given["key"], _KEY)] if "key" in given else []
            sha256 = [(_SHA256, given["sha256"].lower(), _SHA256)] if "sha256" in given else []
            yield [*key, *(_places(given["url"]) if "url" in given else []), *sha256]


def _places(source: str) -> list[_Digested]:
    """Of a URL or path: itself, and the key that it has where the key is its hash."""
    return [(_SOURCE, source, _SOURCE), (_KEY, sample_key(source), _SOURCE)]


def _digest(kind: int, value: str) -> bytes:
    return hashlib.blake2b(bytes([kind]) + value.encode("utf-8", "surrogateescape"), digest_size=_DIGEST).digest()


def _keys_are_urls(directory: Storage, record: ShardRecord, index: pa.Table) -> bool:
    """Whether the first sample's key is the hash of the URL that it came from: all of a source are alike."""
    [[first]] = read_rows(directory, record.name, index.slice(0, 1), frozenset({"json"}), 1)
    return any("://" in source and first.key == sample_key(source) for source in _sources(first))


def _sources(sample: Row) -> list[str]:
    """Where a sample came from, by its json."""
    values: dict[str, Any] = json.loads(sample.json or b"{}")
    return [value for name, value in values.items() if name.lower() in ("source", "url") and isinstance(value, str)]
