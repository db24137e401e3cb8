from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.data import Bound
from pipeline.config.shard import Score
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards.adopt import Options, adopt
from pipeline.shards.columns import Columns, add_columns
from pipeline.shards.manifest import Manifest, ShardTable, publish
from pipeline.shards.rows import Row, read_index
from pipeline.shards.scores import FunctionScore, check_columns, deny_by_score, function_columns
from pipeline.stream import open_dataset

Make = Callable[..., Manifest]
MAKERS = "tests.unit.shards.makers"


def columns(function: str, column: str = "bright", **options: int) -> Columns:
    return function_columns(Score(column=column, function=f"{MAKERS}.{function}", **options), "shard.scores.0")  # type: ignore[arg-type]


def column(directory: Storage, name: str) -> list[float | None]:
    return [value for record in ShardTable(directory) for value in read_index(directory, record.index_name)[name].to_pylist()]


@pytest.mark.usefixtures("cluster")
def test_a_function_of_all_that_a_sample_has(store: Storage, make_dataset: Make) -> None:
    make_dataset(store, {"train": 45}, width=6, unlabelled=4)
    about = add_columns(store, columns("described", batch=7))["bright"]
    expected = [None if n % 4 == 0 else n % 3 + n / 1000 + 60 for n in range(45)]
    assert column(store, "bright") == expected
    values = [value for value in expected if value is not None]
    assert (about["rows"], about["values"], about["min"], about["max"]) == (45, 33, min(values), max(values))
    assert about["mean"] == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.usefixtures("cluster")
def test_pixels_are_those_that_training_sees(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20}, width=9, height=7)
    add_columns(directory, columns("brightness"))
    dataset = open_dataset(directory.url)
    peers = [np.array(Image.open(io.BytesIO(dataset[n].image)).convert("RGB")).mean() for n in range(20)]
    assert column(directory, "bright") == pytest.approx(peers, abs=1e-12)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fails_at_thirteen", r"makers.fails_at_thirteen failed at sample {key} \(RuntimeError: unlucky\)"),
        (
            "fails_at_many",
            r"makers.fails_at_many failed at 20 samples together, from \w+ on, and at none of them alone \(RuntimeError: too many",
        ),
        ("too_few", r"makers.too_few returned 19 numbers for 20 samples"),
        ("one_number", r"makers.one_number returned float '0.0', not a number for each sample"),
        ("words", r"makers.words gave str '1.5' for sample \w+ \(allowed: a finite number, or None\)"),
        ("endless", r"makers.endless gave float 'inf' for sample"),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_functions_that_fail_are_named_with_the_sample(make_dataset: Make, tmp_path: Path, function: str, told: str) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 20})
    key = open_dataset(directory.url)[13].key
    with pytest.raises(DataError, match=f"shard.scores.0.function: {MAKERS}.{told.format(key=key).removeprefix('makers.')}"):
        add_columns(directory, columns(function))
    assert "bright" not in read_index(directory, "train-00000.index.parquet").column_names


@pytest.mark.usefixtures("cluster")
def test_an_image_that_cannot_be_decoded_has_no_score(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (20, 10), (50, 50, 50)).save(png, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, data in (("a", png.getvalue()), ("b", png.getvalue()[:-30]), ("c", png.getvalue())):
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    directory = Storage(str(tmp_path))
    adopt(directory, Options())
    about = add_columns(directory, columns("brightness"))["bright"]
    assert column(directory, "bright") == [50.0, None, 50.0]
    assert (about["rows"], about["values"], about["mean"]) == (3, 2, 50.0)


def test_functions_are_shown_only_what_can_be_decoded() -> None:
    assert FunctionScore("w", f"{MAKERS}.brightness")([Row("a", -1, b"none"), Row("b", -1, None)]) == [[None, None]]


def test_a_changed_function_is_another_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "own_scores_changed.py"
    module.write_text("def one(samples): ...\ndef two(samples): ...\n")

    def made(function: str) -> str:
        return function_columns(Score(column="c", function=f"own_scores_changed.{function}"), "w").fingerprint

    first = made("one")
    assert made("one") == first != made("two")
    module.write_text("def one(samples): return [1]\n")
    assert made("one") != first


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["width"], r"shard.scores.0.column: 'width' cannot be added, every index has this column already"),
        (["a", "phash"], r"shard.scores.1.column: 'phash' cannot be added"),
        (["a", "b", "a"], r"shard.scores.2.column: 'a' cannot be added, shard.scores.0 has it"),
    ],
)
def test_columns_that_are_taken_are_refused(names: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_columns([Score(column=name, function="a.b") for name in names])


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (Bound(min=10), lambda n: n >= 10),
        (Bound(max=30.5), lambda n: n <= 30),
        (Bound(min=12, max=12), lambda n: n == 12),
        (Bound(max=1000), lambda n: True),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_a_filter_leaves_out_what_where_leaves_out(make_dataset: Make, tmp_path: Path, keep: Bound, stays: Callable[[int], bool]) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 45})
    add_columns(directory, columns("described", "also", batch=64))
    add_columns(directory, columns("caption_number", "number"))
    denied = deny_by_score(directory, "number", keep)
    url = f"{directory.url}/deny/score-number.parquet"
    table = pq.read_table(url)
    assert table.column_names == ["key", "value"] and len(table) == denied == sum(not stays(n) for n in range(45))
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    assert sorted(table["value"].to_pylist()) == [n for n in range(45) if not stays(n)]
    left = open_dataset(directory.url, deny=[url])
    where = open_dataset(directory.url, where={"number": keep})
    assert [left[n].key for n in range(len(left))] == [where[n].key for n in range(len(where))]
    assert [int(left[n].text.split()[1]) for n in range(len(left))] == [n for n in range(45) if stays(n)]


