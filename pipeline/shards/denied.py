"""The deny-lists of a dataset, `deny/<name>.parquet`: what there is, without reading them. A list may name a thousand million keys."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage

FOLDER = "deny"
_SUFFIX = ".parquet"
_TAIL = 1 << 18  # bytes; most footers are smaller


@dataclass(frozen=True)
class DenyList:
    """`samples` that the list `name` leaves out; others may leave them out too."""

    name: str
    samples: int


def list_denied(directory: Storage) -> list[DenyList]:
    """Of the dataset at `directory`, by name.

    Raises:
        DataError: one of them is no Parquet.
    """
    names = [name for name in (directory / FOLDER).names() if name.endswith(_SUFFIX)]
    return [DenyList(name.removesuffix(_SUFFIX), _rows(directory, f"{FOLDER}/{name}")) for name in names]


def _rows(directory: Storage, key: str) -> int:
    """From the footer, which stands at the end of the file."""
    where = f"data {directory.url}/{key}"
    try:
        size = directory.head(key).size
        for start in dict.fromkeys((max(0, size - _TAIL), 0)):
            tail = retrying(where, lambda start=start: directory.read_range(key, start, size))  # type: ignore[misc]
            try:
                return pq.read_metadata(pa.BufferReader(tail)).num_rows
            except pa.ArrowException:
                if start == 0:
                    raise
    except FileNotFoundError:
        raise DataError(f"{where}: it vanished after it was listed") from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{where}: cannot be read ({e})") from e
    raise AssertionError("the whole file was tried")
