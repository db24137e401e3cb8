"""The column of perceptual hashes for a dataset that was written without it, such as one that was adopted."""

from __future__ import annotations

import pyarrow as pa

from pipeline.core.storage import Storage
from pipeline.shards.columns import Columns, add_columns, maker_of
from pipeline.shards.duplicates.dataset import read_columns, shard_parts
from pipeline.shards.duplicates.phash import PHASH, perceptual_hash
from pipeline.shards.rows import Row


def ensure_hashes(directory: Storage, workers: int | None = None) -> None:
    """Add the column to every index of the dataset at `directory` unless it was written with it. Needs a Ray that is initialised; raises as
    `add_columns`. An image has the same hash here as where it is written."""
    first = read_columns(directory, shard_parts(directory)[0], [PHASH]).schema
    if PHASH in first.names and maker_of(first.field(PHASH)) is None:
        return
    add_columns(directory, _MADE, workers, "hash images")  # which may have been interrupted


def _hashes(rows: list[Row]) -> list[list[int | None]]:
    return [[None if row.image is None else perceptual_hash(row.image) for row in rows]]


_MADE = Columns({PHASH: pa.uint64()}, "phash 1", _hashes)
