from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.images import Checked
from pipeline.shards.manifest import INDEX_SCHEMA, Manifest, ShardRecord, dataset_hash, publish, table_bytes
from pipeline.shards.samples import Sample
from pipeline.shards.statistics import MOST_SHARDS, find_statistics, gather_statistics, keep_statistics, spread
from pipeline.shards.writer import write_shard

SIZES = [(8, 8), (300, 200), (200, 300), (1, 4000), (640, 480)]


def sample(number: int, picture: bytes, text: str | None, label: int) -> Sample:
    width, height = SIZES[number % len(SIZES)]
    return Sample(f"{number:020x}", Checked(picture, "png", width, height), label, None if text is None else text.encode(), b"{}")


def publish_samples(directory: Storage, parts: list[list[Sample]], classes: int = 0) -> Manifest:
    written = [write_shard(directory, f"train-{n:05d}.tar", "train", part) for n, part in enumerate(parts)]
    records = [w.record for w in written if w]
    count = sum(map(len, parts))
    manifest = Manifest(
        dataset_hash(records), "", "here", [f"class {n}" for n in range(classes)], {"train": count}, 1, count + 1, count, 0,
        {"corrupt": 1}, [{"file": "x", "reason": "corrupt", "detail": ""}],
    )  # fmt: skip
    publish(directory, records, manifest)
    return manifest


@pytest.fixture
def pictures(photo: Callable[..., Any], encoded: Callable[..., bytes]) -> list[bytes]:
    return [encoded(photo(*size), "PNG") for size in SIZES]


@pytest.fixture
def directory(tmp_path: object) -> Storage:
    return Storage(str(tmp_path)) / "data"


def with_column(directory: Storage, name: str, column: str, values: list[float | None]) -> None:
    table = pq.read_table(io.BytesIO(directory.read(name)))
    sink = io.BytesIO()
    pq.write_table(table.append_column(column, pa.array(values)), sink)
    directory.write(name, sink.getvalue())


def test_every_sample_is_counted_in_every_histogram(pictures: list[bytes], directory: Storage) -> None:
    texts = ["", "a cat", "ein Käfer", None]
    samples = [sample(n, pictures[n % 5], texts[n % 4], n % 3 - 1) for n in range(40)]
    manifest = publish_samples(directory, [samples[:15], samples[15:]], classes=4)
    found = gather_statistics(directory, manifest)
    assert (found.samples, found.shards, found.read, found.is_complete) == (manifest.written, 2, 2, True)
    for name, measure in found.measures.items():
        assert measure.total + measure.missing == manifest.written, name
        assert len(measure.edges) == len(measure.counts) + 1
    assert [found.measures[m].missing for m in ("width", "height", "aspect_ratio", "image_bytes")] == [0] * 4
    width, height, ratio = (found.measures[m] for m in ("width", "height", "aspect_ratio"))
    assert (width.least, width.most, height.least, height.most) == (1, 640, 8, 4000)
    assert width.mean == pytest.approx(np.mean([w for w, _ in SIZES])) and ratio.least == 1 / 4000 and ratio.most == 1.5
    captions = found.measures["caption_bytes"]
    assert (captions.missing, captions.total) == (20, 20), "an empty caption is none"
    assert (captions.least, captions.most) == (5, len("ein Käfer".encode())), "bytes, not characters"
    assert found.labels == [13, 13, 0, 0] and found.unlabelled == 14 and sum(found.labels) + found.unlabelled == 40
    assert found.columns == {}


def test_without_captions_and_labels_nothing_is_made_up(pictures: list[bytes], directory: Storage) -> None:
    manifest = publish_samples(directory, [[sample(n, pictures[0], None, -1) for n in range(5)]])
    found = keep_statistics(directory, manifest)
    captions = found.measures["caption_bytes"]
    assert (captions.edges, captions.counts, captions.missing, captions.mean) == ([], [], 5, None)
    assert (found.labels, found.unlabelled) == ([], 5)
    assert find_statistics(directory, manifest) == found


def test_columns_of_scores_are_counted_and_hashes_are_not(pictures: list[bytes], directory: Storage) -> None:
    manifest = publish_samples(directory, [[sample(n, pictures[0], "a", -1) for n in range(k, k + 4)] for k in (0, 4)])
    before = keep_statistics(directory, manifest)
    with_column(directory, "train-00000.index.parquet", "similarity", [0.25, -1.0, None, float("nan")])
    with_column(directory, "train-00000.index.parquet", "phash", [1, 2, 3, 4])
    assert find_statistics(directory, manifest) is None, "they are of an index that has changed"
    found = keep_statistics(directory, manifest)
    assert found != before and list(found.columns) == ["similarity"]
    similarity = found.columns["similarity"]
    assert (similarity.total, similarity.missing) == (2, 6), "the other shard has no such column"
    assert (similarity.least, similarity.mean, similarity.most) == (-1.0, -0.375, 0.25)


