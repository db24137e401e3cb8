"""Datasets of photographs, and of copies of them, for tests of duplicates."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import INDEX_SCHEMA, Manifest, ShardRecord, dataset_hash, publish
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard
from tests.unit.stream.photographs import encoded, photographs

Pictures = Mapping[str, Sequence[tuple[str, bytes]]]  # by split: name, file


def views() -> list[Image.Image]:
    """Twelve different pictures: quarters of photographs."""
    found = []
    for whole in photographs():
        w, h = whole.width // 2, whole.height // 2
        found += [whole.crop((x, y, x + w, y + h)) for x in (0, w) for y in (0, h)]
    return found


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda p: encoded(p, "JPEG", quality=60),
    "webp": lambda p: encoded(p, "WEBP", quality=80),
    "png": lambda p: encoded(p, "PNG"),
    "smaller": lambda p: encoded(p.resize((160, 160 * p.height // p.width), Image.Resampling.BICUBIC), "JPEG", quality=90),
    "larger": lambda p: encoded(p.resize((p.width * 2, p.height * 2), Image.Resampling.BICUBIC), "JPEG", quality=90),
    "brighter": lambda p: encoded(p.point(lambda v: min(255, int(v * 1.1 + 6))), "JPEG", quality=90),
}


def key_of(name: str) -> str:
    return sample_key(name)


def write_pictures(directory: Storage, pictures: Pictures, *, hashed: bool = True, per_shard: int = 5) -> Manifest:
    """A dataset of these files, by `key_of` their names."""
    records: list[ShardRecord] = []
    for split, files in pictures.items():
        for shard, first in enumerate(range(0, len(files), per_shard)):
            samples = []
            for name, data in files[first : first + per_shard]:
                with Image.open(io.BytesIO(data)) as image:
                    kind = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[str(image.format)]
                    samples.append(Sample(key_of(name), Checked(data, kind, *image.size), -1, None, b"{}"))
            written = write_shard(directory, f"{split}-{shard:05d}.tar", split, samples, hashed)
            assert written is not None
            records.append(written.record)
    return _publish(directory, records)


def write_hashes(
    directory: Storage,
    splits: Mapping[str, int],
    keys: Sequence[str],
    shas: np.ndarray,
    hashes: np.ndarray,
    has: np.ndarray,
    per_shard: int,
) -> Manifest:
    """A dataset of indices alone, its images numbered split by split; `shas` are uint8 (n, 32), `hashes` uint64 (n,)."""
    records, first = list[ShardRecord](), 0
    for split, count in splits.items():
        for shard, start in enumerate(range(0, count, per_shard)):
            n = min(per_shard, count - start)
            columns = {f.name: pa.array(np.zeros(n), f.type) for f in INDEX_SCHEMA if f.name not in ("key", "sha256")}
            columns |= {"key": pa.array(keys[first : first + n]), "sha256": pa.array([bytes(s).hex() for s in shas[first : first + n]])}
            table = pa.table(columns).select(INDEX_SCHEMA.names)
            table = table.append_column("phash", pa.array(hashes[first : first + n], mask=~has[first : first + n]))
            sink = io.BytesIO()
            pq.write_table(table, sink)
            records.append(ShardRecord(f"{split}-{shard:05d}.tar", split, n, n, f"{first:064d}"))
            directory.write(records[-1].index_name, sink.getvalue())
            first += n
    return _publish(directory, records)


def _publish(directory: Storage, records: list[ShardRecord]) -> Manifest:
    splits: dict[str, int] = {}
    for record in records:
        splits[record.split] = splits.get(record.split, 0) + record.samples
    count = sum(splits.values())
    manifest = Manifest(
        hash=dataset_hash(records), config="none", source="made", classes=[], splits=splits, bytes=sum(r.bytes for r in records), read=count,
        written=count, ignored=0, dropped={}, dropped_samples=[], smallest=(1, 1),
    )  # fmt: skip
    publish(directory, records, manifest)
    return manifest


def denied(directory: Storage, name: str) -> list[dict[str, object]]:
    """The rows of a deny-list."""
    return pq.read_table(io.BytesIO(directory.read(f"deny/{name}.parquet"))).to_pylist()
