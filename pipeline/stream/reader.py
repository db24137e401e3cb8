"""A dataset directory as numbered samples: sample number -> bytes, checked against the index.

Local shards are read in place. A shard on an object store is fetched once a machine into a cache directory, checked
against the sha256 of the table of shards, and shared by the ranks there.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import weakref
import zlib
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest, ShardRecord, read_manifest, read_part, read_shards


@dataclass(frozen=True)
class Sample:
    """One sample as the shard holds it; `label` is -1 and `text` empty where there is none."""

    key: str
    image: bytes
    label: int
    text: str
    json: bytes

    @property
    def meta(self) -> dict[str, Any]:
        """What the sample's json member holds: where it came from, and what its source said of it."""
        return json.loads(self.json or b"{}")


class _Shard:
    """One open tar and its index."""

    def __init__(self, directory: Storage, record: ShardRecord) -> None:
        self.record = record
        self.columns = pq.read_table(io.BytesIO(read_part(directory, record.index_name))).to_pydict()
        if len(self.columns["key"]) != record.samples:
            raise DataError(
                f"data {directory.url}/{record.index_name}: {len(self.columns['key'])} samples, the table of shards says {record.samples}"
            )
        try:
            path = Path(directory.path) / record.name if directory.is_local else _fetch(directory, record)
            self.file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DataError(f"data {directory.url}/{record.name}: is missing") from None
        weakref.finalize(self, os.close, self.file)  # when no thread reads from it any more

    def sample(self, row: int, where: str) -> Sample:
        at = {name: column[row] for name, column in self.columns.items()}
        data = os.pread(self.file, at["length"], at["offset"])
        if zlib.crc32(data) != at["crc32"]:
            raise DataError(f"data {where}/{self.record.name}: sample {at['key']} is damaged (its checksum differs from the index)")

        def part(name: str) -> bytes:
            start = at[f"{name}_offset"] - at["offset"]
            return data[start : start + at[f"{name}_length"]] if at[f"{name}_length"] >= 0 else b""

        return Sample(at["key"], part("image"), at["cls"], part("txt").decode(), part("json"))


def _fetch(directory: Storage, record: ShardRecord) -> Path:
    cache = Path(tempfile.gettempdir()) / f"tessera-shards-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise DataError(f"data {directory.url}: the shard cache {cache} belongs to somebody else; TMPDIR names another place")
    target = cache / f"{record.sha256}.tar"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as f:
            temporary = Path(f.name)
        try:
            directory.get(record.name, temporary)
            with temporary.open("rb") as f:
                digest = sha256()
                while block := f.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != record.sha256:
                raise DataError(f"data {directory.url}/{record.name}: the shard is damaged (its sha256 differs from the table of shards)")
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


class Dataset:
    """One split of a dataset, `len(dataset)` samples numbered in shard order. Safe to read from several threads."""

    def __init__(self, directory: Storage, split: str) -> None:
        self.directory = directory
        self.split = split
        self.manifest: Manifest = read_manifest(directory)
        self.shards = read_shards(directory, split)
        self._ends = np.cumsum([s.samples for s in self.shards])
        self._open = lru_cache(maxsize=256)(lambda number: _Shard(directory, self.shards[number]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    def labels(self) -> np.ndarray:
        """Every sample's label in shard order, -1 for none: int64 (len,). Reads the indices, not the shards."""
        columns = [
            pq.read_table(io.BytesIO(read_part(self.directory, s.index_name)), columns=["cls"])["cls"].to_numpy() for s in self.shards
        ]
        return np.concatenate(columns)

    @property
    def view(self) -> str:
        """Names exactly which samples this is, in which order."""
        return f"{self.manifest.hash}/{self.split}"

    def __getitem__(self, number: int) -> Sample:
        """Raises DataError where the bytes are not those the index names."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self._open(shard).sample(number - first, self.directory.url)


def open_dataset(url: str, split: str = "train", endpoint: str | None = None) -> Dataset:
    """The split `split` of the dataset at `url` (`URL` or `URL@version`).

    Raises:
        DataError: no dataset there, no such split or version, or a damaged one.
    """
    base, at, version = url.rpartition("@")
    has_version = bool(at) and version.isdigit()
    dataset = Dataset(Storage(base if has_version else url, endpoint), split)
    if has_version and int(version) != dataset.manifest.version:
        raise DataError(f"data {url}: there is no version {version} (allowed: {dataset.manifest.version})")
    return dataset
