"""Tables of URLs and captions, as LAION, COYO, DataComp and others publish them: thousands of part files, one row an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.shard import Fetch
from pipeline.core.errors import DataError
from pipeline.shards.dropped import Dropped
from pipeline.shards.sources.base import Files, Ignored, Item, Lost, Part, Source, Survey, stamp_of
from pipeline.shards.sources.columns import as_label, check_text, choose_columns, plain, take_known
from pipeline.shards.sources.files import (
    TABLES,
    BadRow,
    as_number,
    column_names,
    each,
    explained,
    find_files,
    is_packed,
    kind_of,
    open_parquet,
    table_rows,
)

_LINES = ("jsonl", "ndjson")
_SAMPLED = 1000  # rows by which the length of a CSV is estimated
_PACKED = 4  # times as many bytes has a compressed one when it is unpacked, about; with too few rows expected, tasks would get too many


class TableFiles(Source):
    """What all sources have in common that lie in table files; a part is a file."""

    format = ""
    kinds: Sequence[str] = TABLES

    def __init__(self, url: str, columns: dict[str, str], endpoint: str | None = None) -> None:
        super().__init__(url, endpoint)
        self.columns = columns
        self._parts: list[Part] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def check(self) -> None:
        self.parts()

    def parts(self) -> list[Part]:
        """Of Parquet every footer is read, so that broken files and missing columns are known before anything starts."""
        if self._parts is None:
            self.storage, files = find_files(self.url, self.kinds, "tables", self.storage.endpoint)
            parts = each(lambda file: self._part(*file), files)
            any(self.chosen(p) for p in parts if p.rows is None)  # raises for the first that has rows
            self._parts = parts
        return self._parts

    def _part(self, name: str, size: int) -> Part:
        if kind_of(name) != "parquet":
            return Part(name, size, None if size else 0)  # writers leave empty files of tasks that had no rows
        with open_parquet(self.storage, name, size) as file:
            self.check_schema(name, file)
            return Part(name, size, file.metadata.num_rows)

    def check_schema(self, name: str, file: pq.ParquetFile) -> dict[str, str]:
        """Our names to theirs. Raises DataError where a column is missing or of a type that it cannot have."""
        names = file.schema_arrow.names
        chosen = choose_columns(self.format, self.columns, names, name)
        for ours in ("url", "caption"):
            if ours in chosen:
                check_text(ours, chosen[ours], file.schema_arrow.field(names.index(chosen[ours])).type, name)
        return chosen

    def chosen(self, part: Part) -> dict[str, str]:
        """Our names to theirs, none where a file of JSON lines has no rows. Raises DataError where a column is missing."""
        names = column_names(self.storage, part.name, part.bytes)
        if not names and kind_of(part.name) in _LINES:
            return {}
        return choose_columns(self.format, self.columns, names, part.name)

    def survey(self) -> Survey:
        parts = self.parts()
        known = [p.rows for p in parts if p.rows is not None]
        rows = sum(known)
        unknown = [p for p in parts if p.rows is None]
        if unknown:
            # By the bytes that the first rows take as JSON, which is what they take in a table without compression, about.
            sample = next(filter(None, map(self._first, unknown)), [])
            whole = len(sample) < _SAMPLED and len(unknown) == 1
            length = sum(len(str(v)) + 1 for row in sample for v in (row.values() if isinstance(row, dict) else ())) or 1
            rows += len(sample) if whole or not sample else round(sum(map(_bytes, unknown)) / max(1, length / max(1, len(sample))))
            return Survey(rows, len(parts), self.mean_bytes(), len(self.classes()), whole, stamp_of(parts))
        return Survey(rows, len(parts), self.mean_bytes(), len(self.classes()), True, stamp_of(parts))

    def _first(self, part: Part) -> list[dict[str, Any] | BadRow]:
        with explained(part.name):
            return list(islice(table_rows(self.storage, part.name, part.bytes), _SAMPLED))

    def mean_bytes(self) -> float:
        return 0.0

    def check_rows(self, part: Part, seen: int) -> None:
        if part.rows is not None and seen != part.rows:
            raise DataError(
                f"shard.source.url: {part.name} changed while it was read: {part.rows:,} rows when it was listed, {seen:,} now; "
                "run the same command again"
            )


def _bytes(part: Part) -> int:
    return part.bytes * (_PACKED if is_packed(part.name) else 1)


class UrlSource(TableFiles):
    """Rows with a URL, perhaps a caption, a label and anything else, which the sample's json keeps."""

    format = "urls"
    has_sizes = False

    def rows(self, part: Part) -> Iterator[Item | Lost | Ignored]:
        chosen = {} if part.rows == 0 else self.chosen(part)
        if not chosen:
            return
        if kind_of(part.name) in _LINES:  # its first row may lack what others have
            chosen = {**{ours: ours for ours in ("caption", "label")}, **chosen}
        is_text = kind_of(part.name) in ("csv", "tsv")
        number = -1
        for number, row in enumerate(table_rows(self.storage, part.name, part.bytes)):
            where = f"{part.name}#{number}"
            if isinstance(row, BadRow):
                yield Lost(where, "bad-row", f"row {number} of {part.name} {row.detail}")
                continue
            url = row.pop(chosen["url"], None)
            if not isinstance(url, str) or not url.strip():
                yield Lost(where, "no-url", f"row {number} of {part.name} has no URL")
                continue
            caption, label, key = take_known(row, chosen)
            if "key" in chosen and key is None:  # keys of two kinds in one dataset, and takedowns by URL would miss some
                yield Lost(where, "no-key", f"row {number} of {part.name} has nothing in its column {chosen['key']!r}")
                continue
            if not isinstance(caption, str | None):
                yield Lost(
                    where, "bad-txt", f"row {number} of {part.name}: its {chosen['caption']} is of type {type(caption).__name__}, not text"
                )
                continue
            class_name, class_id = as_label(as_number(label) if is_text else label)
            yield Item(
                url.strip(),
                0,
                class_name,
                text=caption,
                label=class_id,
                extra={k: kept for k, v in row.items() if (kept := plain(as_number(v) if is_text else v)) is not None},
                key=None if key is None else str(key),
            )
        self.check_rows(part, number + 1)

    def fetch(self, items: Sequence[Item], settings: Fetch, max_bytes: int, share: int) -> Iterator[tuple[int, Files | Dropped]]:
        from pipeline.shards.fetch import fetcher_of  # its client is of no use to other sources

        with closing(fetcher_of(settings, max_bytes, share).fetch([item.path for item in items])) as results:
            for index, fetched in results:
                yield index, fetched if isinstance(fetched, Dropped) else Files(fetched.data, {})
