"""Random numbers keyed by what they are for, so by nothing else: SplitMix64 (Steele, Lea, Flood 2014).

Not numpy's generators: their streams may change from version to version, and a resumed run must draw what it drew.
"""

from __future__ import annotations

import math

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_A, _B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, uint64 to uint64, a bijection: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_A)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_B)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _A) & _MASK
    x = ((x ^ (x >> 27)) * _B) & _MASK
    return x ^ (x >> 31)


class Random:
    """Draws that depend on the whole numbers `key` alone: `Random(seed, epoch, sample)`."""

    def __init__(self, *key: int) -> None:
        state = 0
        for part in key:
            state = _mix((state + part + _GOLDEN) & _MASK)
        self._state = state

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return _mix(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """At least `low`, less than `high`, 53 bits fine."""
        return low + (high - low) * ((self._next() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """0 to `count` - 1 (uneven by less than `count` / 2^64)."""
        return (self._next() * count) >> 64

    def normal(self, mean: float = 0.0, deviation: float = 1.0) -> float:
        """Box and Muller (1958)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return mean + deviation * radius * math.cos(2.0 * math.pi * self.uniform())

    def uniforms(self, count: int) -> np.ndarray:
        """float64 (count,) in [0, 1)."""
        start = np.uint64(self._state)
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._state = (self._state + count * _GOLDEN) & _MASK
        return (mix(start + steps) >> np.uint64(11)) * 2.0**-53

    def normals(self, count: int) -> np.ndarray:
        """float64 (count,), standard normal."""
        u = self.uniforms(2 * count)
        return np.sqrt(-2.0 * np.log(1.0 - u[:count])) * np.cos(2.0 * np.pi * u[count:])

    def permutation(self, count: int) -> np.ndarray:
        """int64 (count,): 0 to `count` - 1 in random order."""
        return np.argsort(self.uniforms(count), kind="stable")
