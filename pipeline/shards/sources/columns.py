"""What the columns of people's tables mean: ours by name, and everything else kept as JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import date, timedelta
from datetime import time as datetime_time
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

from pipeline.core.errors import DataError, choose

# Names in LAION (URL, TEXT), COYO and DataComp (url, text), CC12M and Hugging Face's datasets; the first that is there is taken.
KNOWN: dict[str, tuple[str, ...]] = {
    "url": ("url", "URL", "image_url", "imageurl", "img_url"),
    "image": ("image", "img", "jpg", "png", "webp", "image_bytes", "picture"),
    "caption": ("caption", "text", "TEXT", "CAPTION", "alt_text", "txt"),
    "label": ("label", "fine_label", "labels", "cls"),
    "key": (),
}
_NEEDED = {"urls": "url", "table": "image"}


def choose_columns(kind: str, given: dict[str, str], there: Sequence[str], name: str) -> dict[str, str]:
    """Our names to those of the table `name`, which has the columns `there`, for a source of format `kind`.

    Raises:
        ConfigError: `shard.source.columns` has a name that is none of ours. DataError: a column is missing.
    """
    other = "image" if kind == "urls" else "url"
    for ours, theirs in given.items():
        choose("shard.source.columns", ours, [n for n in KNOWN if n != other])
        if theirs not in there:
            raise DataError(f"shard.source.columns.{ours}: {name} has no column {theirs!r} (there: {', '.join(there)})")
    found = {ours: next((n for n in names if n in there), None) for ours, names in KNOWN.items() if ours != other}
    chosen = {ours: theirs for ours, theirs in {**found, **given}.items() if theirs is not None}
    needed = _NEEDED[kind]
    if needed not in chosen:
        raise DataError(
            f"shard.source.url: {name} has no column for the {needed} (looked for {', '.join(KNOWN[needed])}; there: {', '.join(there)}); "
            f"shard.source.columns: {{{needed}: ..}} names it"
        )
    return chosen


def check_text(ours: str, column: str, kind: pa.DataType, name: str) -> None:
    """Raises DataError where the column of a table, which is our `ours`, can hold no text."""
    told = kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)  # null: nothing but gaps
    if not any(test(kind) for test in is_text):
        raise DataError(
            f"shard.source.url: {name}: its column {column!r} holds {told}, not text; shard.source.columns: {{{ours}: ..}} names another"
        )


def plain(value: Any) -> Any:
    """A value of a table's column as JSON has it: numbers that are not finite become null, times ISO 8601, bytes base64.

    Raises ValueError for a kind that is none of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | datetime_time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    raise ValueError(f"a {type(value).__name__} has no form in JSON")


def take_known(row: dict[str, Any], chosen: dict[str, str]) -> tuple[Any, Any, Any]:
    """(caption, label, key) of a row, None where there is no such column; a column may have an empty name, as that of row numbers has in
    tables which pandas wrote. Caption and label are taken out of the row, but a label that is none, such as a list of tags, stays."""
    caption, label = (row.pop(chosen[ours], None) if ours in chosen else None for ours in ("caption", "label"))
    if isinstance(label, list | dict | bytes):
        row[chosen["label"]], label = label, None
    return caption, label, row.get(chosen["key"]) if "key" in chosen else None


def as_label(value: Any) -> tuple[str | None, int | None]:
    """(class name, number) of a label: one of them, or neither. Hugging Face writes -1 where there is none, and pandas 3.0 for 3 where
    other rows have none."""
    if isinstance(value, str) and value:
        return value, None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return None, value
    return None, None
