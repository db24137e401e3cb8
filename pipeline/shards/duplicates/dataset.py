"""What the search for duplicates reads of a dataset: the hashes of its images, numbered in the order in which images win.

Of several copies the first stays: splits for evaluation come before those for training, so that training never holds an image of a test;
within a split shards come by number and rows as they lie. So what a later version of a dataset appends loses against what was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.errors import DataError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.shards.digests import halves, parse_digests
from pipeline.shards.duplicates.phash import PHASH, perceptual_hash
from pipeline.shards.manifest import ShardTable, read_manifest
from pipeline.shards.rows import check_columns, read_index


@dataclass(frozen=True)
class Part:
    """A shard: `first` is the number of its first image."""

    name: str
    split: str
    samples: int
    first: int

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.parquet"


@dataclass(frozen=True)
class Range:
    """Shards that follow each other, with images `first` up to `end`."""

    parts: tuple[Part, ...]

    @property
    def first(self) -> int:
        return self.parts[0].first

    @property
    def end(self) -> int:
        return self.parts[-1].first + self.parts[-1].samples


@dataclass(frozen=True)
class Hashes:
    """Of the images of a shard, (n,): `sha`, the first 16 bytes of the sha256 as two uint64; `phash`, uint64; `has`, where there is one."""

    sha: tuple[np.ndarray, np.ndarray]
    phash: np.ndarray
    has: np.ndarray


def ordered_splits(names: Sequence[str]) -> list[str]:
    """In the order in which copies win: those whose names begin with "train" last, and by name."""
    return sorted(names, key=lambda split: (split.startswith("train"), split))


def shard_parts(directory: Storage, split: str | None = None) -> list[Part]:
    """The shards of a dataset, or of one of its splits, in the order in which copies win."""
    splits = [split] if split is not None else ordered_splits(list(read_manifest(directory).splits))
    parts, first = list[Part](), 0
    for name in splits:
        # By number: the 100,000th has a digit more than those before it, and its name comes earlier.
        for record in sorted(ShardTable(directory, name), key=lambda r: (len(r.name), r.name)):
            parts.append(Part(record.name, record.split, record.samples, first))
            first += record.samples
    return parts


def cut(parts: Sequence[Part], images: int) -> list[Range]:
    """Ranges of about `images`, one shard at least."""
    ranges, held, count = list[Range](), list[Part](), 0
    for part in parts:
        if held and count + part.samples > images:
            ranges.append(Range(tuple(held)))
            held, count = [], 0
        held.append(part)
        count += part.samples
    return [*ranges, Range(tuple(held))] if held else ranges


def read_columns(directory: Storage, part: Part, columns: Sequence[str]) -> pa.Table:
    """Those of `columns` that a shard's index has. Raises DataError where it is missing, is none, or has other rows than the table says."""
    table = read_index(directory, part.index_name, columns)
    if len(table) != part.samples:
        raise DataError(f"data {directory.url}/{part.index_name}: {len(table)} rows, the table of shards says {part.samples} samples")
    return table


def has_hashes(directory: Storage, parts: Sequence[Part]) -> bool:
    """Whether the dataset's indices have the column of perceptual hashes; the first speaks for all."""
    return PHASH in read_columns(directory, parts[0], [PHASH]).column_names


def read_hashes(directory: Storage, part: Part, near: bool, made: bool = False) -> Hashes:
    """Of a shard, from its index; with `near` its perceptual hashes too, which are `made` of the images where there is no such column.

    Raises:
        DataError: a column is missing, or holds something else.
    """
    places = ["image_offset", "image_length"] if near and made else []
    table = read_columns(directory, part, ["sha256", *([PHASH] if near else []), *places])
    check_columns(table, ["sha256", *([PHASH] if near and not made else [])], f"data {directory.url}/{part.index_name}")
    sound, digests = parse_digests(table["sha256"], 64)
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise DataError(f"data {directory.url}/{part.index_name}: the sha256 of row {row} is {table['sha256'][row].as_py()!r}")
    if near and PHASH not in table.column_names:
        found = [perceptual_hash(data) for data in _images(directory, part, table)]
        table = table.append_column(PHASH, pa.array(found, pa.uint64()))
    if not near:
        return Hashes(halves(digests[:, :16]), np.zeros(part.samples, dtype=np.uint64), np.zeros(part.samples, dtype=bool))
    column = table[PHASH].combine_chunks().cast(pa.uint64())
    has = column.is_valid().to_numpy(zero_copy_only=False)
    return Hashes(halves(digests[:, :16]), column.fill_null(0).to_numpy(), has)


def _images(directory: Storage, part: Part, table: pa.Table) -> Iterator[bytes]:
    for offset, length in zip(table["image_offset"].to_pylist(), table["image_length"].to_pylist(), strict=True):
        yield retrying(f"data {directory.url}/{part.name}", lambda o=offset, n=length: directory.read_range(part.name, o, o + n))  # type: ignore[misc]


def split_by(where: np.ndarray, parts: int, table: Any) -> list[Any]:
    """The rows of `table`, a structured array or an Arrow table, that belong to each of `parts`; `where` (n,) says which."""
    if parts == 1:
        return [table]
    order = np.argsort(where, kind="stable")
    ends = np.searchsorted(where[order], np.arange(parts + 1))
    rows = [order[a:b] for a, b in pairwise(ends)]
    return [table.take(pa.array(r)) if isinstance(table, pa.Table) else table[r] for r in rows]


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
