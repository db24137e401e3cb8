"""Which sample goes where, worked out from the listing alone: the same for any machine and number of workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate

from pipeline.core.errors import DataError
from pipeline.shards.sources import Item

_KEY_DIGITS = 20  # 80 bits: two among a thousand million paths coincide with probability 4e-7
_TAR_END = 10240  # the end-of-archive record
_MEMBER = 1024  # a member's header and padding, at most
_JSON = 512  # what we add to the json member, apart from the path


@dataclass(frozen=True)
class PlannedShard:
    """`samples` are (key, item) in the order in which they are written."""

    name: str
    split: str
    samples: list[tuple[str, Item]]


def sample_key(path: str) -> str:
    """20 hex digits of the SHA-256 of a relative path."""
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:_KEY_DIGITS]


def split_of(key: str, splits: dict[str, float]) -> str:
    """The key as a fraction falls into one of the splits' shares of [0, 1), laid side by side by name.

    By name, because the order of keys in a config means nothing, and adding images moves none of the old ones.
    """
    names = sorted(splits)
    point = int(key, 16) / 16**_KEY_DIGITS
    return next((name for name, end in zip(names, accumulate(splits[n] for n in names), strict=True) if point < end), names[-1])


def planned_bytes(item: Item) -> int:
    """An upper bound of what the sample takes in a tar, for an image that keeps its bytes."""
    members = 2 + (item.class_name is not None or "cls" in item.side) + ("txt" in item.side)
    return item.bytes + members * _MEMBER + _JSON + 6 * len(item.path)  # JSON may spell a letter \u1234


def plan_shards(items: list[Item], splits: dict[str, float], size: int) -> list[PlannedShard]:
    """Shuffled by hash, cut into splits, and each split into shards of at most `size` bytes (one sample at least).

    Raises:
        DataError: a split gets no samples.
    """
    placed: dict[str, list[tuple[str, Item]]] = {name: [] for name in sorted(splits)}
    for item in items:
        key = sample_key(item.path)
        placed[split_of(key, splits)].append((key, item))
    planned = []
    for split, samples in placed.items():
        if not samples:
            raise DataError(f"shard.splits.{split}: a share of {splits[split]:g} leaves it none of the {len(items)} images")
        # The split is read off the key's leading digits, so the order comes from a second hash.
        samples.sort(key=lambda s: hashlib.sha256(s[0].encode()).digest())
        planned += [PlannedShard(f"{split}-{n:05d}.tar", split, part) for n, part in enumerate(_cut(samples, size - _TAR_END))]
    return planned


def _cut(samples: list[tuple[str, Item]], size: int) -> list[list[tuple[str, Item]]]:
    parts: list[list[tuple[str, Item]]] = []
    room = -1
    for sample in samples:
        need = planned_bytes(sample[1])
        if need > room:
            parts.append([])
            room = size
        parts[-1].append(sample)
        room -= need
    return parts
