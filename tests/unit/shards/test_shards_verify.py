from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipeline.core.errors import DataError, StorageError
from pipeline.core.storage import Storage
from pipeline.shards.__main__ import main
from pipeline.shards.adopt import Options, adopt_tar
from pipeline.shards.manifest import Manifest, dataset_hash, publish
from pipeline.shards.table import ShardTable, encode_table
from pipeline.shards.verify import Problem, verify

SHARD, INDEX = "train-00001.tar", "train-00001.index.parquet"


@pytest.fixture
def data(tmp_path: Path, make_dataset: Callable[..., Manifest]) -> Storage:
    """Five shards: train of 20, 20 and 10 samples, test of 20 and 5."""
    directory = Storage(str(tmp_path / "data"))
    make_dataset(directory, {"train": 50, "test": 25}, unlabelled=7)
    return directory


def rows(directory: Storage, index: str = INDEX) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(directory.read(index))).to_pylist()


def flip(directory: Storage, at: int, shard: str = SHARD) -> None:
    tar = bytearray(directory.read(shard))
    tar[at] ^= 4
    directory.write(shard, bytes(tar))


def change_index(directory: Storage, change: Callable[[pa.Table], pa.Table]) -> None:
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(directory.read(INDEX)))), sink)
    directory.write(INDEX, sink.getvalue())


def told(directory: Storage, split: str | None = None) -> list[tuple[str, str, str]]:
    """(file, number of the sample in the shard, what) of each problem."""
    return [(p.shard, p.key, p.what) for p in verify(directory, split, workers=2)]


SHA = (SHARD, "", "its sha256 differs from the table of shards")


def test_a_sound_dataset_has_no_problems(store: Storage, make_dataset: Callable[..., Manifest]) -> None:
    make_dataset(store, {"train": 30, "test": 12}, unlabelled=7)
    assert told(store) == told(store, "test") == []
    tar = bytearray(store.read("test-00000.tar"))
    tar[700] ^= 1
    store.write("test-00000.tar", bytes(tar))
    assert told(store, "train") == [] and len(told(store)) == len(told(store, "test")) == 2


@pytest.mark.parametrize("part", ["image", "txt", "json"])
def test_a_flipped_bit_in_a_member_names_its_sample(data: Storage, part: str) -> None:
    row = rows(data)[4]
    flip(data, row[f"{part}_offset"] + row[f"{part}_length"] - 3)
    first, (shard, key, what) = told(data)
    assert first == SHA and (shard, key) == (SHARD, row["key"])
    assert "damaged" in what or "bad-json" in what or "not-an-image" in what
    if part == "image":
        assert what == "its bytes are damaged (crc32, sha256 differ from the index)"


@pytest.mark.parametrize("sample", [0, 4, 19])
def test_a_flipped_bit_in_a_header_loses_that_sample_alone(data: Storage, sample: int) -> None:
    row = rows(data)[sample]
    flip(data, row["offset"] + 5)  # in the name of its first member
    found = told(data)
    assert found[0] == SHA and found[2:] == [(SHARD, row["key"], found[2][2])]
    assert found[1] == (SHARD, "", f"it is damaged at byte {row['offset']:,}, where a member's header should be" if sample else found[1][2])
    # In the header of a later member: what comes before it is there, what follows is found again.
    flip(data, row["offset"] + 5)
    flip(data, row["txt_offset"] - 512 + 100)
    first, second, third = told(data)
    assert first == SHA and second[2].startswith("it is damaged at byte") and third[1] == row["key"]


def test_a_flipped_bit_in_the_padding(data: Storage) -> None:
    row = rows(data)[4]
    flip(data, row["txt_offset"] + row["txt_length"] + 1)
    assert told(data) == [SHA, (SHARD, row["key"], "its bytes are damaged (crc32 differ from the index)")]


