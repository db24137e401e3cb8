from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards import deny
from pipeline.shards.deny import DenyListWriter, find_about, list_name

REASONS = {"value": pa.float64()}


def rows(*pairs: tuple[str, float | None]) -> pa.Table:
    return pa.table({"key": pa.array([k for k, _ in pairs], pa.string()), "value": pa.array([v for _, v in pairs], pa.float64())})


def test_a_list_and_what_it_was_made_of(store: Storage) -> None:
    assert find_about(store, "score-a") is None
    with DenyListWriter(store, "score-a", REASONS) as out:
        out.add(rows(("c", 1), ("a", None)))
        out.add(rows())
        out.add(rows(("b", 3), ("a", 2)))
        assert out.publish({"of": {"x": [1]}}) == 3
    assert find_about(store, "score-a") == {"of": {"x": [1]}, "keys": 3}
    table = pq.read_table(pa.BufferReader(store.read("deny/score-a.parquet")))
    assert table.to_pylist() == [{"key": k, "value": v} for k, v in [("a", 2), ("a", None), ("b", 3), ("c", 1)]]
    assert store.names("deny") == ["score-a.parquet"]


def test_an_empty_list_is_a_list(store: Storage) -> None:
    with DenyListWriter(store, "none", REASONS) as out:
        out.publish({})
    assert find_about(store, "none") == {"keys": 0}
    assert pq.read_table(pa.BufferReader(store.read(list_name("none")))).column_names == ["key", "value"]


def test_what_was_not_published_is_not_there(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    with pytest.raises(RuntimeError), DenyListWriter(directory, "a", REASONS) as out:
        out.add(rows(("a", 1)))
        raise RuntimeError
    assert directory.names() == []


def test_others_lists_are_told_from_ours(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    (tmp_path / "deny").mkdir()
    pq.write_table(rows(("a", 1)), tmp_path / "deny" / "a.parquet")
    assert find_about(directory, "a") is None
    for broken in (b"", b"PAR1", b"key\nother\n", (tmp_path / "deny" / "a.parquet").read_bytes()[:-6] + b"\xff\xffPAR1"):
        (tmp_path / "deny" / "b.parquet").write_bytes(broken)
        with pytest.raises(DataError, match=r"deny/b.parquet: cannot be read"):
            find_about(directory, "b")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text("abc", max_size=3), st.none() | st.integers(0, 3)), max_size=60), st.integers(0, 2**32))
def test_the_same_bytes_however_the_rows_come(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, int | None]], seed: int
) -> None:
    order, found = random.Random(seed), []
    for run, stretch in ((1 << 20, 1 << 20), (60, 5), (1, 1)):  # in memory; in a few runs; each row a run of its own
        directory = Storage(str(tmp_path_factory.mktemp("deny")))
        order.shuffle(pairs)
        with pytest.MonkeyPatch.context() as patch, DenyListWriter(directory, "x", REASONS) as out:
            for name, value in (("_RUN", run), ("_STRETCH", stretch), ("_GROUP", 7)):
                patch.setattr(deny, name, value)
            at = 0
            while at < len(pairs):
                size = order.randint(1, 9)
                out.add(rows(*((k, None if v is None else float(v)) for k, v in pairs[at : at + size])))
                at += size
            assert out.publish({}) == len({key for key, _ in pairs})
        found.append(directory.read(list_name("x")))
    assert found[0] == found[1] == found[2]
    table = pq.read_table(pa.BufferReader(found[0]))
    assert [(r["key"], r["value"]) for r in table.to_pylist()] == sorted(pairs, key=lambda p: (p[0], p[1] is None, p[1] or 0))
    groups = pq.read_metadata(pa.BufferReader(found[0]))
    assert [groups.row_group(g).num_rows for g in range(groups.num_row_groups)] == [7] * (len(pairs) // 7) + [len(pairs) % 7] * (
        len(pairs) % 7 > 0
    )


def test_a_long_list_is_sorted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, order = Storage(str(tmp_path)), random.Random(0)
    keys = [f"{n:08d}" for n in range(30_000)]
    order.shuffle(keys)
    monkeypatch.setattr(deny, "_RUN", 1 << 16)
    monkeypatch.setattr(deny, "_STRETCH", 2000)
    longest, sort = [], DenyListWriter._sorted
    monkeypatch.setattr(DenyListWriter, "_sorted", lambda self, tables: (longest.append(sum(map(len, tables))), sort(self, tables))[1])
    with DenyListWriter(directory, "x", REASONS) as out:
        for n in range(0, len(keys), 500):
            out.add(rows(*((key, 0.5) for key in keys[n : n + 500])))
        assert len(out._runs) > 5
        out.publish({})
    assert max(longest) <= 4500  # rows in memory at a time
    assert pq.read_table(tmp_path / "deny" / "x.parquet")["key"].to_pylist() == sorted(keys)
