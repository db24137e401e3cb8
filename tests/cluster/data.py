"""Made data: small JPEGs of three classes in shards, and damage to them in the store."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import Manifest, dataset_hash, publish
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard

SAMPLES, PER_SHARD, SIDE, CLASSES = 960, 240, 16, 3
_SCAN = b"\xff\xda"  # begins what follows a JPEG's header


def make_data(directory: Storage, broken: Collection[int] = ()) -> None:
    """Write the dataset. The images of the samples `broken` are nothing but a header, which no index shows."""
    written = []
    for shard, first in enumerate(range(0, SAMPLES, PER_SHARD)):
        samples = []
        for n in range(first, first + PER_SHARD):
            data = _jpeg(n)
            image = Checked(data[: data.index(_SCAN) + 14] if n in broken else data, "jpg", SIDE, SIDE)
            samples.append(Sample(key_of(n), image, n % CLASSES, None, b"{}"))
        written.append(write_shard(directory, f"train-{shard:05d}.tar", "train", samples))
    records = [w.record for w in written if w is not None]
    manifest = Manifest(
        hash=dataset_hash(records), config="none", source="made", classes=[str(c) for c in range(CLASSES)], splits={"train": SAMPLES},
        bytes=sum(r.bytes for r in records), read=SAMPLES, written=SAMPLES, ignored=0, dropped={}, dropped_samples=[], smallest=(SIDE, SIDE),
    )  # fmt: skip
    publish(directory, records, manifest)


def key_of(number: int) -> str:
    return sample_key(f"train/{number}")


def truncate_shard(directory: Storage, shard: int) -> None:
    """The latter half of a tar is gone."""
    name = f"train-{shard:05d}.tar"
    data = directory.read(name)
    directory.write(name, data[: len(data) // 2])


def half_write_shard(directory: Storage) -> None:
    """One more tar, as a writer leaves it that dies in the middle: no manifest names it."""
    data = directory.read("train-00000.tar")
    directory.write(f"train-{SAMPLES // PER_SHARD:05d}.tar", data[: len(data) // 2])


def _jpeg(number: int) -> bytes:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 160, (SIDE, SIDE, 3))
    pixels[..., number % CLASSES] += 40
    jpeg = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()
