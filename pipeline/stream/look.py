"""What a dataset holds, for a person to look at: counts, samples by key, everything about one sample.

All of it in plain values, ready for JSON; `tell.py` makes text of them. A dataset may have a million shards: what only their
indices tell is told of a few of these, evenly spread, and how many they were is said.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.errors import DataError, StorageError, nearest
from pipeline.core.progress import Progress, say
from pipeline.core.storage import Storage
from pipeline.shards.manifest import INDEX_SCHEMA, ShardRecord, ShardTable, read_manifest
from pipeline.shards.rows import read_index
from pipeline.shards.statistics import spread
from pipeline.stream.decode import decode
from pipeline.stream.index import Sample
from pipeline.stream.ledger import BadSample
from pipeline.stream.reader import Dataset, open_dataset
from pipeline.stream.view import numeric

INDICES = 64  # that are looked at for counts
THREADS = 16
_NAMED = 10  # classes
_CLOSE = 20  # keys of an index that may be the one that was meant


def choose(size: int, count: int, seed: int | None) -> list[int]:
    """As `spread`, or at random where there is a seed; ascending."""
    if seed is None:
        return spread(size, count)
    return np.sort(np.random.default_rng(seed).choice(size, min(size, count), replace=False)).tolist()


def read_indices(
    directory: Storage, shards: ShardTable, numbers: Sequence[int], columns: Sequence[str] = ()
) -> Iterator[tuple[int, pa.Table]]:
    """(shard, `columns` of its index, by default all of numbers) for each of `numbers`; an index that is damaged is told and passed over.

    Raises:
        DataError: none of them can be read.
    """

    def one(shard: int) -> pa.Table | DataError:
        try:
            return _read_index(directory, shards[shard], columns)
        except DataError as e:
            return e

    lost = list[DataError]()
    with ThreadPoolExecutor(THREADS) as pool, Progress("look", len(numbers), "indices") as shown:
        for start in range(0, len(numbers), INDICES):  # so that who stops early has not asked for all
            group = numbers[start : start + INDICES]
            for shard, index in zip(group, pool.map(one, group), strict=True):
                shown.update()
                if isinstance(index, DataError):
                    say(f"warning: {index}; it is passed over")
                    lost.append(index)
                else:
                    yield shard, index
    if len(lost) == len(numbers):
        raise lost[-1]


def _read_index(directory: Storage, record: ShardRecord, columns: Sequence[str]) -> pa.Table:
    # Not by way of the machine's cache: a look at all of them would push out what training has there.
    index = read_index(directory, record.index_name)
    return index.select([name for name in columns or numeric(index.schema) if name in index.column_names])


def open_split(url: str, split: str | None, endpoint: str | None) -> Dataset:
    """One split, by default train or the first there is, read a sample at a time, those on its deny-lists too; raises as `open_dataset`."""
    splits = sorted(read_manifest(Storage(re.sub(r"@\d+$", "", url), endpoint)).splits)
    return open_dataset(url, split or ("train" if "train" in splits or not splits else splits[0]), endpoint, own_deny=False, block=1)


# Counts


def count(dataset: Dataset) -> dict[str, Any]:
    """What the manifest and the table of shards say of the whole dataset, and a few indices of this split."""
    manifest, directory, shards = dataset.manifest, dataset.directory, dataset.shards
    tables = {name: ShardTable(directory, name) for name, samples in sorted(manifest.splits.items()) if samples}
    numbers = spread(len(shards), INDICES)
    found = pa.concat_tables((index for _, index in read_indices(directory, shards, numbers)), promote_options="permissive")
    values = {name: found[name].to_numpy() for name in found.column_names}
    return {
        "url": directory.url,
        "version": manifest.version,
        "hash": manifest.hash,
        "source": manifest.source,
        "splits": {name: {"samples": int(t.samples.sum()), "bytes": int(t.bytes.sum()), "shards": len(t)} for name, t in tables.items()},
        "classes": {"number": len(manifest.classes), "first": manifest.classes[:_NAMED]},
        "smallest": list(manifest.smallest),
        "read": manifest.read,
        "ignored": manifest.ignored,
        "dropped": manifest.dropped,
        "looked_at": {"split": dataset.split, "samples": len(found), "indices": len(numbers), "shards": len(shards)},
        "with": {
            "label": int((values["cls"] >= 0).sum()),
            "caption": int((values["txt_length"] > 0).sum()),
            "json": int((values["json_length"] > 0).sum()),
        },
        "sizes": {
            what: dict(zip(("5%", "median", "95%"), np.percentile(values[column], (5, 50, 95)).tolist(), strict=True))
            for what, column in (("width", "width"), ("height", "height"), ("bytes", "image_length"))
        },
        "samples_a_class": _samples_a_class(values["cls"], manifest.classes),
        "columns": {name: _column(values[name]) for name in values if name not in INDEX_SCHEMA.names},
    }


def _samples_a_class(labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any] | None:
    present = labels[labels >= 0]
    if not len(present):
        return None
    counts = np.bincount(present, minlength=len(classes))
    ends = {"most": int(counts.argmax()), "least": int(counts.argmin())}
    return {
        "median": float(np.median(counts)),
        **{end: {"class": class_name(classes, n), "samples": int(counts[n])} for end, n in ends.items()},
    }


def _column(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values.astype(np.float64))].astype(np.float64)
    ends = np.percentile(known, (0, 50, 100)).tolist() if len(known) else [None] * 3
    return {"values": len(known), **dict(zip(("min", "median", "max"), ends, strict=True))}


def class_name(classes: Sequence[str], label: int) -> str:
    """The name where the dataset names its classes, else the number; empty for no label."""
    return classes[label] if 0 <= label < len(classes) else str(label) if label >= 0 else ""


# Samples


def find_keys(dataset: Dataset, keys: Iterable[str]) -> dict[str, int]:
    """Sample numbers by key, found by looking through the indices until all are there.

    Raises:
        DataError: one of them is nowhere; names the nearest key.
    """
    wanted = dict.fromkeys(keys)
    numbers, close = dict[str, int](), {key: set[str]() for key in wanted}
    firsts = np.cumsum(dataset.shards.samples) - dataset.shards.samples
    for shard, index in read_indices(dataset.directory, dataset.shards, range(len(dataset.shards)), ["key"]):
        there = index["key"].to_pylist()
        for key in [key for key in wanted if key not in numbers]:
            if key in there:
                numbers[key] = int(firsts[shard]) + there.index(key)
            else:
                close[key].update(_closest(key, there))
        if len(numbers) == len(wanted):
            return {key: numbers[key] for key in wanted}
    absent = next(key for key in wanted if key not in numbers)
    raise DataError(
        f"data {dataset.directory.url}: none of the {len(dataset):,} samples of split {dataset.split!r} has the key {absent!r}"
        f"{nearest(absent, close[absent])}"
    )


def _closest(key: str, keys: Sequence[str]) -> list[str]:
    """Those with most characters in the same places: a billion keys are too many for a real distance."""
    letters = np.array([key, *keys]).view(np.uint32).reshape(len(keys) + 1, -1)[:, : len(key)]
    agreeing = (letters[1:] == letters[0]).sum(axis=1)
    return [keys[n] for n in np.argsort(-agreeing, kind="stable")[:_CLOSE].tolist() if 2 * agreeing[n] > len(key)]


def describe(dataset: Dataset, number: int) -> tuple[dict[str, Any], Sample | None]:
    """All there is to say of sample `number`, and the sample itself where it can be read.

    Raises:
        DataError: its shard's index is gone, so that it has no name.
    """
    try:
        key = dataset.key_of(number)
    except BadSample as e:
        raise DataError(f"data {dataset.directory.url}/{e}") from e
    shard = dataset.shards[dataset.locate(number)[0]]
    index = _read_index(dataset.directory, shard, INDEX_SCHEMA.names)
    row = index["key"].to_pylist().index(key)  # the view may have left out some before it
    said = index.slice(row, 1).to_pylist()[0]
    values: dict[str, Any] = {"number": number, "split": dataset.split, "shard": shard.name, "row": row, "key": key}
    values |= {"label": said["cls"], "class": class_name(dataset.classes, said["cls"]), "caption": None, "json": None, "format": None}
    values |= {name: said[name] for name in ("width", "height", "sha256")} | {
        "sha256_ok": None,
        "bytes": said["image_length"],
        "problem": "",
    }
    try:
        sample = dataset.read(number)
    except BadSample as e:
        return values | {"problem": str(e)}, None
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            values["format"] = (image.format or "").lower()
        decode(sample.image)
    except (OSError, ValueError) as e:
        values["problem"] = f"it cannot be decoded ({e})"
    values["sha256_ok"] = hashlib.sha256(sample.image).hexdigest() == said["sha256"]
    return values | {"caption": sample.text, "json": json.loads(sample.json or b"null")}, sample


def write_files(folder: Path, values: dict[str, Any], sample: Sample) -> list[str]:
    """The sample's image, caption, label and json below `folder`, as its shard has them; raises StorageError."""
    name = re.sub(r"[^\w.-]+", "_", values["key"]).lstrip(".")
    if name != values["key"]:  # a key may be a path, and two keys may be spelt the same now
        name = f"{values['number']}-{name}"
    suffix = {"jpeg": "jpg", None: "bin"}.get(values["format"], values["format"])
    label = str(sample.label).encode() if sample.label >= 0 else b""
    parts = {suffix: sample.image, "txt": sample.text.encode(), "cls": label, "json": sample.json}
    written = [(folder / f"{name}.{suffix}", data) for suffix, data in parts.items() if data]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in written:
            path.write_bytes(data)
    except OSError as e:
        raise StorageError(f"--out {folder}: cannot be written ({e.strerror or e})") from e
    return [str(path) for path, _ in written]
