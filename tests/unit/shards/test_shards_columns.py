from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_config
from pipeline.config.data import Bound
from pipeline.config.inputs import Cache
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards import columns as added
from pipeline.shards import rows
from pipeline.shards.adopt import Options, adopt
from pipeline.shards.columns import Columns, add_columns, add_to_shard, find_columns, maker_of
from pipeline.shards.job import make_dataset as make
from pipeline.shards.manifest import INDEX_SCHEMA, Manifest, ShardTable
from pipeline.shards.rows import MEMBERS, read_index, read_rows
from pipeline.shards.verify import verify
from pipeline.stream import open_dataset
from tests.unit.shards.makers import Doubled, Stutters, lengths

Make = Callable[..., Manifest]


def files(directory: Storage) -> dict[str, bytes]:
    return {name: directory.read(name) for name in directory.names()}


@pytest.mark.usefixtures("cluster")
def test_columns_are_added_behind_what_an_index_has(store: Storage, make_dataset: Make, tmp_path: Path) -> None:
    manifest = make_dataset(store, {"train": 45, "test": 11})
    before, log = files(store), tmp_path / "log"
    about = add_columns(store, lengths(str(log)))
    assert about == {
        "wide": {"fingerprint": "one", "dataset": manifest.hash, "rows": 56, "values": 56, "mean": 8, "min": 8, "max": 8},
        "long": about["long"],
    }
    assert find_columns(store) == about and about["long"]["max"] == len("train 44")
    assert sorted(map(int, log.read_text().split())) == [4, 5, 6, 6, 7, 7, 7, 7, 7]  # batches of at most 7, of one shard each
    after = files(store)
    assert {name for name in after if after[name] != before.get(name)} == {
        *(r.index_name for r in ShardTable(store)),
        "columns.json",
    }
    index = read_index(store, "train-00001.index.parquet")
    assert index.column_names == [*INDEX_SCHEMA.names, "long", "wide"]  # by name
    assert index["long"].to_pylist() == [len(f"train {n}") for n in range(20, 40)] and index.schema.field("wide").type == pa.int32()
    # What was there stays to the last byte, and the dataset reads as before.
    old = index.select(INDEX_SCHEMA.names)
    assert added.encode_index(old) == before["train-00001.index.parquet"]
    assert list(verify(store)) == []
    assert len(open_dataset(store.url, "train", store.endpoint)) == 45
    # Once more: nothing is computed, nothing is written.
    add_columns(store, lengths(str(log)))
    assert len(log.read_text().split()) == 9 and files(store) == after


@pytest.mark.usefixtures("cluster")
def test_the_same_bytes_whatever_workers_batches_and_order(make_dataset: Make, tmp_path: Path) -> None:
    found = []
    for n, workers in enumerate((1, 2)):
        directory = Storage(str(tmp_path / str(n)))
        make_dataset(directory, {"train": 45})
        one = lengths(batch=3 + n)
        two = replace(one, types={"also": pa.int32(), "zero": pa.float64()})
        for part in (one, two)[:: 1 - 2 * n]:  # the other way round
            add_columns(directory, part, workers)
        found.append(files(directory))
    assert found[0] == found[1]


@pytest.mark.usefixtures("cluster")
def test_another_maker_replaces_a_column_in_its_place(make_dataset: Make, tmp_path: Path) -> None:
    directory, log = Storage(str(tmp_path / "data")), tmp_path / "log"
    make_dataset(directory, {"train": 30})
    add_columns(directory, lengths())
    add_columns(directory, replace(lengths(), types={"b": pa.int32(), "c": pa.int32()}, fingerprint="other"))
    other = lengths(str(log), fingerprint="two")
    # Where a pass of another maker began, the column is not promised any more: no list of it is made of two kinds of numbers.
    assert add_to_shard(ShardTable(directory)[0], directory, other).computed
    add_columns(directory, other)
    assert sorted(map(int, log.read_text().split())) == [3, 6, 7, 7, 7]  # the shard that had it was not computed again
    index = read_index(directory, "train-00001.index.parquet")
    assert [(f.name, maker_of(f)) for f in index.schema][len(INDEX_SCHEMA) :] == [
        ("b", "other"),
        ("c", "other"),
        ("long", "two"),
        ("wide", "two"),
    ]
    assert {name: about["fingerprint"] for name, about in find_columns(directory).items()} == {
        "b": "other",
        "c": "other",
        "long": "two",
        "wide": "two",
    }


KILLED = """
import sys
import ray
from pipeline.core.storage import Storage
from pipeline.shards.columns import add_columns
from tests.unit.shards.makers import lengths
ray.init(sys.argv[4], log_to_driver=False)
add_columns(Storage(sys.argv[1]), lengths(sys.argv[2], float(sys.argv[3])), 1)
"""


