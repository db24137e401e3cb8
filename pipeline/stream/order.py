"""Which sample is at global position p: a pure function, the same on every rank (contract "Order").

Positions run on over the epochs: position p lies in epoch p // N. The batch that an epoch's end falls into takes the rest
from the next epoch, so every sample comes exactly once an epoch and none is dropped.

Where any sample is as near as any other (block 1, local disks), an epoch is one pseudo-random permutation of the samples,
computed where it is asked for (a Feistel network with cycle walking: Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). On an object store that would be a request a sample, so there:

    block    neighbouring samples of a shard, fetched by one request
    stripe   4 blocks of one shard, drawn at random: one look at that shard's index serves them all
    window   256 stripes from all over the dataset, in a pseudo-random order of all stripes
    row      as many samples as a global batch holds

The samples of a window, block after block, fill a table column by column, and are read row by row. So each batch takes a
few samples of every block of the window, while a rank, which takes the same part of each row, needs only the blocks of
its own columns. This is why the row enters the order: with other batches the same samples come in another order.
No array of N samples, or of all blocks, is ever made; the largest hold a number a shard.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.stream.random import mix

STRIPE = 4  # blocks
WINDOW = 256  # stripes
_FIRST_WINDOW = 1  # stripes; the first epoch's windows double from here, so that the first batch needs few requests
_CHUNK = 4096  # positions permuted at once where the block is 1: numpy's cost is by the call
_ROUNDS = 6


class Order:
    """The order of `sizes.sum()` samples, numbered shard after shard; `sizes` (shards,) int64 are the samples kept in each.

    `view` names exactly which samples these are, `row` is how many of a global batch are from this dataset, on average.
    """

    def __init__(self, sizes: np.ndarray, view: str, seed: int = 0, *, block: int = 1, row: int | Fraction = 1) -> None:
        self.view, self.seed, self.block, self.row = view, seed, block, max(Fraction(1), Fraction(row))
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.size = int(self._ends[-1])
        self._stripe = STRIPE * block
        if block > 1:
            self._sizes = sizes
            self._full_ends = np.cumsum(sizes // self._stripe, dtype=np.int64)
            self._short_shards = np.flatnonzero(sizes % self._stripe)  # what no longer fills a stripe is a short one
            self._full = int(self._full_ends[-1])
            self._stripes = self._full + len(self._short_shards)
        self._epoch = lru_cache(maxsize=4)(lambda epoch: _Epoch(self, epoch))
        self._window = lru_cache(maxsize=8)(self._members)

    def epoch_of(self, position: int) -> int:
        return position // self.size

    def samples(self, start: int, count: int) -> np.ndarray:
        """The sample numbers, 0 to size - 1, at global positions start to start + count - 1. Shape (count,), int64."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The sample numbers at global `positions`, both int64 (n,)."""
        epochs, inside = np.divmod(positions, self.size)
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._in_epoch(inside[here], epoch)
        return out

    def _in_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        starts = None if self.block == 1 else self._epoch(epoch).window_starts
        numbers = places // _CHUNK if starts is None else np.searchsorted(starts, places, side="right") - 1
        out = np.empty(len(places), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            members = self._window(epoch, number)
            if starts is None:
                out[here] = members[places[here] - number * _CHUNK]
            else:
                out[here] = members[transposed(places[here] - starts[number], len(members), self.row)]
        return out

    def _members(self, epoch: int, number: int) -> np.ndarray:
        """The samples of one window as they were written into its table; of one chunk in their order where the block is 1."""
        if self.block > 1:
            return self._epoch(epoch).window(number)
        start = number * _CHUNK
        return permute(np.arange(start, min(start + _CHUNK, self.size), dtype=np.int64), self.size, self.keys(epoch))

    def keys(self, epoch: int) -> np.ndarray:
        """uint64 (rounds + 3,), random by view, seed and epoch."""
        digest = hashlib.sha256(f"{self.view}/{self.seed}/{epoch}".encode()).digest()
        return np.frombuffer(hashlib.shake_256(digest).digest(8 * (_ROUNDS + 3)), dtype=np.uint64)

    def first_of(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return int(self._ends[shard] - self._sizes[shard])


class _Epoch:
    """The stripes of one epoch in their order: full ones, and short ones spread evenly among them."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        *rounds, self._short_key, self._block_key, self._sample_key = order.keys(epoch)
        self._keys = np.array(rounds, dtype=np.uint64)
        shorts = len(order._short_shards)
        places = permute(np.arange(shorts, dtype=np.int64), shorts, mix(self._keys ^ self._short_key))
        self._shorts = order._short_shards[places]
        self._short_ends = np.concatenate([[0], np.cumsum(order._sizes[self._shorts] % order._stripe)]).astype(np.int64)
        cuts = np.arange(0, order._stripes, WINDOW)
        if epoch == 0:
            ramp = [0]
            while (step := _FIRST_WINDOW << (len(ramp) - 1)) < WINDOW:
                ramp.append(ramp[-1] + step)
            cuts = np.concatenate([ramp, np.arange(ramp[-1] + WINDOW, order._stripes, WINDOW)])
            cuts = cuts[cuts < order._stripes]
        self._cuts = np.append(cuts, order._stripes)
        before = self._shorts_before(self._cuts[:-1])
        self.window_starts = (self._cuts[:-1] - before) * order._stripe + self._short_ends[before]

    def _shorts_before(self, stripes: np.ndarray) -> np.ndarray:
        return stripes * len(self._shorts) // max(1, self.order._stripes)

    def window(self, number: int) -> np.ndarray:
        """The samples of a window, block after block, each block shuffled. int64 (samples,)."""
        stripes = np.arange(self._cuts[number], self._cuts[number + 1])
        before, after = self._shorts_before(stripes), self._shorts_before(stripes + 1)
        full = permute((stripes - before)[before == after], self.order._full, self._keys).tolist()
        firsts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for k, is_short in zip(before.tolist(), (before != after).tolist(), strict=True):
            first, length = self._blocks(int(self._shorts[k]), None) if is_short else self._stripe_of(full.pop(0))
            firsts.append(first)
            lengths.append(length)
        first, length = np.concatenate(firsts), np.concatenate(lengths)
        offsets = np.arange(self.order.block)
        members = first[:, None] + offsets
        inside = offsets < length[:, None]
        hashed = np.where(inside, mix(members.astype(np.uint64) ^ self._sample_key), np.uint64(2**64 - 1))
        return np.take_along_axis(members, np.argsort(hashed, axis=1, kind="stable"), axis=1)[inside]

    def _stripe_of(self, full: int) -> tuple[np.ndarray, np.ndarray]:
        ends = self.order._full_ends
        shard = int(np.searchsorted(ends, full, side="right"))
        return self._blocks(shard, full - (int(ends[shard - 1]) if shard else 0))

    def _blocks(self, shard: int, stripe: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(first sample, samples) of the blocks in a stripe of `shard`; None stands for the short one."""
        block = self.order.block
        full, rest = divmod(int(self.order._sizes[shard]), block)
        numbers = np.argsort(
            mix(np.arange(full, dtype=np.uint64) + mix(np.array([shard], dtype=np.uint64) ^ self._block_key)), kind="stable"
        )
        if stripe is None:
            mine = numbers[full // STRIPE * STRIPE :]
            mine = np.append(mine, full) if rest else mine
        else:
            mine = numbers[stripe * STRIPE : (stripe + 1) * STRIPE]
        return self.order.first_of(shard) + mine * block, np.where(mine == full, rest, block)


def transposed(places: np.ndarray, size: int, row: Fraction) -> np.ndarray:
    """Where in a column-by-column listing of `size` samples those stand that are at `places` row by row.

    Row t begins at ceil(t `row`), so that rows are `row` long on average; the last column then is in some rows only.
    """
    whole, (num, den) = int(row), row.as_integer_ratio()
    t = places * den // num
    begin = -(-t * num // den)
    u = places - begin
    rows = size * den // num  # complete ones; what is left over is the beginning of one more
    left = size - -(-rows * num // den)
    return u * rows + np.minimum(u, left) + np.where(u < whole, t, begin - t * whole)


def permute(x: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0 to size - 1, at `x`; int64 (n,) both."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    value = _feistel(x.astype(np.uint64), keys, half)
    # The network permutes 4^half numbers; walking on until the value is below `size` permutes just those.
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], keys, half)
    return value.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys[:_ROUNDS]:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right
