"""Parquet tables that hold the images themselves, such as Hugging Face's datasets.

A row cannot be read alone: its bytes lie in a row group, a hundred rows or more, that is read as a whole. So what is shuffled across the
collection is the row group; within a shard the rows of its groups are mixed one by one. Each split reads the groups that hold rows of it,
which for a collection of many small splits is almost all of them once a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.shard import Fetch
from pipeline.core.errors import DataError
from pipeline.shards.dropped import Dropped
from pipeline.shards.sources.base import Files, Ignored, Item, Lost, Part
from pipeline.shards.sources.columns import as_label, plain, take_known
from pipeline.shards.sources.files import as_rows, explained, open_parquet
from pipeline.shards.sources.urls import TableFiles

_ROWS = 1024  # without images, held as Python objects
_IMAGES = 16  # read at once


class TableSource(TableFiles):
    """Rows with an image (bytes, or Hugging Face's struct of bytes and path), perhaps a caption, a label and anything else."""

    format = "table"
    kinds = ("parquet",)
    in_blocks = True

    def check_schema(self, name: str, file: pq.ParquetFile) -> dict[str, str]:
        chosen = super().check_schema(name, file)
        kind = file.schema_arrow.field(chosen["image"]).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
            raise DataError(f"shard.source.url: {name}: its column {chosen['image']!r} holds {kind}, not the bytes of images")
        return chosen

    def classes(self) -> list[str]:
        """The names that a dataset of Hugging Face declares for its labels."""
        part = self.parts()[0]
        with open_parquet(self.storage, part.name, part.bytes) as file:
            label = self.check_schema(part.name, file).get("label")
            try:
                features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
                names = features[label]["names"]
            except (ValueError, KeyError, TypeError):
                return []
        return [str(n) for n in names] if isinstance(names, list) else []

    def mean_bytes(self) -> float:
        parts = self.parts()
        return sum(p.bytes for p in parts) / max(1, sum(p.rows or 0 for p in parts))

    def rows(self, part: Part) -> Iterator[Item | Lost | Ignored]:
        with explained(part.name), open_parquet(self.storage, part.name, part.bytes) as file:
            chosen = self.check_schema(part.name, file)
            image = chosen["image"]
            wanted = [n for n in file.schema_arrow.names if n != image]
            number = 0
            for group in range(file.metadata.num_row_groups):
                size, row = _mean_bytes(file.metadata.row_group(group), image), 0
                for values in _rows(file, group, wanted, _ROWS):
                    yield self._item(f"{part.name}#{number}", size, (part.name, group, row, part.bytes), values, chosen)
                    number, row = number + 1, row + 1
        self.check_rows(part, number)

    @staticmethod
    def _item(path: str, size: int, place: tuple[str | int, ...], values: dict[str, Any], chosen: dict[str, str]) -> Item:
        caption, label, key = take_known(values, chosen)
        class_name, class_id = as_label(label)
        return Item(
            path,
            size,
            class_name,
            text=caption if isinstance(caption, str) else None,
            label=class_id,
            extra={k: kept for k, v in values.items() if (kept := plain(v)) is not None},
            key=None if key is None else str(key),
            place=place,
        )

    def order(self, item: Item, key_order: int) -> int:
        """The row group first: 32 bits of a hash of it, and 32 of the key's."""
        part, group, *_ = item.place
        block = hashlib.sha256(f"{part}#{group}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(block[:4], "big") << 32 | key_order >> 32

    def fetch(self, items: Sequence[Item], settings: Fetch, max_bytes: int, share: int) -> Iterator[tuple[int, Files | Dropped]]:
        wanted: dict[tuple[str | int, ...], dict[int, int]] = {}  # by file, its size and row group: row -> place in `items`
        for index, item in enumerate(items):
            name, group, row, size = item.place
            wanted.setdefault((name, size, group), {})[int(row)] = index
        for (name, size, group), rows in sorted(wanted.items()):
            yield from self._read(str(name), int(size), int(group), rows)

    def _read(self, name: str, size: int, group: int, rows: dict[int, int]) -> Iterator[tuple[int, Files | Dropped]]:
        if (now := self._size(name)) != size:  # another image may be in each row
            gone = Dropped("unreadable", f"{name} changed after it was listed: {size:,} bytes then, {now:,} now")
            yield from ((index, gone) for index in rows.values())
            return
        left, last = dict(rows), max(rows)
        with explained(name), open_parquet(self.storage, name, size) as file:
            image = self.check_schema(name, file)["image"]
            if group < file.metadata.num_row_groups:
                first = 0
                for batch in file.iter_batches(_IMAGES, row_groups=[group], columns=[image], use_threads=False):
                    for row in range(first, first + len(batch)):
                        if (index := left.pop(row, None)) is not None:
                            yield index, _files(batch.column(0)[row - first].as_py())
                    first += len(batch)
                    if first > last:
                        break
        for row, index in left.items():
            yield index, Dropped("unreadable", f"{name} has no row {row} in row group {group} any more")

    def _size(self, name: str) -> int:
        try:
            return self.storage.head(name).size
        except FileNotFoundError:
            raise DataError(f"shard.source.url: {name} vanished after it was listed") from None


def _files(value: Any) -> Files | Dropped:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        path = f"; it names a file, {value['path']}, which is not read" if isinstance(value, dict) and value.get("path") else ""
        return Dropped("no-image", f"the row has no image{path}")
    return Files(data, {})


def _rows(file: pq.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        yield from as_rows(batch)


def _mean_bytes(group: pq.RowGroupMetaData, image: str) -> int:
    """Of an image of a row group."""
    columns = (group.column(n) for n in range(group.num_columns))
    total = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image)
    return -(-total // max(1, group.num_rows))
