"""What the deny-lists of a dataset leave out, without reading them: a list may name a thousand million keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.core.tracking import redact
from pipeline.shards.deny import count_keys, own_lists

_TAIL = 1 << 18  # bytes; most footers are smaller
_AUDITED = ("duplicates", "contamination")  # lists whose makers keep counts beside the manifest
_VERSION = re.compile(r"-v\d+$")


@dataclass(frozen=True)
class Denied:
    """The list `name` leaves out `samples`, each counted once; other lists may leave them out too. `exact` and `near` say how many of these
    are equal files and near pictures, where its maker counted."""

    name: str
    samples: int
    exact: int | None = None
    near: int | None = None


@dataclass(frozen=True)
class Contaminated:
    """An evaluation set, or one split of it: of its `images`, `exact` are in the dataset as equal files, and `near` as near pictures.
    `bits`: in which perceptual hashes of near ones differ at most, None where they were not compared. `denied`: samples of the dataset
    that go because of the set, whichever split of it they are in."""

    url: str
    split: str
    bits: int | None
    images: int
    exact: int
    near: int
    denied: int


def list_denied(directory: Storage, version: int) -> tuple[list[Denied], list[Contaminated]]:
    """The lists that hold for a version of the dataset at `directory`, by name; and what the audit of its contamination says.

    Raises:
        DataError: a list is no Parquet, or an audit is damaged.
    """
    lists, sets = list[Denied](), list[Contaminated]()
    for path in own_lists(directory, version):
        name = path.rpartition("/")[2].removesuffix(".parquet")
        kind, samples = _VERSION.sub("", name), _keys(directory, path)
        audit = _audit(directory, f"{name}.json") if kind in _AUDITED else None
        try:
            lists.append(Denied(name, samples, *(_both(audit) if audit else ())))
            sets += _contaminated(audit) if audit and kind == "contamination" else []
        except (KeyError, TypeError, AttributeError) as e:
            raise DataError(f"data {directory.url}/{name}.json: this is no audit of {kind} ({e!r})") from e
    return lists, sets


def _audit(directory: Storage, file: str) -> dict[str, Any] | None:
    try:
        return json.loads(directory.read(file))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise DataError(f"data {directory.url}/{file}: this is not JSON ({e})") from e


def _both(audit: Mapping[str, Any]) -> tuple[int, int]:
    """(equal files, near pictures)."""
    denied = audit["denied"].values()
    return sum(counts["exact"] for counts in denied), sum(counts["near"] for counts in denied)


def _contaminated(audit: Mapping[str, Any]) -> list[Contaminated]:
    rows = list[Contaminated]()
    for one in audit["sets"]:
        gone = sum(counts["exact"] + counts["near"] for counts in one["denied"].values())
        for split, found in one["images"].items():
            rows.append(Contaminated(redact(one["url"]), split, one["near"], found["images"], found["exact"], found["near"], gone))
    return rows


def _keys(directory: Storage, key: str) -> int:
    """From the footer, which stands at the end of the file."""
    where = f"data {directory.url}/{key}"
    try:
        size = directory.head(key).size
        for start in dict.fromkeys((max(0, size - _TAIL), 0)):
            tail = retrying(where, lambda start=start: directory.read_range(key, start, size))  # type: ignore[misc]
            try:
                return count_keys(pq.read_metadata(pa.BufferReader(tail)))
            except pa.ArrowException:
                if start == 0:
                    raise
    except FileNotFoundError:
        raise DataError(f"{where}: it vanished after it was listed") from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{where}: cannot be read ({e})") from e
    raise AssertionError("the whole file was tried")
