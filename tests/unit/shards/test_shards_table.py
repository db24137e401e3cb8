from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import fingerprint
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import dataset_hash, read_shards
from pipeline.shards.table import ROW_GROUP, SHARDS_SCHEMA, ShardRecord, ShardTable, encode_table

MILLION = 1_000_000


def records(count: int, splits: tuple[str, ...] = ("train",)) -> list[ShardRecord]:
    return [
        ShardRecord(f"{splits[n % len(splits)]}-{n:07d}.tar", splits[n % len(splits)], n % 7, 100 + n, f"{n:064x}") for n in range(count)
    ]


def old_table(rows: list[ShardRecord], **options: object) -> bytes:
    """As earlier versions wrote it: in the order given, with no word about it, in one group."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(r) for r in rows], schema=SHARDS_SCHEMA), sink, compression="zstd", **options)
    return sink.getvalue()


def test_every_row_comes_back_by_name(store: Storage) -> None:
    rows = records(40_000, ("train", "test", "extra"))
    random.Random(0).shuffle(rows)
    store.write("shards.parquet", encode_table(rows))
    for split in ("train", "test"):
        mine = sorted((r for r in rows if r.split == split), key=lambda r: r.name)
        table = ShardTable(store, split)
        assert len(table) == len(mine) and list(table) == mine == read_shards(store, split)
        assert [table[n] for n in (0, 7, 13_332)] == [mine[n] for n in (0, 7, 13_332)]
        assert (table.samples.dtype, table.bytes.dtype) == (np.int64, np.int64)
        assert table.samples.tolist() == [r.samples for r in mine] and table.bytes.tolist() == [r.bytes for r in mine]
        for beyond in (-1, len(mine)):
            with pytest.raises(IndexError):
                table[beyond]
    assert list(ShardTable(store)) == sorted(rows, key=lambda r: r.name)


@pytest.mark.parametrize("options", [{}, {"row_group_size": 300}, {"row_group_size": 300, "use_dictionary": False}])
@pytest.mark.parametrize("order", ["sorted", "by-split", "shuffled", "swapped-at-a-border"])
def test_tables_in_any_order_of_older_versions(tmp_path: Path, order: str, options: dict[str, object]) -> None:
    rows = records(1000, ("b", "a"))
    for n, row in enumerate(rows):  # names that say nothing of the split
        rows[n] = ShardRecord(f"{n:05d}.tar", row.split, row.samples, row.bytes, row.sha256)
    mine = [r for r in rows if r.split == "a"]
    if order == "by-split":
        rows.sort(key=lambda r: r.split)
    elif order == "shuffled":
        random.Random(1).shuffle(rows)
    elif order == "swapped-at-a-border":
        rows[299], rows[301] = rows[301], rows[299]  # of split a, the last of a group and the first of the next
    (tmp_path / "shards.parquet").write_bytes(old_table(rows, **options))
    table = ShardTable(Storage(str(tmp_path)), "a")
    assert list(table) == mine and table.bytes.tolist() == [r.bytes for r in mine] and table[250] == mine[250]


@pytest.mark.parametrize("marked", [True, False])
def test_groups_that_are_sorted_each_but_not_together(tmp_path: Path, marked: bool) -> None:
    rows = records(2 * ROW_GROUP)
    swapped = rows[ROW_GROUP:] + rows[:ROW_GROUP]
    sorting = pq.SortingColumn.from_ordering(SHARDS_SCHEMA, [("name", "ascending")]) if marked else None
    (tmp_path / "shards.parquet").write_bytes(old_table(swapped, row_group_size=ROW_GROUP, sorting_columns=sorting))
    table = ShardTable(Storage(str(tmp_path)), "train")
    assert [table[n] for n in (0, ROW_GROUP - 1, ROW_GROUP, 2 * ROW_GROUP - 1)] == [
        rows[n] for n in (0, ROW_GROUP - 1, ROW_GROUP, 2 * ROW_GROUP - 1)
    ]
    assert table.bytes.tolist() == [r.bytes for r in rows]


def test_what_is_missing_or_broken_is_one_sentence(store: Storage) -> None:
    with pytest.raises(DataError, match=r"shards.parquet: is missing$"):
        ShardTable(store, "train")
    store.write("shards.parquet", encode_table(records(10, ("train", "test"))))
    with pytest.raises(DataError, match=r"there is no split 'tset' \(allowed: test, train\)$"):
        ShardTable(store, "tset")
    store.write("shards.parquet", store.read("shards.parquet")[:-100])
    with pytest.raises(DataError, match=r"shards.parquet: cannot be read \("):
        ShardTable(store, "train")
    table = io.BytesIO()
    pq.write_table(pa.table({"name": ["a"], "split": ["train"]}), table)
    store.write("shards.parquet", table.getvalue())
    with pytest.raises(DataError, match=r"there is no column 'samples' \(there: name, split\)$"):
        ShardTable(store, "train")


def test_the_hash_is_that_of_the_plain_rows(tmp_path: Path) -> None:
    rows = records(50, ("train", "tést"))
    plain = fingerprint([asdict(r) for r in sorted(rows, key=lambda r: r.name)])
    assert dataset_hash(rows[::-1]) == plain
    (tmp_path / "shards.parquet").write_bytes(encode_table(rows))
    assert dataset_hash(ShardTable(Storage(str(tmp_path)))) == plain
    assert dataset_hash([]) == fingerprint([])


def test_the_same_rows_are_the_same_bytes() -> None:
    rows = records(20_000)
    assert encode_table(rows) == encode_table(rows[::-1])


class Counting(Storage):
    """A real storage that counts what is read."""

    bytes_read = requests = 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        data = super().read_range(key, start, end)
        self.bytes_read += len(data)
        self.requests += 1
        return data


def test_a_remote_table_mostly_stays_where_it_is(s3: tuple[str, Callable[[], str]]) -> None:
    endpoint, make_bucket = s3
    store = Counting(make_bucket(), endpoint)
    digits = random.Random(0)
    rows = [ShardRecord(f"{n:07d}.tar", "train", 5000, 10**8 + n, f"{digits.getrandbits(256):064x}") for n in range(100_000)]
    store.write("shards.parquet", encode_table(rows))
    whole = len(store.read("shards.parquet"))
    table = ShardTable(store, "train")
    opened, requests = store.bytes_read, store.requests
    assert whole > 3_000_000 and opened < 0.4 * whole and requests <= 8  # the footer and one range a row group
    assert table[50_000] == rows[50_000] and table[50_001] == rows[50_001]
    assert store.requests == requests + 1 and store.bytes_read - opened < 0.2 * whole  # one row group


def _strings(texts: np.ndarray) -> pa.Array:
    """Bytes of equal length as an Arrow column, without a Python object for each."""
    width = texts.dtype.itemsize
    offsets = np.arange(len(texts) + 1, dtype=np.int32) * width
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(texts)))


OPEN = """
import json, sys, time, pandas, psutil
from pipeline.core.storage import Storage
from pipeline.shards.table import ShardTable
ShardTable(Storage(sys.argv[1]), "train")  # what Arrow sets up once
process, before, start = psutil.Process(), psutil.Process().memory_info().rss, time.process_time()
table = ShardTable(Storage(sys.argv[2]), "train")
seconds = time.process_time() - start
some = [table[n].name for n in (0, len(table) // 2, len(table) - 1)]
print(json.dumps({"seconds": seconds, "MB": (process.memory_info().rss - before) / 1e6, "shards": len(table), "some": some}))
"""


@pytest.mark.parametrize("kind", ["one split", "mixed splits", "unsorted"])
def test_a_million_shards_open_at_once(tmp_path: Path, kind: str) -> None:
    number = np.arange(MILLION)
    names = _strings(np.char.mod(b"train-%07d.tar", number))
    hashes = _strings(np.frombuffer(np.random.default_rng(0).bytes(32 * MILLION).hex().encode(), "S64"))
    splits = pa.DictionaryArray.from_arrays(
        pa.array((number % 10 == 9) if kind == "mixed splits" else np.zeros(MILLION), pa.int8()), ["train", "test"]
    )
    table = pa.table([names, splits.cast(pa.string()), np.full(MILLION, 5000), 10**8 + number, hashes], schema=SHARDS_SCHEMA)
    if kind == "unsorted":
        table = pa.concat_tables([table.slice(MILLION // 2), table.slice(0, MILLION // 2)])
    pq.write_table(table, tmp_path / "shards.parquet", compression="zstd", row_group_size=16_384)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "shards.parquet").write_bytes(encode_table(records(10)))
    output = subprocess.run([sys.executable, "-c", OPEN, tmp_path / "small", tmp_path], capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    train = number[number % 10 != 9] if kind == "mixed splits" else number
    assert found["shards"] == len(train)
    assert found["some"] == [f"train-{n:07d}.tar" for n in (train[0], train[len(train) // 2], train[-1])]
    assert found["seconds"] < 1 and found["MB"] < 100, found
