"""Samples that their source has denied since they were written: the deny-list `source` of what was made of it.

A source of tars leaves out what deny-lists beside them name. A list that comes later changes the source's stamp, so the next run of the
same command lists it again. What it denies by then, and an earlier version has written, is withdrawn: named by `deny/source.parquet`, which
holds for all versions, as a takedown does. That list is made anew each time, so what the source denies no more comes back. A run that has
trained keeps its data as they were.

<plan>/withdrawn/<group>.parquet    keys of one range of rows
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.deny import DenyListWriter, list_name
from pipeline.shards.dropped import DENIED

LIST = "source"
_PLACE = "withdrawn"


def is_denied(lost: pa.ChunkedArray) -> pa.ChunkedArray:
    """Of the reasons why rows are lost, which say so: bool (rows,)."""
    return pc.fill_null(pc.equal(lost, DENIED), False)


def keep_withdrawn(place: Storage, group: int, keys: pa.ChunkedArray) -> None:
    """Write down the keys of rows that are denied now and that an earlier version has, for `withdraw`."""
    if len(keys):
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": keys}), sink, compression="zstd")
        place.write(f"{_PLACE}/{group:05d}.parquet", sink.getvalue())


def withdraw(directory: Storage, place: Storage) -> None:
    """Publish the list of the dataset at `directory`, by the plan at `place`; where there is nothing to withdraw, there is none."""
    names = place.names(_PLACE)
    if not names:
        directory.remove(list_name(LIST))
        return
    with DenyListWriter(directory, LIST, {}) as out:
        for name in names:
            out.add(pq.read_table(io.BytesIO(place.read(f"{_PLACE}/{name}"))))
        say(f"shard        {out.publish({}):,} samples are withdrawn: the source has denied them since")