@pytest.mark.usefixtures("cluster")
def test_a_killed_pass_goes_on(make_dataset: Make, tmp_path: Path) -> None:
    import ray

    broken, unbroken, log = Storage(str(tmp_path / "broken")), Storage(str(tmp_path / "unbroken")), tmp_path / "log"
    for directory in (broken, unbroken):
        make_dataset(directory, {"train": 60}, per_shard=6)
    add_columns(unbroken, lengths())
    arguments = [broken.url, str(log), "0.2", ray.get_runtime_context().gcs_address]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    try:
        while not log.exists() or len(log.read_text().split()) < 4:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not broken.exists("columns.json")
    had = [record.name for record in ShardTable(broken) if lengths().is_in(read_index(broken, record.index_name).schema)]
    assert 3 <= len(had) < 10
    again = tmp_path / "again"
    add_columns(broken, lengths(str(again)))
    assert 0 < len(again.read_text().split()) <= 10 - len(had)  # a worker may have ended its shard after its driver was killed
    assert {n: b for n, b in files(broken).items() if not n.startswith(".tmp-")} == files(unbroken)


@pytest.mark.usefixtures("cluster")
def test_shards_that_fail_are_named_and_the_others_done(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 60})
    (tmp_path / "train-00001.tar").unlink()
    tar = bytearray((tmp_path / "train-00002.tar").read_bytes())
    row = read_index(directory, "train-00002.index.parquet").to_pylist()[4]
    tar[row["image_offset"] + 9] ^= 1
    (tmp_path / "train-00002.tar").write_bytes(tar)
    with pytest.raises(DataError) as e:
        add_columns(directory, lengths(), label="score")
    assert "score: 2 pieces of the work failed (the others are finished, and the same command repeats these alone)" in str(e.value)
    assert str(e.value).endswith(
        f": train-00001.tar: it is missing; train-00002.tar: sample {row['key']}: its bytes are not those that the index names (crc32)"
    )
    assert lengths().is_in(read_index(directory, "train-00000.index.parquet").schema)
    assert not directory.exists("columns.json")


@pytest.mark.usefixtures("cluster")
def test_what_a_machine_or_store_failed_at_is_tried_again(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "data"))
    make_dataset(directory, {"train": 40})
    (tmp_path / "marks").mkdir()
    about = add_columns(directory, Columns({"one": pa.float64()}, "f", Stutters(str(tmp_path / "marks"))))
    assert about["one"]["values"] == 40 and len(list((tmp_path / "marks").iterdir())) == 2


@pytest.mark.usefixtures("cluster")
def test_columns_that_an_index_was_written_with_are_not_replaced(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20})
    for name in ("width", "crc32"):
        with pytest.raises(DataError, match=f"the index has a column '{name}' already"):
            add_columns(directory, replace(lengths(), types={name: pa.int32(), "other": pa.float64()}))


@pytest.mark.usefixtures("cluster")
def test_adopted_tars_get_columns_too(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 30})
    for name in directory.names():
        if not name.endswith(".tar"):
            directory.remove(name)
    adopt(directory, Options(columns=("n",)))
    about = add_columns(directory, lengths())
    assert about["long"]["values"] == 30
    assert read_index(directory, "train-00000.index.parquet").column_names == [*INDEX_SCHEMA.names, "n", "long", "wide"]
    assert list(verify(directory)) == []
    adopt(directory, Options(), force=True)  # indices made anew have no such columns
    assert find_columns(directory) == {}


@pytest.mark.usefixtures("cluster")
def test_gpus_that_are_not_there_are_refused(make_dataset: Make, tmp_path: Path) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("there is one")
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20})
    with pytest.raises(ConfigError, match=r"ask for 0.5 of a GPU each, and Ray has none"):
        add_columns(directory, replace(lengths(), gpus=0.5))


@pytest.mark.usefixtures("cluster")
def test_of_a_further_version_only_what_is_new_is_computed(tree: Path, photo: Callable[..., Any], tmp_path: Path) -> None:
    config = parse_config(
        {"name": "v", "storage": str(tmp_path), "cluster": "local", "shard": {"source": {"url": str(tree)}, "samples": 30}}
    )
    directory, log = Storage(str(tmp_path / "data")), tmp_path / "log"
    first, _ = make(config, directory)
    add_columns(directory, lengths())
    for n in range(25):
        photo(20, 20, n).save(tree / "cat" / f"new-{n}.png")
    second, _ = make(config, directory)
    assert (first.written, second.written, second.version) == (80, 105, 2)
    about = add_columns(directory, lengths(str(log)))
    assert sum(map(int, log.read_text().split())) == 25
    assert (about["wide"]["rows"], about["wide"]["dataset"], about["long"]["values"]) == (105, second.hash, 80)
    bound = {"wide": Bound(min=20, max=20)}
    assert len(open_dataset(directory.url, where=bound)) == 25
    with pytest.raises(DataError, match=r"leave none of its 80 samples"):
        open_dataset(f"{directory.url}@1", where=bound)


