"""Deny-lists and bounds: applied as a dataset is opened, its shards untouched."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import Bound
from pipeline.config.inputs import Cache
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream import Dataset, open_dataset, open_stream, view

Maker = Callable[..., Manifest]
SAMPLES = 50


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(params=["file", "s3"])
def directory(request: pytest.FixtureRequest, make_dataset: Maker, tmp_path: Path) -> Storage:
    """50 samples in three shards, sample n with score n / 10, but n = 7 without."""
    if request.param == "file":
        where = Storage(str(tmp_path / "data"))
    else:
        endpoint, make_bucket = request.getfixturevalue("s3")
        where = Storage(make_bucket(), endpoint)
    make_dataset(where, {"train": SAMPLES}, per_shard=20)
    for shard in range(3):
        name = f"train-{shard:05d}.index.parquet"
        table = pq.read_table(io.BytesIO(where.read(name)))
        scores = [None if n == 7 else n / 10 for n in range(shard * 20, shard * 20 + len(table))]
        sink = io.BytesIO()
        pq.write_table(table.append_column("score", pa.array(scores, pa.float64())), sink)
        where.write(name, sink.getvalue())
    return where


def opened(directory: Storage, **more: object) -> Dataset:
    return open_dataset(directory.url, endpoint=directory.endpoint, **more)  # type: ignore[arg-type]


def texts(dataset: Dataset) -> list[int]:
    return [int(dataset[n].text.split()[1]) for n in range(len(dataset))]


def test_a_list_of_keys(directory: Storage, tmp_path: Path) -> None:
    whole = opened(directory)
    gone = [3, 19, 20, 49]
    directory.write("takedown.txt", "\n".join(["", *(whole.key_of(n) for n in gone), "no such key", ""]).encode())
    before = {name: directory.read(name) for name in directory.names()}
    less = opened(directory, deny=[f"{directory.url}/takedown.txt"])
    rest = [n for n in range(SAMPLES) if n not in gone]
    assert texts(less) == rest and less.sizes.tolist() == [18, 19, 9]
    assert less.labels().tolist() == [n % 3 for n in rest]
    assert before == {name: directory.read(name) for name in directory.names()}
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [whole.key_of(n) for n in gone], "why": ["asked"] * 4}), sink)
    directory.write("takedown.parquet", sink.getvalue())
    assert texts(opened(directory, deny=[f"{directory.url}/takedown.parquet"])) == rest


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        ({"score": Bound(min=2.0)}, range(20, 50)),
        ({"score": Bound(max=1.0)}, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]),
        ({"score": Bound(min=0.5, max=0.9)}, [5, 6, 8, 9]),
        ({"score": Bound(min=4.0), "width": Bound(max=8)}, range(40, 50)),
    ],
)
def test_bounds(directory: Storage, bound: dict[str, Bound], kept: list[int]) -> None:
    assert texts(opened(directory, where=bound)) == list(kept)


def test_the_stream_goes_over_what_is_left(directory: Storage) -> None:
    options = {"global_batch": 10, "micro_batch": 5, "size": 8, "endpoint": directory.endpoint, "where": {"score": Bound(min=2.0)}}
    keys = [k for b in islice(iter(open_stream(directory.url, workers=2, **options)), 12) for k in b.keys]  # type: ignore[arg-type]
    rest = {opened(directory).key_of(n) for n in range(20, 50)}
    assert [set(keys[i : i + 30]) for i in (0, 30)] == [rest, rest]
    ranks = [open_stream(directory.url, rank=r, world_size=2, consumed=30, **options) for r in range(2)]  # type: ignore[arg-type]
    again = sorted((b for r in ranks for b in islice(iter(r), 3)), key=lambda b: b.index)
    assert [k for b in again for k in b.keys] == keys[30:60]


def test_a_view_has_a_name_of_its_own(directory: Storage) -> None:
    """It is that of the content of the lists, wherever they lie."""
    for name, text in (("a.txt", b"k1\n"), ("b.txt", b"k1\n"), ("c.txt", b"k2\n")):
        directory.write(name, text)
    a, b, c = (opened(directory, deny=[f"{directory.url}/{n}.txt"]).view for n in "abc")
    bounded = [opened(directory, where={"score": Bound(min=m)}).view for m in (1.0, 1.0, 2.0)]
    assert a == b != c and bounded[0] == bounded[1] != bounded[2]
    assert len({a, c, bounded[0], bounded[2], opened(directory).view}) == 5


def test_it_is_worked_out_once_a_machine(directory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(directory, where={"score": Bound(min=2.0)})
    monkeypatch.setattr(view.Rule, "left_out", lambda *args: pytest.fail("worked out again"))
    again = opened(directory, where={"score": Bound(min=2.0)})
    assert again.sizes.tolist() == first.sizes.tolist() == [0, 20, 10] and texts(again) == list(range(20, 50))


def test_a_damaged_view_is_made_again(directory: Storage, tmp_path: Path) -> None:
    where = {"score": Bound(min=2.0)}
    cache = opened(directory, where=where).cache
    cache.limit = 1
    cache.trim()  # does not touch it
    [file] = (cache.path / ".views").glob("view-*")
    file.write_bytes(b"")
    assert opened(directory, where=where).sizes.tolist() == [0, 20, 10]


def test_many_shards(make_dataset: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are kept in one row group."""
    monkeypatch.setattr(view, "_GROUP", 4)
    make_dataset(Storage(str(tmp_path / "data")), {"train": 33}, per_shard=3)
    whole = open_dataset(str(tmp_path / "data"))
    gone = [n for n in range(33) if hashlib.sha256(bytes([n])).digest()[0] % 2]
    (tmp_path / "deny.txt").write_text("\n".join(whole.key_of(n) for n in gone))
    assert texts(open_dataset(str(tmp_path / "data"), deny=[str(tmp_path / "deny.txt")])) == [n for n in range(33) if n not in gone]


