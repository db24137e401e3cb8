"""Plans at the size of LAION-5B, from metadata alone, and what a driver and its tasks hold meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from launch.submit import main
from pipeline.config.shard import Shard
from pipeline.core.storage import Storage
from pipeline.shards.division import PARTS_BIT, Division, source_bounds
from pipeline.shards.forecast import forecast, forecast_of
from pipeline.shards.listing import list_rows
from pipeline.shards.plan import CHUNK, SPILL_BYTES
from pipeline.shards.shuffle import Earlier, Rule, arrange_rows, planned_rows, settle_rows
from pipeline.shards.sources import Survey, UrlSource
from pipeline.shards.spill import Spilt

ROWS, SHARDS = 5_000_000_000, 500_000


def measured(code: str, *arguments: object) -> dict[str, Any]:
    """What a process of its own prints as JSON, with the most memory that it held (bytes) and the seconds that it worked."""
    frame = (
        "import json, sys, time\n"
        "from pipeline.train.device import host_peak\n"
        "begin = lambda: time.monotonic()\n"
        f"{code}\n"
        "print(json.dumps({**told, 'peak': host_peak()}))\n"
    )
    done = subprocess.run([sys.executable, "-c", frame, *map(str, arguments)], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DRIVER = """
from pipeline.core.storage import Storage
from pipeline.shards.job import _Filled, _summarise
from pipeline.shards.manifest import publish
from pipeline.config.shard import Shard
from pipeline.shards.plan import Header, Plan, find_plan, number_shards, pieces
from pipeline.shards.sources import Part