def test_members_that_are_asked_for(store: Storage, make_dataset: Make) -> None:
    make_dataset(store, {"train": 20}, unlabelled=4)
    index, dataset = read_index(store, "train-00000.index.parquet"), open_dataset(store.url, "train", store.endpoint)
    for needs in (frozenset[str](), frozenset({"txt"}), frozenset({"json", "txt"}), MEMBERS):
        found = [row for batch in read_rows(store, "train-00000.tar", index, needs, 6) for row in batch]
        for n, row in enumerate(found):
            sample = dataset[n]
            assert (row.key, row.label) == (sample.key, sample.label)
            assert row.image == (sample.image if "image" in needs else None)
            assert row.text == (sample.text if "txt" in needs else None)
            assert row.json == (sample.json if "json" in needs else None)
    assert [len(batch) for batch in read_rows(store, "train-00000.tar", index, MEMBERS, 6)] == [6, 6, 6, 2]
    assert list(read_rows(store, "train-00000.tar", index.slice(0, 0), MEMBERS, 6)) == []


def test_a_shard_that_is_gone_or_cut_is_told(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20})
    index, tar = read_index(directory, "train-00000.index.parquet"), tmp_path / "train-00000.tar"
    last = index.to_pylist()[-1]
    os.truncate(tar, last["txt_offset"] + 3)
    for needs, told in ((MEMBERS, "its bytes are not those that the index names"), (frozenset({"txt"}), "the shard ends before it")):
        with pytest.raises(DataError, match=f"sample {last['key']}: {told}"):
            list(read_rows(directory, tar.name, index, needs, 64))
    tar.unlink()
    for needs in (MEMBERS, frozenset({"txt"})):
        with pytest.raises(DataError, match=r"it is missing"):
            list(read_rows(directory, tar.name, index, needs, 64))


def test_batches_hold_no_more_than_they_may(make_dataset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20}, width=16, height=16)
    index = read_index(directory, "train-00000.index.parquet")
    most = int(max(index["length"].to_numpy())) + 3 * 16 * 16

    def sizes(needs: frozenset[str] = MEMBERS) -> list[int]:
        return [len(batch) for batch in read_rows(directory, "train-00000.tar", index, needs, 64)]

    assert sizes() == [20]
    monkeypatch.setattr(rows, "_HELD", 5 * most)
    assert max(sizes()) >= 5 and sum(sizes()) == 20 and len(sizes()) == 4
    monkeypatch.setattr(rows, "_HELD", 10)  # each sample is more, and is taken alone
    assert sizes() == [1] * 20
    monkeypatch.undo()
    monkeypatch.setattr(rows, "_SPAN", 4 * max(index["length"].to_pylist()))
    assert max(sizes(frozenset({"txt"}))) in (4, 5) and sum(sizes()) == 20


def test_damaged_indices_are_one_sentence(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20})
    (tmp_path / "train-00000.index.parquet").write_bytes(b"PAR1 and no more")
    record = ShardTable(directory)[0]
    with pytest.raises(DataError, match=r"train-00000.index.parquet: cannot be read"):
        add_to_shard(record, directory, lengths())
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "train-00000.index.parquet")
    with pytest.raises(DataError, match=r"there is no column 'offset'"):
        add_to_shard(record, directory, lengths())
    (tmp_path / "train-00000.index.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000.index.parquet: is missing"):
        add_to_shard(record, directory, lengths())
    directory.write("columns.json", b"{")
    with pytest.raises(DataError, match=r"columns.json: this is not JSON"):
        find_columns(directory)


def test_sums_do_not_depend_on_the_order_of_arrival() -> None:
    random = np.random.default_rng(0).normal(size=200)
    parts = [added._Part.of(pa.chunked_array([[*random[n : n + 3].tolist(), None]])) for n in range(0, 198, 3)]
    found = []
    for order in (parts, parts[::-1]):
        total = added._Sum()
        for part in order:
            total.add(part, True)
        found.append(total.about())
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert found[0] == {
        "rows": 264,
        "values": 198,
        "mean": pytest.approx(random[:198].mean()),
        "min": random[:198].min(),
        "max": random[:198].max(),
    }


@pytest.mark.usefixtures("cluster")
def test_bounds_hold_on_columns_that_came_or_changed_later(store: Storage, make_dataset: Make, tmp_path: Path) -> None:
    """Also where the machine's cache has the indices as they were before."""
    make_dataset(store, {"train": 60})
    cache = Cache(path=str(tmp_path / "cache"))

    def left(least: float) -> tuple[int, str]:
        dataset = open_dataset(store.url, "train", store.endpoint, where={"long": Bound(min=least)}, cache=cache)
        return len(dataset), dataset.view

    whole = open_dataset(store.url, "train", store.endpoint, cache=cache)
    assert len({whole[n].key for n in range(60)}) == 60
    with pytest.raises(ConfigError, match=r"no such column of numbers"):
        left(8)
    add_columns(store, lengths())  # "train 9" has 7 letters, "train 10" 8
    length, view = left(8)
    assert length == 50
    add_columns(store, replace(lengths(fingerprint="two"), make=Doubled()))
    assert left(8) == (60, left(8)[1]) != (60, view)  # another view: what it holds has changed
    assert left(15)[0] == 50
