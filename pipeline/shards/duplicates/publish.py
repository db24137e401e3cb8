"""From numbers of images to a list in order of their keys: keys are read of those alone that are named, and sorted a range at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.storage import Storage
from pipeline.shards.duplicates.records import Part, Range, read_columns, split_by

KEY_PARTS = 1 << 23  # images for each range of keys, which is sorted as a whole
_SAMPLED = 64  # shards whose keys tell how keys are spread


def keys_of(directory: Storage, part: Range, numbers: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """(the keys of images, the places of their shards in `part.parts`), in the order of `numbers`, int64 (n,), all of this range."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    ends = np.searchsorted(ordered, [p.first + p.samples for p in part.parts])
    found: list[pa.Array] = [pa.array([], pa.string())]
    for shard, start, end in zip(part.parts, np.append(0, ends[:-1]), ends, strict=True):
        if end > start:
            keys = read_columns(directory, shard, ["key"])["key"].combine_chunks().cast(pa.string())
            found.append(keys.take(pa.array(ordered[start:end] - shard.first)))
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    shards = np.searchsorted(ends, np.arange(len(order)), side="right")
    return pa.concat_arrays(found).take(pa.array(back)), pa.array(shards[back])


def bounds_of(directory: Storage, parts: Sequence[Part], count: int) -> list[str]:
    """Keys that cut all keys into about `count` equal ranges, from the keys of some shards."""
    if count <= 1:
        return []
    some = [parts[n] for n in sorted({i * len(parts) // _SAMPLED for i in range(_SAMPLED)})]
    keys = sorted(key for part in some for key in read_columns(directory, part, ["key"])["key"].to_pylist())
    return sorted({keys[len(keys) * n // count] for n in range(1, count)})


def key_parts(table: pa.Table, bounds: list[str]) -> list[pa.Table]:
    """The rows of `table` in each of the ranges of keys that `bounds` cut."""
    where = np.zeros(len(table), dtype=np.int64)
    for bound in bounds:
        where += pc.greater_equal(table["key"], bound).to_numpy()
    return split_by(where, len(bounds) + 1, table)


def sorted_parts(parts: Sequence[Sequence[Any]], workers: int | None) -> Iterator[pa.Table]:
    """The tables of each part, a piece of it from every task, as one in order of the keys; a part at a time."""
    from pipeline.shards import tasks  # Ray comes with it, of which a plan has no need

    [made] = tasks.exchange("sort", "parts", _sort, [(1, (), pieces) for pieces in parts], (), 1, workers)
    for piece in made:
        yield tasks.take("sort", piece)


def _sort(*pieces: pa.Table) -> list[pa.Table]:
    return [pa.concat_tables(pieces).sort_by([(name, "ascending") for name in ("key", "of")]).combine_chunks()]
