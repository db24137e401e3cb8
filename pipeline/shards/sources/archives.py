"""WebDataset tars that others wrote, written anew: filtered, resized, shuffled across all of them.

Planning reads each tar once, from front to back, or its index where one lies beside it; then each sample is read by its place, in one
request, so that samples of all tars are mixed as files of a folder are. (`adopt` takes tars as they are.)

Where tars are those of a dataset that has deny-lists (`deny/*.parquet` beside them), what readers of it leave out is left out here too, as
`denied`: the same lists, matched by the same keys. They are no part of what a sample is: one that is on no list any more is taken by the
next version, one that has got on a list since is withdrawn from what was written (`withdrawn.py`). Of an http(s) URL, whose folders
cannot be listed, they are not looked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.shard import Fetch
from pipeline.core.errors import DataError, StorageError
from pipeline.core.storage import Storage
from pipeline.shards.deny import find_about, own_lists
from pipeline.shards.dropped import DENIED, Dropped
from pipeline.shards.keys import Keys, read_keys
from pipeline.shards.sources.base import Files, Ignored, Item, Lost, Part, Source, Survey, printable, stamp_of
from pipeline.shards.sources.files import explained, find_files
from pipeline.shards.tars import Tape, read_blocks, read_piece

_READERS = 8  # samples read at once
_AHEAD = 16
_SUFFIXES = ("tar", "tgz")
_at_hand: dict[str, tuple[str, dict[str, Keys]]] = {}  # the deny-lists of one folder, by its URL, with what tells them from others
_GUESS = 100_000  # bytes of a sample that is longer than the part of a tar which is looked at


class TarSource(Source):
    """Samples of tars: an image and perhaps txt, cls and json members. A part is a tar."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        super().__init__(url, endpoint)
        self._denying: dict[str, tuple[list[str], str]] = {}  # by folder, as `_deny_lists` has found them

    def check(self) -> None:
        self.parts()

    def parts(self) -> list[Part]:
        self.storage, files = find_files(self.url, _SUFFIXES, "tars", self.storage.endpoint)
        packed = [name for name, _ in files if not name.endswith(".tar")]
        if packed:
            raise DataError(
                f"shard.source.url: {packed[0]} ({len(packed)} in all) is compressed, so that samples cannot be read by their place in it; "
                "unpack such tars (gunzip)"
            )
        return [Part(name, size) for name, size in files]

    def survey(self) -> Survey:
        """By the index beside the first of them; where there is none, by its first samples."""
        parts = self.parts()
        total, index = sum(p.bytes for p in parts), self._index(parts[0])
        rows = max(1, round(total / (self._mean_bytes(parts[0]) if index is None else parts[0].bytes / max(1, len(index)))))
        self._denying.clear()
        with ThreadPoolExecutor(_AHEAD) as pool:
            denied = [told for paths, told in pool.map(self._deny_lists, sorted({_folder(part) for part in parts})) if paths]
        stamp = stamp_of(parts)
        if denied:
            stamp = hashlib.sha256(json.dumps([stamp, denied]).encode()).hexdigest()
        return Survey(rows, len(parts), total / rows, 0, False, stamp)

    def _mean_bytes(self, part: Part) -> float:
        """Of a sample, by those in the first block of a tar."""
        from pipeline.shards.index import TarIndex  # which knows how samples are made

        index = TarIndex()
        with explained(part.name):
            index.read(Tape(islice(read_blocks(self.storage, part.name), 1)))
        return (index.rows[-1]["offset"] + index.rows[-1]["length"]) / len(index.rows) if index.rows else _GUESS

    def rows(self, part: Part) -> Iterator[Item | Lost | Ignored]:
        from pipeline.shards.index import TarIndex  # which knows how samples are made

        found = self._index(part)
        if found is not None:
            yield from self._allowed(part, found)
            return
        index = TarIndex()
        try:
            end = index.read(Tape(read_blocks(self.storage, part.name)))
        except FileNotFoundError:
            raise DataError(f"shard.source.url: {part.name} vanished after it was listed") from None
        if end.kind in ("compressed", "not-a-tar"):
            raise DataError(f"shard.source.url: {part.name}: {end}")
        yield from self._allowed(part, index.rows)
        for key, dropped in index.dropped:
            yield Lost(f"{part.name}/{key}" if key else part.name, dropped.reason, dropped.detail)
        yield Ignored(index.ignored)

    def _allowed(self, part: Part, rows: list[dict[str, Any]]) -> Iterator[Item | Lost]:
        """Of a tar's rows, those that no deny-list names, and which list names the others."""
        keys = pa.chunked_array([pa.array([row["key"] for row in rows], pa.string())])
        named = [(name, listed.holds(keys)) for name, listed in self._denied_keys(_folder(part)).items()]
        for number, row in enumerate(rows):
            by = next((name for name, holds in named if holds[number]), None)
            yield _item(part.name, row) if by is None else Lost(f"{part.name}/{row['key']}", DENIED, f"it is on the deny-list {by}")

    def _deny_lists(self, folder: str) -> tuple[list[str], str]:
        """The paths of those beside the tars of a folder, and what tells them from others: looked up once, by `survey` for all tasks."""
        if folder not in self._denying:
            directory = self._directory(folder)
            paths = [] if self.storage.protocol in ("http", "https") else own_lists(directory, None)
            self._denying[folder] = paths, json.dumps([[path, _made_of(directory, path)] for path in paths], sort_keys=True)
        return self._denying[folder]

    def _denied_keys(self, folder: str) -> dict[str, Keys]:
        """By list; read once a process."""
        paths, told = self._deny_lists(folder)
        directory = self._directory(folder)
        if _at_hand.get(directory.url, ("", {}))[0] != told:
            _at_hand.clear()
            _at_hand[directory.url] = told, {path: read_keys(directory, path, "shard.source.url") for path in paths}
        return _at_hand[directory.url][1]

    def _directory(self, folder: str) -> Storage:
        return self.storage / folder if folder else self.storage

    def _index(self, part: Part) -> list[dict[str, Any]] | None:
        name = part.name.removesuffix(".tar") + ".index.parquet"
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(name)))
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"shard.source.url: {name} cannot be read ({e}); remove it, and the tar itself is read") from e
        return table.to_pylist()

    def fetch(self, items: Sequence[Item], settings: Fetch, max_bytes: int, share: int) -> Iterator[tuple[int, Files | Dropped]]:
        _at_hand.clear()  # all rows are listed
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(items), _AHEAD):
                yield from enumerate(pool.map(self._read, items[start : start + _AHEAD]), start)

    def _read(self, item: Item) -> Files | Dropped:
        name, offset, length, label, *places, crc = item.place
        start = int(offset)
        try:
            data = read_piece(self.storage, str(name), start, start + int(length))
        except FileNotFoundError:
            raise DataError(f"shard.source.url: {name} vanished after it was listed") from None
        except StorageError as e:
            if self.storage.protocol not in ("http", "https"):
                self.storage.exists()  # raises where nothing can be read there
            return Dropped("unreadable", printable(str(e)))
        if len(data) < int(length):
            return Dropped("unreadable", f"{name} was cut short after it was listed")
        if zlib.crc32(data) != crc:
            return Dropped("unreadable", f"{name} has other bytes there than when it was listed, or than its index says")
        image, text, meta = (
            data[int(at) - start : int(at) - start + int(n)] if int(n) >= 0 else None
            for at, n in zip(places[::2], places[1::2], strict=True)
        )
        side = {"txt": text, "json": meta, "cls": str(label).encode() if int(label) >= 0 else None}
        return Files(image or b"", {suffix: value for suffix, value in side.items() if value is not None})


def _folder(part: Part) -> str:
    return part.name.rpartition("/")[0]


def _made_of(directory: Storage, path: str) -> Any:
    """Of a deny-list of ours what it was made of, which decides it; of another its bytes."""
    about = find_about(directory, path.rpartition("/")[2].removesuffix(".parquet"))
    return about if about is not None else hashlib.sha256(directory.read(path)).hexdigest()


def _item(tar: str, row: dict[str, Any]) -> Item:
    places = [row[f"{part}_{what}"] for part in ("image", "txt", "json") for what in ("offset", "length")]
    there = {"txt": row["txt_length"] >= 0, "json": row["json_length"] >= 0, "cls": row["cls"] >= 0}
    size = sum(row[f"{part}_length"] for part in ("image", "txt", "json") if row[f"{part}_length"] > 0)
    side = {suffix: f"{tar}/{row['key']}.{suffix}" for suffix, is_there in there.items() if is_there}
    return Item(f"{tar}/{row['key']}", size, side=side, place=(tar, row["offset"], row["length"], row["cls"], *places, row["crc32"]))
