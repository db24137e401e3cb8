"""How a finished dataset is distributed: sizes, shapes, captions, labels, scores; gathered from its indices alone.

Kept beside the manifest as `statistics.json` (of version n, `statistics-v<n>.json`), which names what it is of, so that a stale one
is seen. Of more than `MOST_SHARDS` shards so many are looked at, evenly spread over their names: where a dataset was shuffled, each
shard is a random share of it. Memory holds one histogram a quantity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.core.errors import DataError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.shards.deny import name_for
from pipeline.shards.duplicates.phash import PHASH
from pipeline.shards.histogram import Histogram
from pipeline.shards.manifest import INDEX_SCHEMA, Manifest, ShardRecord, ShardTable
from pipeline.shards.rows import check_columns, index_bytes, parse_index

FORMAT = 1
MOST_SHARDS = 4096  # whose indices are read: 20 million samples in shards of 5,000
_READERS = 16
_GROUP = 256  # indices asked for at once
_READ = ["cls", "width", "height", "image_length", "txt_length"]
# Quantity -> the exponent of its bins on the scale of log2, and whether ratios are counted. Four or eight bins an octave.
_OCTAVE, _RATIO = (-2, False), (-3, True)
_MEASURES = {"width": _OCTAVE, "height": _OCTAVE, "aspect_ratio": _RATIO, "image_bytes": _OCTAVE, "caption_bytes": _OCTAVE}


@dataclass(frozen=True)
class Quantity:
    """One number of each sample. `counts[n]` samples lie from `edges[n]` up to `edges[n + 1]`; `missing` ones have none.

    `least`, `mean` and `most` are exact; all three are None where no sample has the number.
    """

    edges: list[float]
    counts: list[int]
    missing: int
    least: float | None
    mean: float | None
    most: float | None

    @property
    def total(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The number that `share` of the samples lie below, as exactly as the bins tell it."""
        assert self.least is not None and self.most is not None, "asked of what some samples have"
        reach = np.cumsum(self.counts)
        n = int(np.searchsorted(reach, share * self.total))
        inside = (share * self.total - (reach[n] - self.counts[n])) / self.counts[n]
        return min(max(self.edges[n] + inside * (self.edges[n + 1] - self.edges[n]), self.least), self.most)


@dataclass(frozen=True)
class Statistics:
    """`samples` of `read` shards, of `shards` that there are, are counted in everything below.

    `measures`: width, height (pixels), aspect_ratio (width over height), image_bytes, caption_bytes (of UTF-8: characters
    are not in an index; a sample without a caption is missing there). `columns`: further numbers of the index, such as scores.
    `labels`: samples of each class, by its number; `unlabelled` have none. `dataset` is the manifest's hash, `index` the
    sha256 of the first shard's index, which changes when a column does.
    """

    dataset: str
    index: str
    shards: int
    read: int
    samples: int
    measures: dict[str, Quantity]
    columns: dict[str, Quantity]
    labels: list[int]
    unlabelled: int
    format: int = FORMAT

    @property
    def is_complete(self) -> bool:
        return self.read == self.shards


@dataclass
class _Sum:
    """A quantity as it is being counted."""

    histogram: Histogram
    missing: int = 0
    least: float = math.inf
    most: float = -math.inf
    sum: float = 0.0  # in the order of the shards, so the same each time

    def add(self, values: np.ndarray) -> None:
        """float64 (n,); what is not finite is missing."""
        known = values[np.isfinite(values)]
        self.missing += len(values) - len(known)
        if len(known):
            self.histogram.add(known)
            self.least, self.most = min(self.least, float(known.min())), max(self.most, float(known.max()))
            self.sum += math.fsum(known.tolist())

    def merge(self, other: _Sum) -> None:
        self.histogram.merge(other.histogram)
        self.missing += other.missing
        self.least, self.most, self.sum = min(self.least, other.least), max(self.most, other.most), self.sum + other.sum

    def finish(self) -> Quantity:
        edges, counts = self.histogram.steps()
        if not counts:
            return Quantity([], [], self.missing, None, None, None)
        return Quantity(edges, counts, self.missing, self.least, self.sum / self.histogram.total, self.most)


@dataclass
class _Shard:
    """What is counted of one index, or of several together."""

    samples: int = 0
    measures: dict[str, _Sum] = field(default_factory=dict)
    columns: dict[str, _Sum] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    unlabelled: int = 0
    digest: str = ""  # of the first index

    def merge(self, other: _Shard) -> None:
        for name, column in other.columns.items():
            # A column that only some shards have is missing in the others.
            self.columns.setdefault(name, _Sum(Histogram(), missing=self.samples)).merge(column)
        for name in self.columns.keys() - other.columns.keys():
            self.columns[name].missing += other.samples
        for name, measure in other.measures.items():
            self.measures.setdefault(name, _Sum(_log_histogram(name))).merge(measure)
        self.labels = _padded(self.labels, len(other.labels))
        self.labels[: len(other.labels)] += other.labels
        self.samples += other.samples
        self.unlabelled += other.unlabelled
        self.digest = self.digest or other.digest


