"""Duplicates of a whole collection, on Ray: which images are copies of others, as the deny-list `duplicates`.

Records travel between tasks by ranges of their hashes, so that a task holds one range alone, and what waits lies in Ray's object store, on
disk where memory is short (`tasks.exchange`). Below, P ranges of hashes and K of image numbers:

    indices ─▶ (hashes, number)  by hash: P ─▶ groups of equal pictures ─┬─▶ (number, first of its group)  by first: K ──┐
                                                                         └─▶ one of each group ─▶ near pairs, mask by mask │
                                                            by the later image: K ─▶ settled, range after range ─▶ gone ─▶ (number, of)
    by of: K ─▶ its key  by number: K ─▶ own key ─▶ sorted by key ─▶ deny/duplicates.parquet, duplicates.json
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.shard import Duplicates
from pipeline.core.errors import ConfigError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.deny import DenyListWriter, find_about, name_for
from pipeline.shards.duplicates.dataset import Range, cut, keys_of, read_hashes, shard_parts, split_by
from pipeline.shards.duplicates.near import Bits, find_pairs, masks_for, settle
from pipeline.shards.manifest import find_json, read_manifest

NAME = "duplicates"
# of: the key of the image that stays; distance: bits in which their perceptual hashes differ; exact: their files are equal.
_REASONS = {"of": pa.string(), "split": pa.string(), "shard": pa.string(), "distance": pa.uint8(), "exact": pa.bool_()}
_SLICES = 4  # in which a range's rows come to the driver
_RECORD = np.dtype([("number", "<i8"), ("phash", "<u8"), ("high", "<u8"), ("low", "<u8"), ("has", "?")])
_NODE = np.dtype([("phash", "<u8"), ("number", "<i8")])
_MEMBER = np.dtype([("number", "<i8"), ("first", "<i8"), ("exact", "?")])
_PAIR = np.dtype([("low", "<i8"), ("high", "<i8"), ("distance", "u1")])
_COPY = np.dtype([("number", "<i8"), ("of", "<i8"), ("distance", "u1"), ("exact", "?")])


@dataclass(frozen=True)
class Sizes:
    """Images that one task holds: records of a range of hashes (32 bytes each, and as many again while they are sorted), a range of numbers
    (what of it is a copy, with its keys), and a piece of what a task sends to another: smaller ones would all lie in the driver. And the
    near pairs that a task may find, of 17 bytes."""

    part: int = 1 << 23
    range: int = 1 << 24
    piece: int = 1 << 14
    pairs: int = 1 << 25


def find_duplicates(directory: Storage, config: Duplicates, workers: int | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """Publish which images of the dataset at `directory` are copies, and return what `duplicates.json` then says of them. Needs a Ray that
    is initialised; what was found before, in the same dataset and as `config` has it, stands.

    That says `dataset` (its manifest's hash), `near`, `images` (all there are) and `denied`: {split: {exact, near}}.
    Of equal files the first stays, in the order of `records.shard_parts`. With `config.near`, so does an image unless one before it that
    stays has a perceptual hash so near (`near.settle`).

    Raises:
        DataError: there is no dataset, or an index is damaged, or has no perceptual hashes though `config.near` is given.
        ConfigError: so many images are that near to each other that the pairs cannot be held.
    """
    manifest = read_manifest(directory)
    name, wanted = name_for(NAME, manifest.version), {"dataset": manifest.hash, "near": config.near}
    known, about = find_json(directory, file := f"{name}.json"), find_about(directory, name) or {}
    if wanted.items() <= known.items() and wanted.items() <= about.items():
        say(f"{NAME:<12} found already: {total(known['denied']):,} of {known['images']:,} images")
        return known
    directory.remove(file)  # what it says is no longer so
    search = _Search(directory, config.near, workers, sizes or Sizes())
    counts: Counter[tuple[str, bool]] = Counter()
    with DenyListWriter(directory, name, _REASONS) as out:
        for table in search.tables():
            for row in table.group_by(["split", "exact"]).aggregate([("key", "count")]).to_pylist():
                counts[row["split"], row["exact"]] += row["key_count"]
            out.add(table)
        out.publish(wanted)
    denied = {split: {"exact": counts[split, True], "near": counts[split, False]} for split in sorted(manifest.splits)}
    found = wanted | {"images": search.images, "denied": denied}
    directory.write(file, (json.dumps(found, indent=2) + "\n").encode())
    return found


def total(denied: dict[str, dict[str, int]]) -> int:
    """Of all splits and kinds."""
    return sum(sum(kinds.values()) for kinds in denied.values())


class _Search:
    def __init__(self, directory: Storage, near: int | None, workers: int | None, sizes: Sizes) -> None:
        from pipeline.shards import tasks  # Ray comes with it, of which a plan has no need

        self.directory, self.near, self.workers, self.sizes, self.tasks = directory, near, workers, sizes, tasks
        self.parts = shard_parts(directory)
        self.images = sum(p.samples for p in self.parts)
        self.hash_parts = -(-self.images // sizes.part)
        self.ranges = cut(self.parts, min(sizes.range, max(self.images // 64, sizes.range // 64)))
        self.firsts = np.array([r.first for r in self.ranges], dtype=np.int64)

    def exchange(self, what: str, unit: str, body: Any, jobs: Sequence[Any], shared: tuple[Any, ...], parts: int) -> list[list[Any]]:
        return self.tasks.exchange(what, unit, body, jobs, shared, parts, self.workers)

    def tables(self) -> Iterator[pa.Table]:
        """Rows of the list, a piece at a time, in no order."""
        k, p = len(self.ranges), self.hash_parts
        small = cut(self.parts, max(self.sizes.range // 64, self.sizes.piece * p))
        reads = [(r.end - r.first, (r,), ()) for r in small]
        records = self.exchange("read hashes", "images", _read, reads, (self.directory, self.near is not None, p), p)
        nodes, *members = self.exchange("group", "parts", _group, [(1, (), pieces) for pieces in records], (self.firsts,), k + 1)
        del records
        gone = self._settled(self._pairs(nodes)) if self.near else [[] for _ in self.ranges]
        grouped = [(1, (len(g) > 0,), [*g, *m]) for g, m in zip(gone, members, strict=True)]
        copies = self.exchange("copies", "ranges", _copies, grouped, (self.firsts,), k)
        del gone, members, grouped
        named = self.exchange("keys", "ranges", _name_originals, self._by_range(copies), (self.directory, self.firsts), k)
        rows = self.exchange("own keys", "ranges", _name_copies, self._by_range(named), (self.directory,), _SLICES)
        del copies, named
        while rows:
            for piece in rows.pop():
                yield self.tasks.take("own keys", piece)

    def _by_range(self, pieces: list[list[Any]]) -> list[Any]:
        return [(1, (r,), held) for r, held in zip(self.ranges, pieces, strict=True)]

    def _pairs(self, nodes: list[Any]) -> list[list[Any]]:
        """Near pairs, by the range of the later image."""
        assert self.near is not None
        masks = masks_for(self.near, self.images)
        shared = (self.near, masks, self.sizes.pairs)
        if self.hash_parts == 1:
            found = self.exchange("near pairs", "masks", _pairs, [(1, (which,), nodes) for which in range(len(masks))], shared, 1)
            cuts = [(1, (), found[0])]
            return self.exchange("sort pairs", "masks", _split_pairs, cuts, (self.firsts,), len(self.ranges))
        by_range: list[list[Any]] = [[] for _ in self.ranges]
        for which in range(len(masks)):
            what = f"near {which + 1} of {len(masks)}"
            dealt = self.exchange(what, "parts", _deal, [(1, (which,), [n]) for n in nodes], (masks, self.hash_parts), self.hash_parts)
            found = self.exchange(what, "parts", _pairs, [(1, (which,), pieces) for pieces in dealt], shared, 1)
            split = self.exchange(what, "masks", _split_pairs, [(1, (), found[0])], (self.firsts,), len(self.ranges))
            for held, pieces in zip(by_range, split, strict=True):
                held += pieces
        return by_range

    def _settled(self, pairs: list[list[Any]]) -> list[list[Any]]:
        """Of each range which images go, and near to which: one range after the other, since the earlier decide over the later."""
        gone: list[Any] = []
        settled = []
        for number, pieces in enumerate(pairs):
            job = (1, (len(gone) > 0,), [*gone, *pieces])
            gone, found = self.exchange(f"settle {number + 1} of {len(pairs)}", "ranges", _settle, [job], (self.images,), 2)
            settled.append(found)
        return settled


# The bodies of the tasks: arguments, what is shared, and pieces.


def _read(part: Range, directory: Storage, near: bool, parts: int) -> list[np.ndarray]:
    records = np.empty(part.end - part.first, dtype=_RECORD)
    records["number"] = np.arange(part.first, part.end)
    for shard in part.parts:
        rows, hashes = records[shard.first - part.first :][: shard.samples], read_hashes(directory, shard, near)
        rows["phash"], rows["has"], (rows["high"], rows["low"]) = hashes.phash, hashes.has, hashes.sha
    return split_by(np.where(records["has"], _spread(records["phash"]), records["high"]) % np.uint64(parts), parts, records)


def _group(firsts: np.ndarray, *pieces: np.ndarray) -> list[np.ndarray]:
    """One image of each group of equal pictures (by perceptual hash, or sha256 without one), and the others by the range of their first."""
    records = np.concatenate(pieces)
    hashed, others = records[records["has"]], records[~records["has"]]
    first, members = _grouped(hashed, ("phash",))
    nodes = np.empty(len(first), dtype=_NODE)
    nodes["phash"], nodes["number"] = first["phash"], first["number"]
    members = np.concatenate([members, _grouped(others, ("high", "low"))[1]])
    return [nodes, *split_by(_range_of(members["first"], firsts), len(firsts), members)]


def _grouped(records: np.ndarray, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(the first record of each group with equal `columns`, the others as members)."""
    records = records[np.lexsort((records["number"], *(records[c] for c in columns)))]
    starts = np.ones(len(records), dtype=bool)
    starts[1:] = np.any([records[c][1:] != records[c][:-1] for c in columns], axis=0)
    leaders = records[np.flatnonzero(starts)]
    leader = leaders[np.cumsum(starts) - 1]
    members = np.empty(len(records) - len(leaders), dtype=_MEMBER)
    members["number"], members["first"] = records["number"][~starts], leader["number"][~starts]
    members["exact"] = ((records["high"] == leader["high"]) & (records["low"] == leader["low"]))[~starts]
    return leaders, members


def _deal(which: int, masks: list[int], parts: int, nodes: np.ndarray) -> list[np.ndarray]:
    return split_by(_spread(nodes["phash"] & np.uint64(masks[which])) % np.uint64(parts), parts, nodes)


def _pairs(which: int, near: int, masks: list[int], most: int, *pieces: np.ndarray) -> list[np.ndarray]:
    nodes = np.concatenate(pieces)
    try:
        one, other, distance = find_pairs(np.ascontiguousarray(nodes["phash"]), near, masks, which, most)
    except OverflowError as e:
        raise ConfigError(f"shard.duplicates.near: {near} bits are too many for this dataset, {e}; choose fewer") from e
    pairs = np.empty(len(one), dtype=_PAIR)
    numbers = nodes["number"][one], nodes["number"][other]
    pairs["low"], pairs["high"], pairs["distance"] = np.minimum(*numbers), np.maximum(*numbers), distance
    return [pairs]


def _split_pairs(firsts: np.ndarray, *pieces: np.ndarray) -> list[np.ndarray]:
    pairs = np.concatenate(pieces)
    return split_by(_range_of(pairs["high"], firsts), len(firsts), pairs)


def _settle(is_later: bool, images: int, *pieces: np.ndarray) -> list[np.ndarray]:
    gone = Bits(images)
    if is_later:
        gone.data, pieces = pieces[0].copy(), pieces[1:]
    pairs = np.concatenate(pieces)
    numbers, of, distance = settle(pairs["low"], pairs["high"], pairs["distance"], gone)
    found = np.zeros(len(numbers), dtype=_COPY)
    found["number"], found["of"], found["distance"] = numbers, of, distance
    return [gone.data, found]


def _copies(has_gone: bool, firsts: np.ndarray, *pieces: np.ndarray) -> list[np.ndarray]:
    """All copies whose group's first is in one range, by the range of the image that stays."""
    gone, members = (pieces[0], np.concatenate(pieces[1:])) if has_gone else (np.empty(0, dtype=_COPY), np.concatenate(pieces))
    copies = np.empty(len(members), dtype=_COPY)
    copies["number"], copies["of"], copies["exact"], copies["distance"] = members["number"], members["first"], members["exact"], 0
    if len(gone):
        at = np.minimum(np.searchsorted(gone["number"], members["first"]), len(gone) - 1)
        also = gone["number"][at] == members["first"]  # the first goes itself, and the others with it
        copies["of"][also], copies["distance"][also], copies["exact"][also] = gone["of"][at[also]], gone["distance"][at[also]], False
    copies = np.concatenate([gone, copies])
    return split_by(_range_of(copies["of"], firsts), len(firsts), copies)


def _name_originals(part: Range, directory: Storage, firsts: np.ndarray, *pieces: np.ndarray) -> list[pa.Table]:
    copies = np.concatenate(pieces)
    keys, _ = keys_of(directory, part, copies["of"])
    table = pa.table({"number": copies["number"], "of": keys, "distance": copies["distance"], "exact": pa.array(copies["exact"])})
    return split_by(_range_of(copies["number"], firsts), len(firsts), table)


def _name_copies(part: Range, directory: Storage, *pieces: pa.Table) -> list[pa.Table]:
    table = pa.concat_tables(pieces)
    keys, shards = keys_of(directory, part, table["number"].to_numpy())
    names, splits = (pa.array([getattr(p, what) for p in part.parts]) for what in ("name", "split"))
    table = pa.table(
        {"key": keys, "of": table["of"], "split": splits.take(shards), "shard": names.take(shards)}
        | {name: table[name] for name in ("distance", "exact")}
    )
    size = -(-len(table) // _SLICES)
    return [table.slice(n * size, size) for n in range(_SLICES)]


def _range_of(numbers: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    return np.searchsorted(firsts, numbers, side="right") - 1


def _spread(hashes: np.ndarray) -> np.ndarray:
    """Perceptual hashes are not evenly spread; these numbers are (the multiplier is 2^64 over the golden ratio)."""
    return (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)