def test_what_cannot_be(directory: Storage, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.where.scor: the index train-00000.index.parquet has no such column of numbers \(there: .*score"
    ):
        opened(directory, where={"scor": Bound(min=1)})
    with pytest.raises(ConfigError, match=r"data\.where\.key"):
        opened(directory, where={"key": Bound(min=1)})
    with pytest.raises(DataError, match="leave none of its 50 samples"):
        opened(directory, where={"score": Bound(min=100)})
    with pytest.raises(DataError, match=r"data.deny: .*none.txt: there is no such file"):
        opened(directory, deny=[f"{directory.url}/none.txt"])
    directory.write("odd.bin", b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"odd.bin is neither Parquet nor UTF-8 text"):
        opened(directory, deny=[f"{directory.url}/odd.bin"])
    sink = io.BytesIO()
    pq.write_table(pa.table({"url": ["x"]}), sink)
    directory.write("odd.parquet", sink.getvalue())
    with pytest.raises(DataError, match=r"odd.parquet has no column 'key' \(there: url\)"):
        opened(directory, deny=[f"{directory.url}/odd.parquet"])


def test_the_cache_may_lie_elsewhere(directory: Storage, tmp_path: Path) -> None:
    opened(directory, where={"score": Bound(min=2.0)}, cache=Cache(path=str(tmp_path / "elsewhere")))
    assert list((tmp_path / "elsewhere" / ".views").glob("view-*.parquet"))


def test_rows_left_out_are_held_piece_by_piece(tmp_path: Path) -> None:
    """A view of 5,000 shards opens by its counts alone."""
    rng, path = np.random.default_rng(0), tmp_path / "view.parquet"
    rows = [np.flatnonzero(rng.random(100) < 0.3).astype(np.int32) for _ in range(5000)]
    table = pa.table([[100 - len(r) for r in rows], rows], schema=view._SCHEMA)
    pq.write_table(table, path, row_group_size=view._GROUP)
    selection = view.Selection(path)
    assert selection.kept.tolist() == [100 - len(r) for r in rows]
    for shard in (0, 1023, 1024, 4999):
        assert selection.left_out(shard).tolist() == rows[shard].tolist()