def file_of(manifest: Manifest) -> str:
    """What the file is called, beside the manifest."""
    return f"{name_for('statistics', manifest.version)}.json"


def keep_statistics(directory: Storage, manifest: Manifest) -> Statistics:
    """Those of the dataset at `directory`: as they lie there, or gathered and written there. Raises as `gather_statistics`."""
    found = find_statistics(directory, manifest)
    if found is None:
        found = gather_statistics(directory, manifest)
        directory.write(file_of(manifest), encode_statistics(found))
    return found


def encode_statistics(statistics: Statistics) -> bytes:
    """The JSON file."""
    return (json.dumps(asdict(statistics)) + "\n").encode()


def find_statistics(directory: Storage, manifest: Manifest) -> Statistics | None:
    """What lies at `directory`, unless it is of another dataset, or of other columns, or there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        values = json.loads(directory.read(file_of(manifest)))
        if (values["format"], values["dataset"]) != (FORMAT, manifest.hash):
            return None
        parts = {name: {k: Quantity(**v) for k, v in values[name].items()} for name in ("measures", "columns")}
        found = Statistics(**{**values, **parts})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        where = f"data {directory.url}/{file_of(manifest)}"
        raise DataError(f"{where}: these are no statistics ({e!r}); once removed, they can be gathered anew") from e
    return (
        found
        if found.index == hashlib.sha256(index_bytes(directory, ShardTable(directory, version=manifest.version)[0].index_name)).hexdigest()
        else None
    )


def gather_statistics(directory: Storage, manifest: Manifest, most: int = MOST_SHARDS) -> Statistics:
    """Read the indices of at most `most` shards, in threads.

    Raises:
        DataError: the table of shards or an index is missing or damaged. InfrastructureError: the store keeps failing.
    """
    shards = ShardTable(directory, version=manifest.version)
    numbers, whole = spread(len(shards), most), _Shard()
    with ThreadPoolExecutor(_READERS) as pool, Progress("statistics", len(numbers), "indices") as shown:
        for start in range(0, len(numbers), _GROUP):
            for part in pool.map(lambda n: _count(directory, shards[n]), numbers[start : start + _GROUP]):
                whole.merge(part)
                shown.update()
    return Statistics(
        dataset=manifest.hash,
        index=whole.digest,
        shards=len(shards),
        read=len(numbers),
        samples=whole.samples,
        measures={name: whole.measures[name].finish() for name in _MEASURES},
        columns={name: whole.columns[name].finish() for name in sorted(whole.columns)},
        labels=_padded(whole.labels, len(manifest.classes)).tolist() if whole.unlabelled < whole.samples else [],
        unlabelled=whole.unlabelled,
    )


def spread(size: int, count: int) -> list[int]:
    """At most `count` of the numbers below `size`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(np.int64)).tolist()


def _count(directory: Storage, record: ShardRecord) -> _Shard:
    data = index_bytes(directory, record.index_name)
    where = f"data {directory.url}/{record.index_name}"
    index = parse_index(data, where)
    check_columns(index, _READ, where)
    index = index.select([*_READ, *_numbers(index.schema)])
    found = _Shard(len(index), digest=hashlib.sha256(data).hexdigest())
    for name, values in _measured({name: index[name].to_numpy().astype(np.float64) for name in _READ[1:]}):
        found.measures[name] = _Sum(_log_histogram(name))
        found.measures[name].add(values)
    for name in index.column_names[len(_READ) :]:
        found.columns[name] = _Sum(Histogram())
        found.columns[name].add(index[name].to_numpy().astype(np.float64))
    labels = index["cls"].to_numpy()
    found.labels, found.unlabelled = np.bincount(labels[labels >= 0]), int((labels < 0).sum())
    return found


def _measured(values: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What is told of each sample, nan where it has none."""
    yield "width", values["width"]
    yield "height", values["height"]
    yield "aspect_ratio", values["width"] / values["height"]
    yield "image_bytes", values["image_length"]
    yield "caption_bytes", np.where(values["txt_length"] > 0, values["txt_length"], np.nan)


def _numbers(schema: pa.Schema) -> Sequence[str]:
    """Columns behind those that every index has, which hold numbers."""
    others = [f for f in schema if f.name not in INDEX_SCHEMA.names and f.name != PHASH]  # which only looks like one
    return [f.name for f in others if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]


def _log_histogram(name: str) -> Histogram:
    exponent, is_ratio = _MEASURES[name]
    return Histogram(is_log=True, exponent=exponent, is_centred=is_ratio)


def _padded(counts: np.ndarray, length: int) -> np.ndarray:
    return np.pad(counts, (0, max(0, length - len(counts))))
