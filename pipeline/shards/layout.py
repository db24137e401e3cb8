"""Which sample goes where, worked out from what is listed alone: the same for any machine and number of workers."""

from __future__ import annotations

import hashlib
from itertools import accumulate

import numpy as np

from pipeline.shards.sources.base import Item

_KEY_DIGITS = 20  # 80 bits: two among a thousand million paths coincide with probability 4e-7
_TAR_END = 10240  # the end-of-archive record
MEMBER_BYTES = 1024  # a member's header and padding, at most
_JSON = 512  # what we add to the json member, apart from the path


def sample_key(identity: str) -> str:
    """20 hex digits of the SHA-256 of a relative path, a URL or whatever names the sample."""
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:_KEY_DIGITS]


def key_order(key: str) -> int:
    """64 bits by which samples are shuffled. Splits are read off the key's leading digits, so the order comes from a second hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def group_of(orders: np.ndarray, groups: int) -> np.ndarray:
    """Which of `groups` equal ranges of the 64 bits each order is in: int64 (rows,), of uint64 (rows,)."""
    return (((orders >> np.uint64(32)) * np.uint64(groups)) >> np.uint64(32)).astype(np.int64)


def split_of(key: str, splits: dict[str, float]) -> str:
    """The key as a fraction falls into one of the splits' shares of [0, 1), laid side by side by name.

    By name, because the order of keys in a config means nothing, and adding images moves none of the old ones.
    """
    names = sorted(splits)
    point = int(key, 16) / 16**_KEY_DIGITS
    return next((name for name, end in zip(names, accumulate(splits[n] for n in names), strict=True) if point < end), names[-1])


def planned_bytes(item: Item) -> int:
    """An upper bound of what the sample takes in a tar, for an image that keeps its bytes; of what a table has beside it, about."""
    has_label = item.class_name is not None or item.label is not None or "cls" in item.side
    members = 2 + has_label + ("txt" in item.side or item.text is not None)
    beside = 4 * len(item.text or "") + sum(len(k) + 2 * len(str(v)) + 8 for k, v in item.extra.items())
    return item.bytes + members * MEMBER_BYTES + _JSON + 6 * len(item.path) + beside  # JSON may spell a letter \u1234


def cut_by_bytes(sizes: np.ndarray, size: int) -> list[slice]:
    """Neighbouring rows with int64 (rows,) bytes each, as shards of at most `size` bytes, or one row."""
    ends, first, cuts = np.cumsum(sizes), 0, list[slice]()
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + size - _TAR_END, side="right")))
        cuts.append(slice(first, last))
        first = last
    return cuts


def cut_by_rows(rows: int, each: int, even: bool) -> list[slice]:
    """Shards of `each` rows, the last with what is left; `even`: of as nearly equal numbers, at most `each`."""
    if even and rows:
        parts = -(-rows // each)
        return [slice(rows * n // parts, rows * (n + 1) // parts) for n in range(parts)]
    return [slice(first, min(first + each, rows)) for first in range(0, rows, each)]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"
