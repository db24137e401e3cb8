"""Histograms that add up: the sum of those of the parts is that of the whole, in whatever order they come.

Bins lie at fixed places, so nothing of the data has to be known beforehand, and only those that hold something are kept.
On a logarithmic scale their width is fixed. On a linear one it is the least power of two that needs no more than `MOST`
of them: where there would be more, neighbours are merged in pairs, which gives what wider bins would have given from the
start. One number far away from all others takes one bin, and leaves the others theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

MOST = 256  # bins of a linear histogram
_FINEST = -40  # bins of 2**-40 are the narrowest: a column may hold one number alone
_LARGEST = 52  # bits of a bin's number, which a float64 counts exactly


@dataclass
class Histogram:
    """Bin k holds numbers from `edge(k)` up to, and not with, `edge(k + 1)`.

    `exponent`: a bin is 2**exponent wide, on the scale of log2 of the numbers if `is_log`. `is_centred`: 1 lies in the middle
    of its bin, as suits ratios, and not at its lower edge.
    """

    is_log: bool = False
    exponent: int = _FINEST
    is_centred: bool = False
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.counts.total()

    def edge(self, number: int) -> float:
        at = math.ldexp(number - 0.5 * self.is_centred, self.exponent)
        return 2.0**at if self.is_log else at

    def add(self, values: np.ndarray) -> None:
        """Count finite numbers, on a logarithmic scale positive ones: float64 (n,)."""
        if not len(values):
            return
        at = np.log2(values) if self.is_log else values
        exponent = self.exponent
        if not self.is_log and (far := float(np.abs(at).max())):
            exponent = max(exponent, math.frexp(far)[1] - _LARGEST)
        bins = np.floor(np.ldexp(at, -exponent) + 0.5 * self.is_centred).astype(np.int64)
        numbers, counts = np.unique(bins, return_counts=True)
        while not self.is_log and len(numbers) > MOST:
            exponent += 1
            numbers, place = np.unique(numbers >> 1, return_inverse=True)
            counts = np.bincount(place, weights=counts).astype(np.int64)
        found = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        self.merge(Histogram(self.is_log, exponent, self.is_centred, Counter(found)))

    def merge(self, other: Histogram) -> None:
        """Add the counts of another of the same kind."""
        assert (self.is_log, self.is_centred) == (other.is_log, other.is_centred), "histograms of the same numbers"
        exponent = max(self.exponent, other.exponent)
        self._widen(exponent)
        for number, count in other.counts.items():
            self.counts[number >> (exponent - other.exponent)] += count
        while not self.is_log and len(self.counts) > MOST:
            self._widen(self.exponent + 1)

    def steps(self) -> tuple[list[float], list[int]]:
        """(edges, counts) from the first bin to the last, one more edge than counts; one empty bin fills each gap. Both empty where
        nothing was counted."""
        edges, counts = list[float](), list[int]()
        numbers = sorted(self.counts)
        for place, number in enumerate(numbers):
            if place and number > numbers[place - 1] + 1:
                edges.append(self.edge(numbers[place - 1] + 1))
                counts.append(0)
            edges.append(self.edge(number))
            counts.append(self.counts[number])
        return [*edges, *(self.edge(n + 1) for n in numbers[-1:])], counts

    def _widen(self, exponent: int) -> None:
        if shift := exponent - self.exponent:
            widened = Counter[int]()
            for number, count in self.counts.items():
                widened[number >> shift] += count  # rounds down, below zero too
            self.counts, self.exponent = widened, exponent
