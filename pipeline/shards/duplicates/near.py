"""Near duplicates among 64-bit hashes: all pairs that differ in at most d bits, none missed, without comparing all with all.

The bits are dealt to B blocks. d differing bits touch at most d of them, so two such hashes agree in B - d blocks at least: for each choice
of B - d blocks, hashes are sorted by these, and only neighbours that agree in them are compared (Manku, Jain and Das Sarma, "Detecting
near-duplicates for web crawling", WWW 2007). More blocks mean more choices, and fewer pairs to compare in each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from pipeline.shards.duplicates.phash import BITS

_MOST_MASKS = 500
# Nanoseconds, measured on one core: what a mask costs a hash (to sort it, and to send it where there are many), and one comparison.
_SORTING, _COMPARING = 300.0, 5.0
_ROWS = 1 << 16  # compared at a time, so that they stay in the processor's cache


def masks_for(near: int, count: int, table: int | None = None) -> list[int]:
    """The choices of blocks, as masks of bits, that cost least to find the pairs of `count` hashes, or of these and a `table`."""
    if near == 0:
        return [2**BITS - 1]

    def cost(blocks: int) -> float:
        bits = (blocks - near) * BITS // blocks
        compared = count**2 / 2 if table is None else count * table
        return comb(blocks, near) * (count * _SORTING + compared / 2**bits * _COMPARING)

    allowed = [blocks for blocks in range(near + 1, BITS // 2) if comb(blocks, near) <= _MOST_MASKS]
    return list(_masks(near, min(allowed, key=cost)))


@lru_cache(maxsize=64)
def _masks(near: int, blocks: int) -> tuple[int, ...]:
    # Every B-th bit to a block: neighbouring frequencies are alike, so each block has some of all.
    each = [sum(1 << bit for bit in range(start, BITS, blocks)) for start in range(blocks)]
    return tuple(sum(chosen) for chosen in combinations(each, blocks - near))


def find_pairs(
    hashes: np.ndarray, near: int, masks: list[int], which: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of `hashes` (n,), uint64, each there once, that agree in `masks[which]` and in no mask before it, and differ in at most `near`
    bits: (one, the other; int64 places in `hashes`; distances, uint8). Raises OverflowError where there are more than `most`."""
    keyed = hashes & np.uint64(masks[which])
    order = np.argsort(keyed, kind="stable")
    keyed, ordered = keyed[order], hashes[order]
    last = np.append(np.flatnonzero(keyed[1:] != keyed[:-1]), len(keyed) - 1)
    ends = np.repeat(last + 1, np.diff(last, prepend=-1))  # where the hashes that agree with each end
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for start in range(0, len(hashes), _ROWS):
        rows, step = np.arange(start, min(start + _ROWS, len(hashes))), 1
        while len(rows := rows[rows + step < ends[rows]]):
            near_rows, distances = _close(ordered[rows], ordered[rows + step], near, masks[:which])
            if len(near_rows):
                found.append((order[rows[near_rows]], order[rows[near_rows] + step], distances))
                count += len(near_rows)
                if most is not None and count > most:
                    raise OverflowError(f"in which {len(hashes):,} hashes have more than {most:,} near pairs")
            step += 1
    return _joined(found)


def find_matches(queries: np.ndarray, table: np.ndarray, near: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a hash of `queries` and one of `table` that differ in at most `near` bits: (places in queries, in table; int64;
    distances, uint8). Both uint64, each hash once in each."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    masks = masks_for(near, len(queries), len(table))
    for which, mask in enumerate(masks):
        keyed = table & np.uint64(mask)
        order = np.argsort(keyed, kind="stable")
        keyed, ordered = keyed[order], table[order]
        for start in range(0, len(queries), _ROWS):
            part = queries[start : start + _ROWS]
            at, ends = (np.searchsorted(keyed, part & np.uint64(mask), side=side) for side in ("left", "right"))
            rows = np.arange(len(part))
            while len(rows := rows[at[rows] < ends[rows]]):
                near_rows, distances = _close(part[rows], ordered[at[rows]], near, masks[:which])
                if len(near_rows):
                    found.append((rows[near_rows] + start, order[at[rows[near_rows]]], distances))
                at[rows] += 1
    return _joined(found)


def _close(one: np.ndarray, other: np.ndarray, near: int, before: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(places of the pairs that are near and agree in none of the masks `before`, their distances)."""
    differ = one ^ other
    counts = np.bitwise_count(differ)
    places = np.flatnonzero(counts <= near)
    if len(places):
        bits, is_new = differ[places], np.ones(len(places), dtype=bool)
        for mask in before:
            is_new &= (bits & np.uint64(mask)) != 0
        places = places[is_new]
    return places, counts[places]


def _joined(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    one, other, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return one, other, distance


class Bits:
    """A set of numbers below `size`, a bit each."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size // 8 + 1, dtype=np.uint8)

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """bool (n,)."""
        return (self.data[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool)

    def add(self, numbers: np.ndarray) -> None:
        np.bitwise_or.at(self.data, numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))


def settle(low: np.ndarray, high: np.ndarray, distance: np.ndarray, gone: Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of near images go. In order, an image goes if one before it that stays is near; otherwise it stays.

    So whatever goes has something near that stays, however long the chain of likenesses that it belongs to (components of a chain would
    lose images with nothing like them left), and no two that stay are near. `low` < `high` are int64 numbers of pairs, all the pairs that
    these `high` have; `gone` knows which of the numbers below the least `high` go, and is told which of the others do. A set of maximal
    independent nodes, the first in lexicographic order, in rounds (Blelloch, Fineman and Shun, SPAA 2012).

    Returns those that go, ascending, for each the first that it is near to and that stays, and the distance to it.
    """
    left, right = low, high
    while len(left):
        here = ~gone.has(left)
        left, right = left[here], right[here]
        gone.add(right[~_is_in(left, np.unique(right))])  # nothing that is still open decides over these
        open_ = ~gone.has(right)
        left, right = left[open_], right[open_]
    told = gone.has(high) & ~gone.has(low)
    low, high, distance = low[told], high[told], distance[told]
    order = np.lexsort((low, high))
    low, high, distance = low[order], high[order], distance[order]
    first = np.append(np.ones(min(1, len(high)), dtype=bool), high[1:] != high[:-1])
    return high[first], low[first], distance[first]


def _is_in(numbers: np.ndarray, among: np.ndarray) -> np.ndarray:
    """`among` is sorted and not empty where `numbers` are not."""
    if not len(numbers):
        return np.zeros(0, dtype=bool)
    return among[np.minimum(np.searchsorted(among, numbers), len(among) - 1)] == numbers