def test_a_flipped_bit_behind_the_last_sample(data: Storage) -> None:
    end = rows(data)[-1]["offset"] + rows(data)[-1]["length"]
    flip(data, len(data.read(SHARD)) - 1)
    assert told(data) == [SHA]
    flip(data, end)
    assert told(data) == [SHA, (SHARD, "", f"it is damaged at byte {end:,}, where a member's header should be")]


def test_several_samples_of_one_shard(data: Storage) -> None:
    damaged = [rows(data)[n] for n in (2, 3, 17)]
    for n, row in enumerate(damaged):
        flip(data, row["offset"] + 5 if n == 0 else row["image_offset"] + 20)
    assert [key for _, key, _ in told(data) if key] == [row["key"] for row in damaged]


def test_a_cut_between_two_members_is_seen(data: Storage) -> None:
    whole, row = data.read(SHARD), rows(data)[15]
    data.write(SHARD, whole[: row["offset"]])
    size, end, *lost = told(data)
    assert size == (SHARD, "", f"it has {row['offset']:,} bytes, the table of shards says {len(whole):,}")
    assert end[2].startswith(f"it has no end-of-archive marker at byte {row['offset']:,}")
    assert lost == [(SHARD, r["key"], "the index has it, the tar does not") for r in rows(data)[15:]]


def test_a_cut_between_the_members_of_one_sample_is_seen(data: Storage) -> None:
    row = rows(data)[15]
    data.write(SHARD, data.read(SHARD)[: row["txt_offset"] - 512])
    _, end, first, *lost = told(data)
    assert "no end-of-archive marker" in end[2] and len(lost) == 4
    assert first[1] == row["key"] and first[2].startswith("its bytes are damaged (length, txt_offset, txt_length")


def test_a_cut_inside_a_member_and_an_empty_file(data: Storage) -> None:
    row = rows(data)[18]
    data.write(SHARD, data.read(SHARD)[: row["image_offset"] + 50])
    _, end, *lost = told(data)
    assert end[2] == f"it is cut off at byte {row['image_offset'] + 50:,}, inside a member"
    assert [key for _, key, _ in lost] == [r["key"] for r in rows(data)[18:]] and "truncated" in lost[0][2]
    data.write(SHARD, b"")
    _, end, *lost = told(data)
    assert end[2] == "it has no bytes" and len(lost) == 20


def test_a_longer_tar(data: Storage) -> None:
    whole = data.read(SHARD)
    data.write(SHARD, whole + b"\0" * 512)
    assert told(data) == [(SHARD, "", f"it has {len(whole) + 512:,} bytes, the table of shards says {len(whole):,}")]


def test_shards_that_are_missing_or_swapped(data: Storage) -> None:
    data.remove("test-00000.tar")
    data.remove("train-00002.index.parquet")
    assert told(data) == [("test-00000.tar", "", "it is missing"), ("train-00002.index.parquet", "", "it is missing")]
    one, two = data.read("train-00000.tar"), data.read(SHARD)
    data.write("train-00000.tar", two)
    data.write(SHARD, one)
    found = [p for p in told(data, "train") if p[0] == SHARD]
    # Twenty samples that are not there, and twenty that should not be: the first are named.
    assert found[0] == (SHA if len(one) == len(two) else (SHARD, "", found[0][2])) and len(found) == 22
    assert found[-1] == (SHARD, "", "and 20 samples more")


