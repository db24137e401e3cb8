"""A dataset's own deny-lists: applied as it is opened, on files and on S3, whatever form its keys have."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import Bound, Data
from pipeline.core.errors import CheckpointError, DataError
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.shards.deny import DenyListWriter, own_lists
from pipeline.shards.manifest import Manifest
from pipeline.stream import Dataset, open_collection, open_dataset, open_stream
from pipeline.stream.deny import Keys, lists_of
from pipeline.train.saving import _load

Maker = Callable[..., Manifest]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def directory(store: Storage, make_dataset: Maker) -> Storage:
    make_dataset(store, {"train": 50, "test": 10}, per_shard=20)
    return store


def opened(directory: Storage, split: str = "train", **more: Any) -> Dataset:
    return open_dataset(directory.url, split, endpoint=directory.endpoint, **more)


def texts(dataset: Dataset) -> list[int]:
    return [int(dataset[n].text.split()[1]) for n in range(len(dataset))]


def publish(directory: Storage, name: str, keys: list[str]) -> None:
    with DenyListWriter(directory, name, {"why": pa.string()}) as out:
        if keys:
            out.add(pa.table({"key": keys, "why": ["it"] * len(keys)}))
        out.publish({"n": len(keys)})


def test_all_lists_of_a_dataset_hold_by_default(directory: Storage) -> None:
    whole = opened(directory)
    publish(directory, "duplicates", [whole.key_of(n) for n in (0, 7, 49)])
    publish(directory, "takedown", [whole.key_of(n) for n in (7, 20)] + [opened(directory, "test").key_of(3), "no such key"])
    directory.write("deny/notes.txt", whole.key_of(1).encode())
    rest = [n for n in range(50) if n not in (0, 7, 20, 49)]
    assert texts(opened(directory)) == rest and texts(opened(directory, "test")) == [n for n in range(10) if n != 3]
    assert texts(opened(directory, own_deny=False)) == list(range(50))
    more = opened(directory, deny=[f"{directory.url}/deny/notes.txt"], where={"width": Bound(min=1)})
    assert texts(more) == [n for n in rest if n != 1]


def test_the_config_says_whether_they_hold(directory: Storage) -> None:
    publish(directory, "takedown", [opened(directory).key_of(3)])
    for own in (True, False):
        [dataset] = open_collection([Data(url=directory.url, own_deny=own)], "train", directory.endpoint).datasets
        assert len(dataset) == 50 - own
    stream = open_stream(directory.url, global_batch=49, micro_batch=7, size=8, endpoint=directory.endpoint)
    epoch = [key for _, batch in zip(range(7), stream, strict=False) for key in batch.keys]
    assert sorted(epoch) == sorted(opened(directory).key_of(n) for n in range(49))


def test_a_view_is_named_by_what_its_lists_hold(directory: Storage) -> None:
    views = [opened(directory).view]
    publish(directory, "duplicates", [])  # nothing was found: nothing changes
    assert opened(directory).view == views[0]
    for keys in (["a"], ["b"], ["a"]):
        publish(directory, "duplicates", keys)
        views.append(opened(directory).view)
    assert views[1] == views[3] and len(set(views)) == 3
    assert opened(directory, own_deny=False).view == views[0]
    assert opened(directory, deny=[f"{directory.url}/deny/duplicates.parquet"]).view == views[1]  # it is the same list


def test_a_version_has_the_lists_of_its_own_time(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    names = ["duplicates", "duplicates-v2", "duplicates-v4", "takedown", "contamination-v3", ".tmp-1"]
    for name in names:
        publish(directory, name, ["a"])
    held = {version: [path[5:-8] for path in own_lists(directory, version)] for version in (1, 2, 3, 5)}
    assert held[1] == ["duplicates", "takedown"] and held[2] == ["duplicates-v2", "takedown"]
    assert held[3] == ["contamination-v3", "duplicates-v2", "takedown"]
    assert held[5] == ["contamination-v3", "duplicates-v4", "takedown"]


def test_a_resumed_run_is_told(tmp_path: Path) -> None:
    """Before anything is read or changed."""
    commit = SimpleNamespace(view="f" * 64, step=12)
    checkpoints = SimpleNamespace(directory=Storage(str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"step-12 was trained on other data \(ffff.*where a deny-list came since.*data.own_deny"):
        _load(None, checkpoints, commit, "e" * 64, World(), "pretrain")  # type: ignore[arg-type]


def test_one_process_of_a_machine_reads_a_list(s3: tuple[str, Any], make_dataset: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3, for its name; the keys are read where the view is worked out."""
    endpoint, make_bucket = s3
    directory = Storage(make_bucket(), endpoint)
    make_dataset(directory, {"train": 50}, per_shard=20)
    publish(directory, "duplicates", [opened(directory).key_of(4)])
    first = opened(directory)
    monkeypatch.setattr(Storage, "get", lambda *args: pytest.fail("fetched again"))
    assert opened(directory).view == first.view and len(opened(directory)) == 49
    monkeypatch.undo()
    publish(directory, "duplicates", [opened(directory, own_deny=False).key_of(n) for n in (4, 5)])
    assert len(opened(directory)) == 48