place, shards, rows = Storage(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
start = begin()
parts = [Part(f"part-{n:05d}.snappy.parquet", 180_000_000, rows // 5000) for n in range(5000)]
tasks = sum(1 for _ in pieces(parts))
ranges, each = rows // 500_000, rows // shards
header = Header(1, "config", "s3://lab/laion", "stamp", [], read=rows, groups=ranges)
cut = {group: [["train", each, each * 25_000] for _ in range(shards // ranges)] for group in range(ranges)}
Plan(header, number_shards(cut, {})).save(place)
del cut
plan = find_plan(place)
jobs = 0
for units, (name, split, group, row_group) in plan.jobs():
    jobs += 1
planned = begin() - start
if len(sys.argv) < 5:
    print(json.dumps({"jobs": jobs, "tasks": tasks, "planned": planned, "peak": host_peak()}))
    sys.exit()
filled = _Filled()
for units, (name, split, group, row_group) in plan.jobs():
    record = {"name": name, "split": split, "samples": units, "bytes": units * 25_000, "sha256": f"{group:032x}{row_group:032x}"}
    filled.add({"read": units, "dropped": {}, "named": [], "record": record, "smallest": [64, 64], "largest_label": -1})
section = Shard.model_validate({"source": {"format": "urls", "url": "s3://lab/laion"}})
manifest, records = _summarise(section, plan, filled, None, place)
publish(place, records, manifest)
told = {"tasks": tasks, "jobs": jobs, "planned": planned, "all": begin() - start, "written": manifest.written}
"""


def test_a_plan_of_five_billion_rows(tmp_path: Path) -> None:
    found = measured(DRIVER, tmp_path / "out", SHARDS, ROWS)
    assert (found["jobs"], found["tasks"]) == (SHARDS, 5000)
    assert found["peak"] < 2 * 2**30 and found["planned"] < 300
    print(f"{SHARDS:,} shards: planned in {found['planned']:.1f} s, {found['peak'] / 2**30:.2f} GiB at most")


@pytest.mark.chaos
def test_a_driver_of_a_million_shards(tmp_path: Path) -> None:
    """From the plan to the manifest, with what its tasks would have sent back."""
    found = measured(DRIVER, tmp_path / "out", 2 * SHARDS, 2 * ROWS, "publish")
    assert (found["jobs"], found["written"]) == (2 * SHARDS, 2 * ROWS) and found["peak"] < 2 * 2**30
    print(f"planned in {found['planned']:.1f} s, published after {found['all']:.1f} s, {found['peak'] / 2**30:.2f} GiB at most")


def test_a_forecast_needs_no_rows() -> None:
    shard = Shard.model_validate({"source": {"format": "urls", "url": "x"}, "images": {"resize": {"pixels": 256}}, "samples": 10_000})
    found = forecast_of(shard, Survey(ROWS, 5000, 0.0, 0, True, ""), has_sizes=False, in_blocks=False)
    assert (found.rows, found.shards, found.ranges, found.passes) == (ROWS, SHARDS, 10_000, 3)
    assert found.requests < 4e6 and found.plan_bytes / found.requests > 1e5  # of two, one is of eight bytes
    by_size = forecast_of(
        Shard.model_validate({"source": {"format": "urls", "url": "x"}, "images": {"resize": {"pixels": 256}}}),
        Survey(ROWS, 5000, 0.0, 0, True, ""),
        False,
        False,
    )
    assert 8000 < by_size.rows_a_shard < 12_000 and by_size.shards >= ROWS / by_size.rows_a_shard


def test_a_forecast_of_footers(tmp_path: Path) -> None:
    for n in range(3):
        pq.write_table(pa.table({"URL": [f"http://a/{n}/{m}" for m in range(50)]}), tmp_path / f"{n}.parquet")
    found = forecast(
        Shard.model_validate({"source": {"format": "urls", "url": str(tmp_path)}, "samples": 40, "splits": {"a": 0.5, "b": 0.5}})
    )
    assert (found.rows, found.parts, found.shards, found.exact) == (150, 3, 4, True)


TASKS = """
from pipeline.core.storage import Storage
from pipeline.shards.division import Division
from pipeline.shards.listing import list_rows
from pipeline.shards.plan import CHUNK, SPILL_BYTES, moves
from pipeline.shards.shuffle import Earlier, Rule, divide_rows, settle_rows
from pipeline.shards.sources import UrlSource
from pipeline.shards.spill import Spilt

source, place = UrlSource(sys.argv[1], {}), Storage(sys.argv[2])
rule = Rule({"train": 0.99, "test": 0.01}, 2**28, 10_000, False, True, CHUNK, SPILL_BYTES, 1000)
start, whole = begin(), Division.into(1)
listed = list_rows("0", 0, source.parts(), source, rule, whole, place)
between = begin()
division = whole.for_bytes(sum(size for _, size in listed["spills"]))
moved = [divide_rows(*arguments, division, place)["spill"] for _, arguments in moves("listed", listed["spills"], division, SPILL_BYTES)]
spilt = Spilt([moved if division.count > 1 else [name for name, _ in listed["spills"]]], division.count)
settled = [settle_rows(f"settle-{g:05d}", g, spilt, division, None, rule, Earlier(), place) for g in range(division.count)]
told = {"list": between - start, "settle": begin() - between, "ranges": division.count}
told |= {"read": sum(s["read"] for s in settled), "shards": sum(len(s["shards"]) for s in settled)}
"""


@pytest.mark.chaos
@pytest.mark.parametrize(("rows", "wide", "ranges"), [(500_000, 1, 1), (100_000, 768, 4)])
def test_a_task_of_a_full_range_stays_small(tmp_path: Path, rows: int, wide: int, ranges: int) -> None:
    """As many rows as a range has, with captions and numbers as LAION has them; and such as are cut by bytes, with embeddings."""
    numbers = np.random.default_rng(0).standard_normal(rows * wide, dtype=np.float32)
    columns = {
        "URL": [f"https://images.example-{n % 977}.com/photos/2019/{n % 12:02d}/original-{n:09d}.jpg" for n in range(rows)],
        "TEXT": [f"A photograph of number {n}, taken from above on a sunny day, with people in the background" for n in range(rows)],
        "WIDTH": list(range(rows)),
        "similarity": pa.ListArray.from_arrays(np.arange(0, rows * wide + 1, wide, dtype=np.int32), numbers) if wide > 1 else numbers,
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    del columns, numbers
    found = measured(TASKS, tmp_path / "in.parquet", tmp_path / "out")
    assert found["read"] == rows and found["ranges"] == ranges and found["shards"] >= 4 * ranges
    assert found["peak"] < 1.5 * 2**30
    print(f"{rows:,} rows: listed in {found['list']:.1f} s, settled in {found['settle']:.1f} s, {found['peak'] / 2**30:.2f} GiB at most")


def test_ranges_of_versions_meet(tmp_path: Path) -> None:
    """The keys of a version in 3 ranges are found by one in 7, and by one in 1."""
    pq.write_table(pa.table({"url": [f"http://a/{n}" for n in range(500)]}), tmp_path / "in.parquet")
    source = UrlSource(str(tmp_path / "in.parquet"), {})

    def settle(groups: int, place: Storage, earlier: Earlier) -> int:
        rule, division = Rule({"train": 1.0}, 2**28, 100, False, True, CHUNK, SPILL_BYTES, 1000), Division.into(groups)
        spills = list_rows("0", 0, source.parts(), source, rule, division, place)["spills"]
        spilt = Spilt([[name for name, _ in spills]], groups)
        return sum(settle_rows(f"s-{g}", g, spilt, division, None, rule, earlier, place)["read"] for g in range(groups))

    first = Storage(str(tmp_path / "v1"))
    assert settle(3, first, Earlier()) == 500
    for groups in (1, 2, 3, 7):
        assert settle(groups, Storage(str(tmp_path / f"v2-{groups}")), Earlier([(first, 3)])) == 0


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_shuffle_on_any_store(store: Storage, tmp_path: Path, shuffle: bool) -> None:
    """All passes, on files and on an object store, give every row once and the same shards."""
    pq.write_table(pa.table({"url": [f"http://a/{n}" for n in range(300)], "text": [None, "a", "b"] * 100}), tmp_path / "in.parquet")
    source = UrlSource(str(tmp_path / "in.parquet"), {})
    rule, division = Rule({"train": 0.9, "test": 0.1}, 2**28, 20, True, shuffle, 64, 7000, 1000), Division.into(4)
    listed = list_rows("0", 0, source.parts(), source, rule, division, store)
    assert len(listed["spills"]) == 3 and [mark[:2] for mark in listed["marks"]] == [[0, n] for n in (64, 128, 192, 256, 300)]
    assert sum(size for *_, size in listed["marks"]) == sum(size for _, size in listed["spills"])
    onward, spilt = None if shuffle else Division.into(4, source_bounds(listed["marks"], 4)), Spilt([[n for n, _ in listed["spills"]]], 4)
    settled = [settle_rows(f"settle-{g}", g, spilt, division, onward, rule, Earlier(), store) for g in range(4)]
    spilt = Spilt([[f"settled/settle-{n}" for n in range(4)]], 4)
    cut = settled if shuffle else [arrange_rows(f"{g}", g, spilt, rule, False, store) for g in range(4)]
    assert sum(s["read"] for s in settled) == sum(rows for c in cut for _, rows, _ in c["shards"]) == 300
    found, splits = list[str](), list[str]()
    for group, part in enumerate(cut):
        for row_group, (split, rows, _) in enumerate(part["shards"]):
            items = [item.path for _, item in planned_rows(store, group, row_group)]
            assert len(items) == rows <= 20
            found += items
            splits += [split] * rows
    assert sorted(found) == sorted(f"http://a/{n}" for n in range(300)) and set(splits) == {"train", "test"}
    train = [int(path.rpartition("/")[2]) for path, split in zip(found, splits, strict=True) if split == "train"]
    assert (train == sorted(train)) == (not shuffle)


def test_marks_of_parts_that_end_where_a_chunk_does(tmp_path: Path) -> None:
    """Each place is marked once, so that rows between two marks are as long as they are; and a source may hold no row at all."""
    for n in range(2):
        pq.write_table(pa.table({"url": [f"http://a/{n}/{m}" for m in range(32)]}), tmp_path / f"{n}.parquet")
    source = UrlSource(str(tmp_path), {})
    rule = Rule({"train": 1.0}, 2**28, 20, True, False, 64, SPILL_BYTES, 1000)
    found = list_rows("0", 0, source.parts(), source, rule, Division.into(1), Storage(str(tmp_path / "out")))
    assert [mark[:2] for mark in found["marks"]] == [[0, 32], [1, 32]] and found["marks"][0][2] == found["marks"][1][2]
    assert source_bounds(found["marks"], 2) == [0, 1 << PARTS_BIT]
    assert source_bounds([[0, 0, 0], [1, 0, 0]], 3) == [0]


def test_a_plan_says_what_sharding_takes(tmp_path: Path) -> None:
    for n in range(3):
        pq.write_table(pa.table({"URL": [f"http://a/{n}/{m}" for m in range(50)]}), tmp_path / f"{n}.parquet")
    path = tmp_path / "config.yaml"
    path.write_text(f"name: t\nstorage: {tmp_path}/runs\nshard: {{source: {{format: urls, url: '{tmp_path}/*.parquet'}}, samples: 40}}\n")
    shown = CliRunner().invoke(main, [str(path), "--plan"])
    assert shown.exit_code == 0, shown.output
    assert "shard        150 rows in 3 parts; about 4 shards of 40 rows, " in shown.output and "planned in 2 passes" in shown.output
    told = json.loads(CliRunner().invoke(main, [str(path), "--plan", "--json"]).stdout)
    assert (told["shard"]["rows"], told["shard"]["shards"], told["shard"]["ranges"]) == (150, 4, 1)
    assert not (tmp_path / "runs").exists()
