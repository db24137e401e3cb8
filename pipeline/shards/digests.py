"""Hexadecimal digests as numbers of fixed width: keys of 20 digits in 10 bytes, where a Python string takes 70."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_NOT_HEX = 255
_VALUES = np.full(256, _NOT_HEX, dtype=np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def parse_digests(column: pa.Array | pa.ChunkedArray, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """(which rows hold `digits` lower-case hexadecimal digits, bool (n,); the bytes of these rows, uint8 (rows, digits / 2))."""
    ends, text = _buffers(column)
    fits = np.diff(ends) == digits
    if fits.all():
        values = _VALUES[text[ends[0] : ends[-1]].reshape(-1, digits)]
    else:
        values = _VALUES[text[ends[:-1][fits][:, None] + np.arange(digits)]]
    sound = (values != _NOT_HEX).all(axis=1)
    if not sound.all():
        fits[np.flatnonzero(fits)[~sound]] = False
        values = values[sound]
    return fits, values[:, 0::2] << 4 | values[:, 1::2]


def halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 9 to 16) bytes as two numbers, which order as the bytes do: of the first 8 bytes uint64 (n,), and of the others in the least
    type that holds them."""
    count, width = digests.shape
    low_type = next(t for t in (np.uint16, np.uint32, np.uint64) if np.dtype(t).itemsize >= width - 8)
    size = np.dtype(low_type).itemsize
    low = np.zeros((count, size), dtype=np.uint8)
    low[:, : width - 8] = digests[:, 8:]
    high = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)
    return high, low.view(np.dtype(low_type).newbyteorder(">")).ravel().astype(low_type)


def short_keys(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(which rows hold at most 16 bytes, none of them 0, bool (n,); the bytes of these rows with zeros behind, uint8 (rows, 16))."""
    ends, text = _buffers(column)
    lengths = np.diff(ends)
    fits = lengths <= 16
    places = ends[:-1][fits][:, None] + np.arange(16)
    inside = np.arange(16) < lengths[fits][:, None]
    found = np.zeros(inside.shape, dtype=np.uint8)
    found[inside] = text[places[inside]]
    sound = ~((found == 0) & inside).any(axis=1)
    fits[np.flatnonzero(fits)[~sound]] = False
    return fits, found[sound]


def _buffers(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Of an array of strings without gaps: where each begins, and the last ends, int64 (n + 1,), in all their bytes."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.large_string())
    if not len(array):
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)


class DigestTable:
    """Digests as `halves` gives them, sorted, each once: 10 bytes a key of 20 digits."""

    def __init__(self, high: np.ndarray, low: np.ndarray) -> None:
        same_high = high[1:] == high[:-1]
        if not ((high[1:] > high[:-1]) | (same_high & (low[1:] > low[:-1]))).all():
            order = np.lexsort((low, high))
            high, low = high[order], low[order]
            first = np.concatenate([np.ones(min(1, len(high)), dtype=bool), (high[1:] != high[:-1]) | (low[1:] != low[:-1])])
            high, low = high[first], low[first]
        self.high, self.low = high, low

    def __len__(self) -> int:
        return len(self.high)

    def find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Where each of these stands in the table, -1: nowhere. int64 (n,)."""
        found = np.full(len(high), -1, dtype=np.int64)
        at = np.searchsorted(self.high, high)
        rows = np.arange(len(high))
        while True:  # along those whose first halves are the same; nearly always one
            rows = rows[at[rows] < len(self.high)]
            rows = rows[self.high[at[rows]] == high[rows]]
            if not len(rows):
                return found
            hit = self.low[at[rows]] == low[rows]
            found[rows[hit]] = at[rows[hit]]
            rows = rows[~hit]
            at[rows] += 1
