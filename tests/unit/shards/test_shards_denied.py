from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.denied import Contaminated, Denied, list_denied


def keys(count: int, group: int = 1 << 20) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [f"{n:020x}" for n in range(count)]}), sink, row_group_size=group)
    return sink.getvalue()


def test_lists_are_counted_by_name(store: Storage) -> None:
    assert list_denied(store, 1) == ([], [])
    store.write("deny/takedown.parquet", keys(3))
    store.write("deny/duplicates.parquet", keys(70_000))  # longer than what is read of it first
    store.write("deny/empty.parquet", keys(0))
    store.write("deny/notes.txt", b"not a list")
    assert list_denied(store, 1) == ([Denied("duplicates", 70_000), Denied("empty", 0), Denied("takedown", 3)], [])


def test_a_footer_longer_than_the_first_request(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    data = keys(6_000, group=2)
    assert int.from_bytes(data[-8:-4], "little") > 1 << 18, "the footer alone is longer"
    directory.write("deny/many.parquet", data)
    assert list_denied(directory, 1)[0] == [Denied("many", 6_000)]


def test_what_is_no_list_is_named(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    directory.write("deny/takedown.parquet", b"key\n1\n")
    with pytest.raises(DataError, match=r"^data .*/deny/takedown.parquet: cannot be read"):
        list_denied(directory, 1)


AUDIT = {
    "dataset": "hash",
    "denied": {"train": {"exact": 7, "near": 1}, "test": {"exact": 1, "near": 0}},
    "sets": [
        {
            "url": "s3://me:secret@lab/imagenet", "split": None, "near": 4, "dataset": "theirs",
            "images": {"val": {"images": 50, "exact": 2, "near": 1}, "test": {"images": 10, "exact": 0, "near": 0}},
            "denied": {"train": {"exact": 3, "near": 1}, "test": {"exact": 1, "near": 0}},
        },
        {
            "url": "/cifar", "split": "test", "near": None, "dataset": "theirs", "images": {"test": {"images": 10, "exact": 7, "near": 0}},
            "denied": {"train": {"exact": 7, "near": 0}, "test": {"exact": 0, "near": 0}},
        },
    ],
}  # fmt: skip


def test_audits_say_how_many_are_equal_and_near(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    directory.write("deny/contamination.parquet", keys(12))
    directory.write("contamination.json", json.dumps(AUDIT).encode())
    directory.write("deny/duplicates.parquet", keys(5))
    counts = {"dataset": "hash", "near": 3, "images": 99, "denied": {"train": {"exact": 4, "near": 1}}}
    directory.write("duplicates.json", json.dumps(counts).encode())
    lists, sets = list_denied(directory, 1)
    assert lists == [Denied("contamination", 12, 8, 1), Denied("duplicates", 5, 4, 1)]
    assert sets == [
        Contaminated("s3://***@lab/imagenet", "val", 4, 50, 2, 1, 5),
        Contaminated("s3://***@lab/imagenet", "test", 4, 10, 0, 0, 5),
        Contaminated("/cifar", "test", None, 10, 7, 0, 7),
    ]


def test_each_version_has_its_own(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    directory.write("deny/contamination.parquet", keys(12))
    directory.write("contamination.json", json.dumps(AUDIT).encode())
    directory.write("deny/contamination-v3.parquet", keys(2))
    directory.write("contamination-v3.json", json.dumps(AUDIT | {"dataset": "grown", "sets": AUDIT["sets"][1:]}).encode())
    assert [one.name for one in list_denied(directory, 2)[0]] == ["contamination"] and len(list_denied(directory, 2)[1]) == 3
    assert list_denied(directory, 3)[0] == [Denied("contamination-v3", 2, 8, 1)] and len(list_denied(directory, 3)[1]) == 1


@pytest.mark.parametrize("damaged", [b"{", b"[1]", b'{"sets": [{}]}', b'{"sets": [{"denied": {"train": {}}}]}'])
def test_a_damaged_audit_is_named(tmp_path: object, damaged: bytes) -> None:
    directory = Storage(str(tmp_path))
    directory.write("deny/contamination.parquet", keys(1))
    directory.write("contamination.json", damaged)
    with pytest.raises(DataError, match=r"^data .*/contamination.json: this is (not JSON|no audit of contamination) "):
        list_denied(directory, 1)
