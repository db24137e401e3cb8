"""What every kind of source is: parts that are listed cheaply, rows that are read part by part, bytes that are fetched for rows.

parts ──▶ rows (what there is, without the images' bytes) ──▶ a plan ──▶ fetch (the bytes of a shard's rows, in any order)
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.config.shard import Fetch
from pipeline.core.storage import Storage
from pipeline.shards.dropped import Dropped

_DEFAULTS: tuple[Any, ...] = (None, {}, ())


@dataclass(frozen=True)
class Item:
    """One image: `path` names it in its source (a relative path, a URL, a table and row), `bytes` of it and its side files (0 where that
    is not known beforehand), `side` their paths by suffix. A table gives caption, label and what else it has (`extra`) itself. `key`: what
    tells it from others, where that is not its path. `place`: where its bytes lie, for its source alone."""

    path: str
    bytes: int
    class_name: str | None = None
    side: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    label: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    place: tuple[str | int, ...] = ()

    @property
    def identity(self) -> str:
        return self.path if self.key is None else self.key

    def encode(self) -> str:
        """JSON, which `decode` reads; names that are not UTF-8 come through."""
        return json.dumps([self.path, self.bytes, {name: v for name in _OPTIONAL if (v := getattr(self, name)) not in _DEFAULTS}])

    @staticmethod
    def decode(text: str) -> Item:
        path, size, rest = json.loads(text)
        return Item(path, size, **{**rest, "place": tuple(rest.get("place", ()))})


_OPTIONAL = [f.name for f in fields(Item) if f.name not in ("path", "bytes")]


@dataclass(frozen=True)
class Files:
    """What was read of one item: the image and its side files by suffix."""

    image: bytes
    side: dict[str, bytes]


@dataclass(frozen=True)
class Lost:
    """A row that can be told to be of no use as it is listed."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Ignored:
    """Files that are no images: outside the count of what was read."""

    count: int


@dataclass(frozen=True)
class Part:
    """A piece of a source that one task lists. `rows` is None where they are not known before they are read."""

    name: str
    bytes: int
    rows: int | None = None


@dataclass(frozen=True)
class Survey:
    """What can be said before any row is read. `mean` bytes of an item, 0 where nobody knows; `exact`: `rows` is no estimate. `stamp`
    changes where the source may have changed: it is of the names, sizes and numbers of rows of its parts, or of its files."""

    rows: int
    parts: int
    mean: float
    classes: int
    exact: bool
    stamp: str


class Source(ABC):
    """A collection of images at `url`, in the S3-compatible store of `endpoint`. Picklable, for the tasks that read it.

    Errors of all methods: DataError and StorageError, which begin with the config's path (`shard.source.url`).
    """

    has_sizes = True  # `Item.bytes` says how large an image is
    in_blocks = False  # rows are shuffled by blocks of them, see `order`

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        self.url = url
        self.storage = Storage(url, endpoint)

    @abstractmethod
    def check(self) -> None:
        """Raise what `parts` would raise, as cheaply as that can be known."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """Sorted by name. Reads listings and footers, never an image."""

    @abstractmethod
    def survey(self) -> Survey:
        """Rows, bytes and classes, from listings and footers, or estimated from the beginning of a part."""

    @abstractmethod
    def rows(self, part: Part) -> Iterator[Item | Lost | Ignored]:
        """What there is in a part, in its order."""

    @abstractmethod
    def fetch(self, items: Sequence[Item], settings: Fetch, max_bytes: int, share: int) -> Iterator[tuple[int, Files | Dropped]]:
        """(place in `items`, its files or why there are none) of each, in any order. A body longer than `max_bytes` need not be read to its
        end; `share` workers fetch at the same time."""

    def classes(self) -> list[str]:
        """Names of classes that the source declares, in their order; others are found among its rows."""
        return []

    def order(self, item: Item, key_order: int) -> int:
        """64 bits by which rows are shuffled, worked out of those of the key, where units larger than a row stay together."""
        return key_order


def stamp_of(parts: list[Part]) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def printable(text: str) -> str:
    """File names that are not UTF-8 are spelt with a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
