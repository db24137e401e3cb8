"""Images of evaluation sets in a collection, on Ray: which of ours go, as the deny-list `contamination`, and an audit of each set.

The hashes of a set are sent to every task, each of which compares a range of ours with them: so ours are read once a set, wherever they
lie, and nothing of them travels but what was found. A set of more than `TABLE` images is taken in parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.shard import Contamination
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.deny import DenyListWriter, find_about, name_for
from pipeline.shards.digests import DigestTable
from pipeline.shards.duplicates.dataset import (
    Hashes,
    Part,
    Range,
    cut,
    has_hashes,
    keys_of,
    read_columns,
    read_hashes,
    shard_parts,
)
from pipeline.shards.duplicates.near import find_matches
from pipeline.shards.manifest import find_json, read_manifest

NAME = "contamination"
TABLE = 1 << 23  # images of a set that a task compares with at a time, 33 bytes each, and some more while they are sorted
_RANGE = 1 << 18  # of ours that a task reads
# of: the URL of the set; of_key: the key of its image that is nearest, the first of several; the others as of duplicates.
_REASONS = {**dict.fromkeys(("of", "of_key", "split", "shard"), pa.string()), "distance": pa.uint8(), "exact": pa.bool_()}


@dataclass(frozen=True)
class _Set:
    """What every task knows of a part of a set. Images are numbered from `first`; a hash stands for the images that have it, which are
    `images[starts[h] : starts[h + 1]]`, ascending; `sha` and `phash` have each hash once."""

    keys: pa.Array
    sha: DigestTable
    sha_images: tuple[np.ndarray, np.ndarray]  # (starts, images)
    phash: np.ndarray
    phash_images: tuple[np.ndarray, np.ndarray]


def find_contamination(
    directory: Storage, configs: Sequence[Contamination], workers: int | None = None, images: int = _RANGE
) -> dict[str, Any]:
    """Publish which images of the dataset at `directory` are also in the evaluation sets that `configs` name, all in one list in the place
    of the one before, and return the audit, which is kept as `contamination.json`:

        dataset                                                    hash of our manifest
        denied: {split of ours: {exact, near}}                     how many of ours go; one that several sets have is counted once
        sets: [{url, split (null: all), near, dataset (its manifest's hash),
                images: {split of theirs: {images, exact, near}},  how many there are; of these among ours as equal files; or near
                denied: {split of ours: {exact, near}}}]           how many of ours go because of it

    Needs a Ray that is initialised; an audit of the same sets and dataset stands. Sets without perceptual hashes have them worked out of
    their images, each time: nothing is written there. `images` of ours are a task's.

    Raises:
        DataError: there is no dataset, ours or theirs, or an index is damaged, or ours has no perceptual hashes though `near` is given.
    """
    manifest = read_manifest(directory)
    name = name_for(NAME, manifest.version)
    file = f"{name}.json"
    wanted = [
        {"url": str(theirs.url), "split": c.split, "near": c.near, "dataset": read_manifest(theirs).hash}
        for c in configs
        for theirs in [Storage(c.url, directory.endpoint)]
    ]
    asked = {"dataset": manifest.hash, "sets": wanted}
    known, about = find_json(directory, file), find_about(directory, name) or {}
    is_whole = "denied" in known and known["dataset"] == manifest.hash  # older audits have counts of sets alone
    if is_whole and asked.items() <= about.items() and _asked(known["sets"]) == wanted:
        say(f"{NAME:<12} found already, in {directory.url}/{file}")
        return known
    directory.remove(file)  # what it says is no longer so
    parts, audits = shard_parts(directory), list[dict[str, Any]]()
    denied = {p.split: {"exact": 0, "near": 0} for p in sorted(parts, key=lambda p: p.split)}
    with DenyListWriter(directory, name, _REASONS) as out:
        for config, about in zip(configs, wanted, strict=True):
            audits.append(about | _compare(directory, parts, config, out, workers, images))
        out.publish(asked, lambda rows: _count_ours(denied, rows.group_by("key").aggregate([("split", "min"), ("exact", "max")])))
    audit = {"dataset": manifest.hash, "denied": denied, "sets": audits}
    directory.write(file, (json.dumps(audit, indent=2, ensure_ascii=False) + "\n").encode())
    return audit


def _asked(audits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What decided them."""
    return [{name: audit[name] for name in ("url", "split", "near", "dataset")} for audit in audits]


def _compare(
    directory: Storage, parts: list[Part], config: Contamination, out: DenyListWriter, workers: int | None, images: int
) -> dict[str, Any]:
    """The audit of one set; what of ours goes because of it is added to the list."""
    from pipeline.shards import tasks  # Ray comes with it, of which a plan has no need

    theirs, near = Storage(config.url, directory.endpoint), config.near is not None
    their_parts = shard_parts(theirs, config.split)
    made = near and not has_hashes(theirs, their_parts)
    audit: dict[str, dict[str, dict[str, int]]] = {
        "images": {p.split: {"images": 0, "exact": 0, "near": 0} for p in their_parts},
        "denied": {p.split: {"exact": 0, "near": 0} for p in sorted(parts, key=lambda p: p.split)},
    }
    ours, found = cut(parts, images), list[list[Any]]()
    for table in cut(their_parts, TABLE):
        read = [(r.end - r.first, (r,), ()) for r in cut(table.parts, max(images, 1 << 12))]
        [pieces] = tasks.exchange("their hashes", "images", _read, read, (theirs, near, made), 1, workers)
        [[whole]] = tasks.exchange("their hashes", "sets", _set_of, [(1, (), pieces)], (), 1, workers)
        del pieces
        jobs = [(r.end - r.first, (r,), [whole]) for r in ours]
        matches, theirs_found = tasks.exchange("compare", "images", _match, jobs, (directory, config.near), 2, workers)
        hits = np.zeros((table.end - table.first, 2), dtype=bool)  # exact, near
        for piece in theirs_found:
            for column, numbers in enumerate(tasks.take("compare", piece)):
                hits[numbers, column] = True
        _count_theirs(audit["images"], table, hits)
        found.append(matches)
    # Of several parts of a set, the nearest match of each of ours.
    jobs = [(r.end - r.first, (r,), [matches[n] for matches in found]) for n, r in enumerate(ours)]
    [named] = tasks.exchange("keys", "images", _name, jobs, (directory, config.url), 1, workers)
    for piece in named:
        rows: pa.Table = tasks.take("keys", piece)
        _count_ours(audit["denied"], rows.select(["key", "split", "exact"]))
        out.add(rows)
    return audit


def _count_ours(counts: dict[str, dict[str, int]], rows: pa.Table) -> None:
    """Of (key, split, exact), a row an image."""
    rows = rows.rename_columns(["key", "split", "exact"])
    for row in rows.group_by(["split", "exact"]).aggregate([("key", "count")]).to_pylist():
        counts[row["split"]]["exact" if row["exact"] else "near"] += row["key_count"]


def _count_theirs(counts: dict[str, dict[str, int]], table: Range, hits: np.ndarray) -> None:
    """An image with an equal file among ours is counted as that alone."""
    for part in table.parts:
        rows = hits[part.first - table.first :][: part.samples]
        counts[part.split]["images"] += part.samples
        counts[part.split]["exact"] += int(rows[:, 0].sum())
        counts[part.split]["near"] += int((rows[:, 1] & ~rows[:, 0]).sum())


# The bodies of the tasks: arguments, what is shared, and pieces.


def _read(part: Range, theirs: Storage, near: bool, made: bool) -> list[tuple[pa.Array, list[Hashes]]]:
    keys = [read_columns(theirs, p, ["key"])["key"].combine_chunks().cast(pa.string()) for p in part.parts]
    return [(pa.concat_arrays(keys), [read_hashes(theirs, p, near, made) for p in part.parts])]


def _set_of(*pieces: tuple[pa.Array, list[Hashes]]) -> list[_Set]:
    hashes = [h for _, some in pieces for h in some]
    high, low = (np.concatenate([h.sha[half] for h in hashes]) for half in (0, 1))
    sha = DigestTable(high, low)
    phash, has = np.concatenate([h.phash for h in hashes]), np.concatenate([h.has for h in hashes])
    distinct, which = np.unique(phash[has], return_inverse=True)
    by_sha = _images_by(sha.find(high, low), np.arange(len(high)), len(sha))
    by_phash = _images_by(which, np.flatnonzero(has), len(distinct))
    return [_Set(pa.concat_arrays([k for k, _ in pieces]), sha, by_sha, distinct, by_phash)]


def _images_by(which: np.ndarray, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(where the images of each of `count` hashes begin, the images); `which` (n,) is the hash of each."""
    return np.searchsorted(np.sort(which), np.arange(count + 1)), images[np.argsort(which, kind="stable")]


def _match(part: Range, directory: Storage, near: int | None, theirs: _Set) -> list[Any]:
    """(of each of ours that is theirs too, its number, and the key of their nearest; their images that were met, by hash of each kind)."""
    numbers, places, distances, exact = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    met_sha, met_phash = np.zeros(len(theirs.sha), dtype=bool), np.zeros(len(theirs.phash), dtype=bool)
    for shard in part.parts:
        ours = read_hashes(directory, shard, near is not None)
        equal = theirs.sha.find(*ours.sha)
        rows = np.flatnonzero(equal >= 0)
        met_sha[equal[rows]] = True
        starts, images = theirs.sha_images
        found = [(rows, images[starts[equal[rows]]], np.zeros(len(rows), dtype=np.uint8), np.ones(len(rows), dtype=bool))]
        if near is not None and ours.has.any() and len(theirs.phash):
            distinct, which = np.unique(ours.phash[ours.has], return_inverse=True)
            one, other, distance = find_matches(distinct, theirs.phash, near)
            met_phash[other] = True
            starts, images = theirs.phash_images
            first = images[starts[other]]
            order = np.lexsort((first, distance, one))
            one, first, distance = one[order], first[order], distance[order]
            best = np.append(np.ones(min(1, len(one)), dtype=bool), one[1:] != one[:-1])
            at = np.full(len(distinct), -1, dtype=np.int64)
            at[one[best]] = np.flatnonzero(best)
            hit = np.where(equal[ours.has] < 0, at[which], -1)
            rows = np.flatnonzero(ours.has)[hit >= 0]
            found.append((rows, first[hit[hit >= 0]], distance[hit[hit >= 0]], np.zeros(len(rows), dtype=bool)))
        for held, values in zip((numbers, places, distances, exact), zip(*found, strict=True), strict=True):
            held += values
        numbers[-len(found) :] = [n + shard.first for n in numbers[-len(found) :]]
    columns = [np.concatenate(held) for held in (numbers, places, distances, exact)]
    table = pa.table(
        {"number": columns[0], "of_key": theirs.keys.take(pa.array(columns[1])), "distance": columns[2], "exact": pa.array(columns[3])}
    )
    return [table, [_met(met_sha, theirs.sha_images), _met(met_phash, theirs.phash_images)]]


def _met(hashes: np.ndarray, of: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The images that have one of the `hashes`, bool by hash."""
    starts, images = of
    return images[np.repeat(hashes, np.diff(starts))]


def _name(part: Range, directory: Storage, url: str, *pieces: pa.Table) -> list[pa.Table]:
    """Rows of the list."""
    table = pa.concat_tables(pieces)
    exact, distance, numbers = (table[name].to_numpy() for name in ("exact", "distance", "number"))
    order = np.lexsort((distance, ~exact, numbers))  # of several parts of a set, the first of the nearest
    order = order[np.append(np.ones(min(1, len(order)), dtype=bool), np.diff(numbers[order]) > 0)]
    table = table.take(pa.array(order))
    keys, shards = keys_of(directory, part, table["number"].to_numpy())
    names, splits = (pa.array([getattr(p, what) for p in part.parts]) for what in ("name", "split"))
    own = {"key": keys, "of": pa.array([url] * len(keys), pa.string()), "split": splits.take(shards), "shard": names.take(shards)}
    return [pa.table(own | {name: table[name] for name in ("of_key", "distance", "exact")}).select(["key", *_REASONS])]