def test_statistics_are_the_same_each_time_and_kept(pictures: list[bytes], store: Storage) -> None:
    manifest = publish_samples(store, [[sample(n + 9 * k, pictures[n % 5], "b" * n, 0) for n in range(9)] for k in range(5)], classes=1)
    found = keep_statistics(store, manifest)
    written = store.read("statistics.json")
    store.remove("statistics.json")
    assert keep_statistics(store, manifest) == found == find_statistics(store, manifest)
    assert store.read("statistics.json") == written and json.loads(written)["dataset"] == manifest.hash


def test_those_of_another_dataset_are_seen_and_made_anew(pictures: list[bytes], directory: Storage) -> None:
    manifest = publish_samples(directory, [[sample(0, pictures[0], "a", 0)]], classes=1)
    keep_statistics(directory, manifest)
    assert find_statistics(directory, replace(manifest, hash="other")) is None
    grown = publish_samples(directory, [[sample(0, pictures[0], "a", 0)], [sample(1, pictures[1], "b", 0)]], classes=1)
    assert find_statistics(directory, grown) is None
    assert keep_statistics(directory, grown).samples == 2


def test_each_version_has_its_own(pictures: list[bytes], directory: Storage) -> None:
    first = publish_samples(directory, [[sample(0, pictures[0], "a", 0)]], classes=1)
    keep_statistics(directory, first)
    second = replace(publish_samples(directory, [[sample(n, pictures[n], "a", 0)] for n in (0, 1)], classes=1), version=2)
    assert keep_statistics(directory, second).samples == 2
    assert {"statistics.json", "statistics-v2.json"} <= set(directory.names())


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"format": 1}', b'{"format": 1, "dataset": "HASH", "measures": {}, "columns": {}}'])
def test_damaged_statistics_are_named(pictures: list[bytes], directory: Storage, damaged: bytes) -> None:
    manifest = publish_samples(directory, [[sample(0, pictures[0], "a", 0)]], classes=1)
    directory.write("statistics.json", damaged.replace(b"HASH", manifest.hash.encode()))
    with pytest.raises(DataError, match=r"data/statistics.json: these are no statistics .*; once removed, they can be gathered anew"):
        find_statistics(directory, manifest)


def test_a_missing_or_damaged_index_is_an_error(pictures: list[bytes], directory: Storage) -> None:
    manifest = publish_samples(directory, [[sample(0, pictures[0], "a", 0)]], classes=1)
    directory.write("train-00000.index.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"train-00000.index.parquet: cannot be read"):
        gather_statistics(directory, manifest)
    directory.remove("train-00000.index.parquet")
    with pytest.raises(DataError, match=r"train-00000.index.parquet: is missing"):
        gather_statistics(directory, manifest)


def test_of_many_shards_some_are_looked_at_evenly_spread(directory: Storage) -> None:
    rows = [dict.fromkeys(INDEX_SCHEMA.names, 0) | {"key": "k", "sha256": "", "width": 8, "height": 8, "image_length": 9, "cls": -1}]
    records = [ShardRecord(f"train-{n:05d}.tar", "train", 1, 1, "") for n in range(50)]
    for number, record in enumerate(records):
        directory.write(record.index_name, table_bytes([rows[0] | {"width": number + 1}], INDEX_SCHEMA))
    manifest = Manifest(dataset_hash(records), "", "here", [], {"train": 50}, 50, 50, 50, 0, {}, [])
    publish(directory, records, manifest)
    found = gather_statistics(directory, manifest, most=8)
    assert (found.shards, found.read, found.samples, found.is_complete) == (50, 8, 8, False)
    width = found.measures["width"]
    assert (width.least, width.most) == (1, 50) and width.mean == pytest.approx(25.5, abs=0.5)
    assert gather_statistics(directory, manifest, most=8) == found
    assert spread(10**6, MOST_SHARDS)[0] == 0 and spread(10**6, MOST_SHARDS)[-1] == 10**6 - 1 and spread(3, 5) == [0, 1, 2]


def test_quantiles_are_as_exact_as_the_bins(pictures: list[bytes], directory: Storage) -> None:
    manifest = publish_samples(directory, [[sample(n, pictures[n % 5], "c" * (n + 1), 0) for n in range(200)]], classes=1)
    captions = gather_statistics(directory, manifest).measures["caption_bytes"]
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert captions.quantile(share) == pytest.approx(1 + 199 * share, rel=0.19, abs=1)  # four bins an octave
    assert captions.quantile(0) >= 1 and captions.quantile(1) <= 200
