"""The order of rows, which makes a dataset's bytes: it is that of datasets made long ago, however rows travel on their way there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.shard import Shard
from pipeline.core.storage import Storage
from pipeline.shards import plan
from pipeline.shards.plan import Header, Planner
from pipeline.shards.shuffle import Earlier, read_rows
from pipeline.shards.sources import open_source

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
    rows = [(name, key, item.path) for _, (name, _, *at) in made.jobs() for key, item in read_rows(place, *at)]
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
def test_the_order_stays(tables: dict[str, str], tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The digests are those of the first release that shuffled: who changes them makes other datasets of the same config."""
    kind, section, digest = ORDERS[case]
    monkeypatch.setattr(plan, "GROUP_ROWS", 50)
    monkeypatch.setattr(plan, "CHUNK", 40)
    found, _ = planned({"source": {"format": kind, "url": tables[kind]}, **section}, Storage(str(tmp_path)), 2)
    assert found == digest
