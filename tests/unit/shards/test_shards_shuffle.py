"""The order of rows, which makes a dataset's bytes: it is that of datasets made long ago, however rows travel on their way there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.shard import Shard
from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.shards import division, fill, forecast, plan, shuffle
from pipeline.shards.images import Checked
from pipeline.shards.listing import list_rows
from pipeline.shards.plan import Header, Planner, moves
from pipeline.shards.samples import Sample
from pipeline.shards.shuffle import Earlier, Rule, divide_rows, planned_rows, settle_rows
from pipeline.shards.sources import UrlSource, open_source, sorting
from pipeline.shards.spill import Spilt

ROWS = 1500


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 1,500 rows as tables of URLs, some of them twice or without one, and of images in row groups of 10."""
    root = tmp_path_factory.mktemp("tables")
    rows = [{"url": f"http://a/{n % 1400}", "text": f"number {n}" * (n % 5), "width": n, "image": b"x" * (n % 90)} for n in range(ROWS)]
    for row in rows[::100]:
        row["url"] = None
    for kind in ("urls", "table"):
        (root / kind).mkdir()
        for part in range(3):
            table = pa.Table.from_pylist(rows[part::3]).drop_columns("image" if kind == "urls" else "url")
            pq.write_table(table, root / kind / f"{part}.parquet", row_group_size=10)
    return {kind: str(root / kind) for kind in ("urls", "table")}


def planned(section: dict[str, Any], place: Storage, workers: int) -> tuple[str, list[tuple[str, str]]]:
    """A digest of everything that a plan says of its shards, and (shard, path) of all rows in order."""
    shard = Shard.model_validate(section)
    source = open_source(shard.source)
    survey = source.survey()
    made = Planner(shard, source, Header(1, "config", "source", survey.stamp, []), survey.rows, Earlier(), place, workers).plan({})
    rows = [(name, key, item.path) for _, (name, _, *at) in made.jobs() for key, item in planned_rows(place, *at)]
    told = [made.table.to_pylist(), rows, made.header.read, made.header.dropped, made.header.named]
    assert len(rows) + sum(made.header.dropped.values()) == made.header.read == ROWS
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16], [(name, path) for name, _, path in rows]


SHUFFLED = {"samples": 20, "splits": {"train": 0.8, "test": 0.2}}
ORDERS = {
    "urls": ("urls", SHUFFLED, "3904f8487442093c"),
    "urls in order": ("urls", {**SHUFFLED, "shuffle": False}, "24d52737cc4900fd"),
    "table": ("table", SHUFFLED, "3edce363c7864306"),
    "table in order": ("table", {**SHUFFLED, "shuffle": False}, "1094465c320627e8"),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("is_divided", [False, True])
def test_the_order_stays(
    tables: dict[str, str], tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, case: str, is_divided: bool
) -> None:
    """The digests are those of the first release that shuffled: who changes them makes other datasets of the same config."""
    kind, section, digest = ORDERS[case]
    monkeypatch.setattr(plan, "GROUP_ROWS", 50)
    monkeypatch.setattr(plan, "CHUNK", 40)
    monkeypatch.setattr(plan, "SPILL_BYTES", 10_000)
    monkeypatch.setattr(division, "FAN", 6 if is_divided else 128)
    found, _ = planned({"source": {"format": kind, "url": tables[kind]}, **section}, Storage(str(tmp_path)), 2)
    assert found == digest
    assert sorted(Storage(str(tmp_path)).names()) == ["begun.json", "known", "plan.parquet", "rows"]


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranges_of_long_rows(tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    """Few rows are long, all of one part: ranges are smaller, whatever the number of workers, and in the source's order there alone."""
    for part in range(3):
        rows = [{"url": f"http://a/{part}/{n}", "text": "x" * 2000 if part == 1 else ""} for n in range(500)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{part}.parquet")
    monkeypatch.setattr(plan, "GROUP_ROWS", 500)
    monkeypatch.setattr(plan, "CHUNK", 40)
    monkeypatch.setattr(division, "RANGE_BYTES", 150_000)
    section = {"source": {"format": "urls", "url": str(tmp_path / "*.parquet")}, "samples": 1000, "shuffle": shuffle}
    (found, rows), (again, _) = (planned(section, Storage(str(tmp_path / f"{n}")), n) for n in (1, 2))
    assert found == again and len({path for _, path in rows}) == ROWS
    sizes = Counter[str]()
    for shard, path in rows:  # a range each
        sizes[shard] += (2000 if "/1/" in path else 0) + len(path) + 100
    assert 8 <= len(sizes) <= 12 and max(sizes.values()) < 1.5 * 150_000
    assert shuffle or [path for _, path in rows] == [f"http://a/{n // 500}/{n % 500}" for n in range(ROWS)]


class Counting(Storage):
    reads = 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.reads += 1
        return super().read_range(key, start, end)


@pytest.mark.parametrize("fan", [4, 128])
def test_reads_are_as_the_forecast_says(tables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan: int) -> None:
    monkeypatch.setattr(division, "FAN", fan)
    source, place, ranges = UrlSource(tables["urls"], {}), Counting(str(tmp_path)), division.Division.into(36)
    rule = Rule({"train": 1.0}, 2**28, 20, True, True, 40, 10_000, 1000)
    spills = list_rows("0", 0, source.parts(), source, rule, ranges, place)["spills"]
    size = sum(length for _, length in spills)
    files = [[name for name, _ in spills]]
    if fan == 4:
        moved = [divide_rows(*arguments, ranges, place) for _, arguments in moves("listed", spills, ranges, rule.spill)]
        files = [[m["spill"] for m in moved if m["piece"] == piece] for piece in range(ranges.pieces)]
        assert ranges.pieces == 6 and {len(names) for names in files} <= {2, 3, 4}
    spilt = Spilt(files, ranges.width if fan == 4 else 36)
    assert sum(settle_rows(f"{g}", g, spilt, ranges, None, rule, Earlier(), place)["read"] for g in range(36)) == ROWS
    monkeypatch.setattr(forecast, "SPILL_BYTES", rule.spill)
    assert place.reads == pytest.approx(forecast.requests_of(len(spills), size, ranges), rel=0.3)
    assert fan == 128 or place.reads < 0.7 * 2 * len(spills) * 36


def test_a_full_disk_of_temporary_files_is_one_sentence(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    keys = pa.table({"key": [os.urandom(20).hex() for _ in range(5000)]})
    image = Checked(os.urandom(200_000), "jpg", 8, 8)
    arriving = [(n, Sample(f"{n}", image, -1, None, b"{}")) for n in (1, 0)]
    for call in (
        lambda: list(sorting.in_order(((f"{n}",) for n in range(50_000)), lambda row: row[0], 1000)),
        lambda: shuffle._write_parquet(Storage(str(tmp_path)), "known", shuffle.KNOWN, iter([keys])),
        lambda: list(fill.in_order(iter(arriving), 2, 1000)),
    ):
        with pytest.raises(StorageError, match=r"/disk: cannot write here .*, the disk is full \(TMPDIR names another place\)$"):
            call()
    assert not list(small_disk.iterdir()) and not (tmp_path / "known").exists()
