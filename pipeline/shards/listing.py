"""The first pass over the rows of a source: each part of it is read once, and its rows are written by ranges of a hash of their keys."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.core.storage import Storage
from pipeline.shards.division import PARTS_BIT, ROW_BYTES, Division
from pipeline.shards.layout import key_order, planned_bytes, sample_key
from pipeline.shards.shuffle import ROWS, Rule
from pipeline.shards.sources.base import Ignored, Item, Lost, Part, Source
from pipeline.shards.spill import SpillWriter

_CHUNK_BYTES = 1 << 26  # of rows, that a task gathers as Python's objects


def list_rows(name: str, first: int, parts: list[Part], source: Source, rule: Rule, division: Division, place: Storage) -> dict[str, Any]:
    """Write the rows of some parts, of which `first` is the number of the first one, to files of their own (the body of a Ray task).
    Returns `spills`, (name, bytes of its rows) of each file, and `marks` for `source_bounds`."""
    ignored, classes, marks = 0, set[str](), list[list[int]]()
    gathered = _Gathered(name, rule, division, place)
    for number, part in enumerate(parts, first):
        count = 0
        for row in source.rows(part):
            if isinstance(row, Ignored):
                ignored += row.count
                continue
            position = number << PARTS_BIT | count
            count += 1
            if isinstance(row, Item) and row.class_name is not None:
                classes.add(row.class_name)
            gathered.add(row, position, source)
            if gathered.is_full:
                marks.append([number, count, gathered.new_bytes()])
                gathered.compress()
        if [number, count] != (marks[-1][:2] if marks else []):
            marks.append([number, count, gathered.new_bytes()])
    return {"marks": marks, "ignored": ignored, "classes": sorted(classes), "spills": gathered.finish()}


class _Gathered:
    """Rows as Python's objects, up to `Rule.chunk` of them; then compressed, up to `Rule.spill` bytes; then in files."""

    def __init__(self, name: str, rule: Rule, division: Division, place: Storage) -> None:
        self._name, self._rule, self._division, self._place = name, rule, division, place
        self._columns: dict[str, list[Any]] = {name: [] for name in ROWS.names}
        self._file, self._spills = SpillWriter(division.pieces), list[tuple[str, int]]()
        self._gathered = self._compressed = self._new = 0  # bytes of rows

    def add(self, row: Item | Lost, position: int, source: Source) -> None:
        if isinstance(row, Lost):
            item, lost = Item(row.path, 0, extra={"detail": row.detail}), row.reason
        else:
            item, lost = row, None
        key = sample_key(item.identity)
        hashed = key_order(key)
        order = position if not self._rule.shuffle else source.order(item, hashed) if lost is None else hashed
        text = item.encode()
        for name, value in zip(ROWS.names, (hashed, order, position, key, planned_bytes(item), lost, text), strict=True):
            self._columns[name].append(value)
        self._gathered += len(text) + ROW_BYTES
        self._new += len(text) + ROW_BYTES

    @property
    def is_full(self) -> bool:
        return len(self._columns["key"]) >= self._rule.chunk or self._gathered >= _CHUNK_BYTES

    def new_bytes(self) -> int:
        """Of the rows since it was asked before."""
        size, self._new = self._new, 0
        return size

    def compress(self) -> None:
        table = pa.table([self._columns[n] for n in ROWS.names], schema=ROWS)
        self._columns = {name: [] for name in ROWS.names}
        self._compressed, self._gathered = self._compressed + self._gathered, 0
        self._file.add(table, self._division.of(table) // self._division.width)
        if self._compressed >= self._rule.spill:
            self._publish()

    def finish(self) -> list[tuple[str, int]]:
        if self._gathered:
            self.compress()
        if self._compressed:
            self._publish()
        return self._spills

    def _publish(self) -> None:
        name = f"listed/{self._name}-{len(self._spills)}"
        self._file.write(self._place, name)
        self._spills.append((name, self._compressed))
        self._file, self._compressed = SpillWriter(self._division.pieces), 0