def test_a_changed_index(data: Storage) -> None:
    key = rows(data)[3]["key"]

    def set_value(column: str, value: object) -> None:
        def change(table: pa.Table) -> pa.Table:
            values = table[column].to_pylist()
            values[3] = value
            return table.set_column(
                table.column_names.index(column), table.schema.field(column), pa.array(values, table.schema.field(column).type)
            )

        change_index(data, change)

    original = data.read(INDEX)
    for column, value in {"cls": 77, "width": 9, "crc32": 1, "txt_offset": 512, "sha256": "0" * 64}.items():
        set_value(column, value)
        ((shard, which, what),) = told(data)
        assert (shard, which) == (INDEX, key) and what.startswith(f"the index is wrong: {column} is {value!r} there and ")
        data.write(INDEX, original)
    set_value("key", "somebody")
    assert told(data) == [(SHARD, "somebody", "the index has it, the tar does not"), (SHARD, key, "the tar has it, the index does not")]
    data.write(INDEX, original)
    change_index(data, lambda table: table.slice(1))
    assert told(data) == [
        (INDEX, "", "it has 19 rows, the table of shards says 20"),
        (SHARD, pq.read_table(io.BytesIO(original))["key"][0].as_py(), "the tar has it, the index does not"),
    ]
    data.write(INDEX, original)
    change_index(data, lambda table: table.take([1, 0, *range(2, 20)]))
    assert told(data) == [(INDEX, "", "its rows are not in the order of the tar")]
    data.write(INDEX, original)
    change_index(data, lambda table: table.drop_columns(["crc32"]))
    assert told(data) == [(INDEX, "", "it has no column 'crc32' of type int64")]
    data.write(INDEX, original[:-9])
    ((_, _, what),) = told(data)
    assert what.startswith("it cannot be read (")


def test_a_changed_table_or_manifest(data: Storage) -> None:
    table = list(ShardTable(data))
    other = [table[0], *table[2:]]
    data.write("shards.parquet", encode_table(other))
    hashes, samples = told(data)
    assert hashes == ("shards.parquet", "", "its hash differs from the manifest's: one of them is of another dataset, or was changed")
    assert samples == ("shards.parquet", "", f"it has {75 - table[1].samples} samples, the manifest says 75")
    with pytest.raises(DataError, match=r"there is no split 'val' \(allowed: test, train\)$"):
        list(verify(data, "val"))
    data.remove("manifest.json")
    with pytest.raises(DataError, match="there is no dataset here"):
        list(verify(data))


def test_a_store_that_fails_is_no_problem_of_the_data(data: Storage) -> None:
    data.remove(SHARD)
    Path(data.path, SHARD).mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        list(verify(data))


def test_an_adopted_tar_without_its_end_is_as_it_was_adopted(data: Storage, tmp_path: Path) -> None:
    row, whole = rows(data)[10], data.read(SHARD)
    for cut in (row["offset"], row["image_offset"] + 9):
        adopted = Storage(str(tmp_path / f"cut-{cut}"))
        adopted.write("0.tar", whole[:cut])
        record = adopt_tar("0.tar", "train", adopted, Options(columns=("n",))).record
        assert record is not None and record.samples == 10
        manifest = Manifest(
            hash=dataset_hash([record]), config="", source="", classes=[], splits={"train": 10}, bytes=cut, read=10, written=10,
            ignored=0, dropped={}, dropped_samples=[],
        )  # fmt: skip
        publish(adopted, [record], manifest)
        assert told(adopted) == []
        flip(adopted, rows(adopted, "0.index.parquet")[6]["json_offset"] + 5, "0.tar")
        sha, end, sample = told(adopted)
        assert (sha[2], sample[1]) == (SHA[2], rows(data)[6]["key"])
        assert ("no end-of-archive marker" if cut == row["offset"] else "cut off") in end[2]


def test_the_command_ends_with_3_where_something_is_wrong(data: Storage) -> None:
    done = CliRunner().invoke(main, ["verify", data.path])
    assert done.exit_code == 0 and done.stdout.startswith("sound: 75 samples in 5 shards, ")
    data.remove(SHARD)
    done = CliRunner().invoke(main, ["verify", data.path, "--split", "train"])
    assert done.exit_code == 3 and done.stdout == f"{SHARD}: it is missing\n"
    assert done.stderr.splitlines()[-1] == f"error: data {data.path}: 1 problem in 3 shards"
    assert str(Problem("a.tar", "k", "is damaged")) == "a.tar: sample k: is damaged"
    assert CliRunner().invoke(main, ["verify", data.path, "--split", "val"]).exit_code == 3
    assert CliRunner().invoke(main, ["verify", data.path, "--spilt", "val"]).exit_code == 2
