"""Into how many ranges rows are cut on their way to shards, and where these begin: by rows, and by bytes where rows are long."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.shards.layout import group_of

PARTS_BIT = 40  # a row's place in the source: its part's number above, its number in the part below
ROW_BYTES = 64  # of a row in memory, beside its item
RANGE_BYTES = 7 << 26  # of the rows of a range in memory, about; half a million of them reach that with 0.9 KB each
FAN = 128  # pieces of a file, where more would be too small to be read one by one


@dataclass(frozen=True)
class Division:
    """`count` ranges of rows; `width` neighbours of them share a piece of the files that rows are written to at first. `bounds`: where they
    begin in the order of rows; None: they are equal ranges of the hashes of keys."""

    count: int
    width: int
    bounds: list[int] | None = None

    @staticmethod
    def into(count: int, bounds: list[int] | None = None) -> Division:
        """Above `FAN` ranges, about as many share a piece as there are pieces."""
        return Division(count, 1 if count <= FAN else math.ceil(math.sqrt(count)), bounds)

    @property
    def pieces(self) -> int:
        return -(-self.count // self.width)

    def local(self, piece: int) -> range:
        """The ranges of a piece."""
        return range(piece * self.width, min((piece + 1) * self.width, self.count))

    def of(self, table: pa.Table) -> np.ndarray:
        """The range of each row: int64 (rows,)."""
        if self.bounds is None:
            return group_of(table["hash"].to_numpy(), self.count)
        return np.searchsorted(np.array(self.bounds, dtype=np.uint64), table["order"].to_numpy(), side="right").astype(np.int64) - 1

    def for_bytes(self, size: int) -> Division:
        """Ranges of hashes which, of `size` bytes of rows, have `RANGE_BYTES` at most on average: each as it is, or cut into several. The
        pieces of files stay the same."""
        assert self.bounds is None, "ranges of hashes nest"
        times = max(1, -(-size // (self.count * RANGE_BYTES)))
        return Division(self.count * times, self.width * times)


def even_bounds(groups: int) -> list[int]:
    """Where equal ranges of 64 bits begin."""
    return [-(-(n << 32) // groups) << 32 for n in range(groups)]


def source_bounds(marks: list[list[int]], groups: int) -> list[int]:
    """Where ranges of the source's order begin: `groups` of equally many rows; more, of equally many bytes, where one of those would take
    more than `RANGE_BYTES`. A mark is (part, rows of this part up to here, bytes since the mark before), one at least at the end of each
    part; between two of them rows are taken to be equally long."""
    part, row, size = np.array(sorted(marks), dtype=np.int64).reshape(-1, 3).T
    is_last = np.append(part[1:] != part[:-1], True)[: len(part)]
    counts = row[is_last]
    ends = np.cumsum(counts)
    total = int(counts.sum())
    if not total:  # an estimate had promised some
        return [0]
    firsts = [total * n // groups for n in range(groups)]
    places = np.concatenate([[0], row + np.repeat(ends - counts, np.diff(np.flatnonzero(is_last), prepend=-1))])
    lengths = np.concatenate([[0], np.cumsum(size)])
    if np.diff(np.interp([*firsts, total], places, lengths)).max() > RANGE_BYTES:
        groups = -(-int(lengths[-1]) // RANGE_BYTES)
        firsts = np.interp([int(lengths[-1]) * n // groups for n in range(groups)], lengths, places).astype(np.int64).tolist()
    bounds = [0]
    for first in firsts[1:]:
        at = int(np.searchsorted(ends, first, side="right"))
        bounds.append(int(part[is_last][at]) << PARTS_BIT | first - int(ends[at] - counts[at]))
    return bounds
