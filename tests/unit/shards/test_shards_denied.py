from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.denied import DenyList, list_denied


def keys(count: int, group: int = 1 << 20) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [f"{n:020x}" for n in range(count)]}), sink, row_group_size=group)
    return sink.getvalue()


def test_lists_are_counted_by_name(store: Storage) -> None:
    assert list_denied(store) == []
    store.write("deny/takedown.parquet", keys(3))
    store.write("deny/duplicates.parquet", keys(70_000))  # longer than what is read of it first
    store.write("deny/empty.parquet", keys(0))
    store.write("deny/notes.txt", b"not a list")
    assert list_denied(store) == [DenyList("duplicates", 70_000), DenyList("empty", 0), DenyList("takedown", 3)]


def test_a_footer_longer_than_the_first_request(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    data = keys(6_000, group=2)
    assert int.from_bytes(data[-8:-4], "little") > 1 << 18, "the footer alone is longer"
    directory.write("deny/many.parquet", data)
    assert list_denied(directory) == [DenyList("many", 6_000)]


def test_what_is_no_list_is_named(tmp_path: object) -> None:
    directory = Storage(str(tmp_path))
    directory.write("deny/takedown.parquet", b"key\n1\n")
    with pytest.raises(DataError, match=r"^data .*/deny/takedown.parquet: cannot be read"):
        list_denied(directory)