@pytest.mark.usefixtures("cluster")
def test_samples_without_a_score_are_left_out(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    make_dataset(directory, {"train": 40}, unlabelled=4)  # and those have no score
    add_columns(directory, columns("described"))
    assert deny_by_score(directory, "bright", Bound(min=0)) == 10
    table = pq.read_table(tmp_path / "deny" / "score-bright.parquet")
    assert table["value"].null_count == 10
    dataset = open_dataset(directory.url, deny=[str(tmp_path / "deny" / "score-bright.parquet")])
    assert len(dataset) == 30 and (dataset.labels() >= 0).all()


@pytest.mark.usefixtures("cluster")
def test_a_list_is_made_again_where_something_changed(make_dataset: Make, tmp_path: Path) -> None:
    directory, path = Storage(str(tmp_path)), tmp_path / "deny" / "score-number.parquet"
    make_dataset(directory, {"train": 45})
    with pytest.raises(ConfigError, match=r"shard.scores.2: the shards in .* have no column 'number'; score them first"):
        deny_by_score(directory, "number", Bound(min=10), where="shard.scores.2")
    add_columns(directory, columns("caption_number", "number"))
    assert deny_by_score(directory, "number", Bound(min=10)) == 10
    first = path.stat()
    assert deny_by_score(directory, "number", Bound(min=10)) == 10
    assert path.stat().st_mtime_ns == first.st_mtime_ns and path.stat().st_ino == first.st_ino
    assert deny_by_score(directory, "number", Bound(min=20)) == 20 == len(pq.read_table(path))
    add_columns(directory, columns("brightness", "number"))
    assert deny_by_score(directory, "number", Bound(min=20)) == 0 == len(pq.read_table(path))
    assert deny_by_score(directory, "number", None) == 0 and not path.exists()
    assert deny_by_score(directory, "number", None) == 0


@pytest.mark.usefixtures("cluster")
def test_a_list_of_a_later_version_changes_nothing_of_an_earlier_one(make_dataset: Make, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    first = make_dataset(directory, {"train": 45})
    add_columns(directory, columns("caption_number", "number"))
    assert deny_by_score(directory, "number", Bound(min=10)) == 10
    view = open_dataset(directory.url).view
    records = [*ShardTable(directory)]
    publish(directory, records, replace(first, version=2))
    add_columns(directory, columns("caption_number", "number"))
    assert open_dataset(directory.url).view == view  # it holds until there is one of version 2
    assert deny_by_score(directory, "number", Bound(min=20)) == 20
    assert len(open_dataset(f"{directory.url}@2")) == 25
    assert open_dataset(f"{directory.url}@1").view == view
    for _ in range(2):
        assert deny_by_score(directory, "number", None) == 0
        assert len(open_dataset(f"{directory.url}@2")) == 45
        assert open_dataset(f"{directory.url}@1").view == view


def test_a_column_is_not_called_as_a_version_is() -> None:
    with pytest.raises(ValueError, match=r"'clip-v2' ends as the names of lists do .* choose 'clip_v2'"):
        Score(column="clip-v2", function="a.b")
