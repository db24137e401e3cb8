"""Which sample is at global position p: a pure function of (view, seed, p), the same on every rank (contract "Order").

Positions run on over the epochs: position p lies in epoch p // size. Each epoch is a pseudo-random permutation of the
samples, computed where it is asked for (a Feistel network with cycle walking: Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002), so no array of the whole dataset is ever made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """`size` samples of the dataset view named `view`; `shuffle=False` keeps the order of the shards."""

    size: int
    view: str
    seed: int = 0
    shuffle: bool = True

    def epoch_of(self, position: int) -> int:
        return position // self.size

    def samples(self, start: int, count: int) -> np.ndarray:
        """The sample numbers, 0 to size - 1, at global positions start to start + count - 1. Shape (count,), int64."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, inside = np.divmod(positions, self.size)
        if not self.shuffle:
            return inside
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permute(inside[here], int(epoch))
        return out

    def _permute(self, x: np.ndarray, epoch: int) -> np.ndarray:
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        digest = hashlib.sha256(f"{self.view}/{self.seed}/{epoch}".encode()).digest()
        keys = np.frombuffer(hashlib.shake_256(digest).digest(8 * _ROUNDS), dtype=np.uint64)
        value = _feistel(x.astype(np.uint64), keys, half)
        # The network permutes 4^half numbers; walking on until the value is a sample permutes just the samples.
        while (outside := value >= self.size).any():
            value[outside] = _feistel(value[outside], keys, half)
        return value.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