def test_lists_that_cannot_be(directory: Storage) -> None:
    directory.write("deny/bad.parquet", b"PAR1 is not all")
    with pytest.raises(DataError, match=r"data .*/deny/bad.parquet: cannot be read"):
        opened(directory)
    sink = io.BytesIO()
    pq.write_table(pa.table({"url": ["x"]}), sink)
    directory.write("deny/bad.parquet", sink.getvalue())
    with pytest.raises(DataError, match=r"deny/bad.parquet has no column 'key' \(there: url\)"):
        opened(directory)
    assert len(opened(directory, own_deny=False)) == 50


def test_a_column_that_came_later_is_seen(s3: tuple[str, Any], make_dataset: Maker) -> None:
    """Though the machine's cache has the index as it was."""
    endpoint, make_bucket = s3
    directory = Storage(make_bucket(), endpoint)
    make_dataset(directory, {"train": 20}, per_shard=20)
    assert len(opened(directory).labels()) == 20  # the index is in the cache now
    name = "train-00000.index.parquet"
    table, sink = pq.read_table(io.BytesIO(directory.read(name))), io.BytesIO()
    pq.write_table(table.append_column("score", pa.array(np.arange(20.0))), sink)
    directory.write(name, sink.getvalue())
    assert len(opened(directory, where={"score": Bound(min=15)})) == 5


ANY_KEY = st.one_of(
    st.text("0123456789abcdef", min_size=20, max_size=20),
    st.text("0123456789", min_size=1, max_size=18),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
        lambda t: t.strip() == t and len(t.splitlines()) == 1
    ),
)


@settings(max_examples=100, deadline=None)
@given(named=st.lists(ANY_KEY, max_size=25), others=st.lists(ANY_KEY, max_size=25), text=st.booleans())
def test_keys_of_any_form(tmp_path_factory: pytest.TempPathFactory, named: list[str], others: list[str], text: bool) -> None:
    """In a list of either kind."""
    directory = Storage(str(tmp_path_factory.mktemp("keys")))
    sink = io.BytesIO("\n".join(named).encode()) if text else io.BytesIO()
    if not text:
        pq.write_table(pa.table({"key": pa.array(named, pa.string())}), sink)
    directory.write("list", sink.getvalue())
    [listed] = lists_of(directory, [f"{directory.url}/list"], None)
    keys = Keys(listed.keys())
    assert len(keys) == len(set(named))
    column = pa.chunked_array([pa.array(named + others, pa.string())])
    assert keys.holds(column).tolist() == [key in set(named) for key in named + others]


def test_many_keys_take_little_memory(tmp_path: Path) -> None:
    """A million of ours: 10 bytes each, and a few times that while they are read."""
    count = 1_000_000
    digits = np.random.default_rng(0).integers(0, 256, (count, 10), dtype=np.uint8).tobytes().hex()
    directory = Storage(str(tmp_path))
    publish(directory, "duplicates", [digits[n : n + 20] for n in range(0, len(digits), 20)])
    [listed] = lists_of(directory, [], 1)
    tracemalloc.start()
    keys = Keys(listed.keys())
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(keys) == count and held < 12 * count and peak < 80 * count
