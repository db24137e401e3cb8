"""Several datasets as one sequence: each in its own order and its own epochs, interleaved evenly by weight.

The dataset at position p is found by splitting the sequence in two, again and again (Bresenham 1965): of the first n
positions, floor(n w) go to the first dataset, the others to the rest, and so on among these. So of the first n positions
each dataset has its share but for a sample a split, and where a position stands in its dataset's own order takes a few
operations, at any position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.stream.order import Order

PARTS = 1 << 20  # weights are rounded to this fraction, so that counting is exact


@dataclass(frozen=True)
class Places:
    """For each of n positions: which dataset, its sample's number there, and that dataset's epoch. All int64 (n,)."""

    dataset: np.ndarray
    number: np.ndarray
    epoch: np.ndarray


class Mixture:
    """`orders` interleaved by `weights`, each sample `repeats` times in a row (repeated augmentation, arXiv 1901.09335)."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], repeats: int = 1) -> None:
        self.orders, self.repeats = list(orders), repeats
        self.shares = whole_shares(weights)

    def at(self, start: int, count: int) -> Places:
        """The samples at positions start to start + count - 1."""
        positions = np.arange(start, start + count, dtype=np.int64) // self.repeats
        dataset, inside = self._split(positions)
        number, epoch = np.empty_like(inside), np.empty_like(inside)
        for d in np.unique(dataset).tolist():
            here = dataset == d
            number[here] = self.orders[d].at(inside[here])
            epoch[here] = inside[here] // self.orders[d].size
        return Places(dataset, number, epoch)

    def copies(self, start: int, count: int) -> np.ndarray:
        """Which of its repeats stands at each position. int64 (count,)."""
        return np.arange(start, start + count, dtype=np.int64) % self.repeats

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, position in its own order)."""
        dataset, inside = np.zeros_like(positions), positions.copy()
        open_, left = np.arange(len(positions)), sum(self.shares)  # those not yet given to a dataset, and the parts to share
        for d, share in enumerate(self.shares):
            n = inside[open_]
            before, after = n * share // left, (n + 1) * share // left
            mine = after > before
            dataset[open_[mine]], inside[open_[mine]] = d, before[mine]
            inside[open_[~mine]] = (n - before)[~mine]
            open_, left = open_[~mine], left - share
        return dataset, inside


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers that add up to `PARTS`, each at least 1."""
    total = sum(weights)
    ends = np.rint(np.cumsum(weights) / total * PARTS).astype(int)
    shares = np.diff(ends, prepend=0)
    missing = np.maximum(1 - shares, 0)
    shares += missing
    shares[int(np.argmax(shares))] -= int(missing.sum())
    return shares.tolist()
