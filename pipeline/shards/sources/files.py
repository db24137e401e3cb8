"""Tables as files: which there are, and their rows, whatever they are written in (Parquet, CSV, JSON lines)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.core.errors import CredentialsError, DataError, InfrastructureError, StorageError, UserError
from pipeline.core.storage import Storage
from pipeline.shards.ranges import Ranges

T = TypeVar("T")
U = TypeVar("U")

TABLES = ("parquet", "csv", "tsv", "jsonl", "ndjson")
_COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}
_BUFFER = 1 << 22  # bytes asked of a store at once
_ROWS, _BATCH = 4096, 1 << 26  # of Parquet that are read at once: rows, and their bytes as the footer has them
_HELD = 1 << 22  # bytes of these that are Python objects
_BLOCK = 1 << 22  # bytes of CSV, of which a row needs to be shorter
_LINE = 1 << 26  # bytes of JSON, of which a line needs to be shorter
_OPENED = 16  # footers read at once
_NAMED = 20  # broken files that one sentence names
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class BadRow:
    """A row that has not the form of the others."""

    detail: str


def find_files(url: str, suffixes: Sequence[str], what: str, endpoint: str | None) -> tuple[Storage, list[tuple[str, int]]]:
    """(the directory, sorted (relative path, bytes) in it) of the files that `url` names: one, a folder's, or those of a pattern.

    Raises:
        DataError: there are none. StorageError, CredentialsError: they cannot be listed.
    """
    try:
        directory, found = _find(url, suffixes, endpoint)
    except (StorageError, CredentialsError) as e:
        raise type(e)(f"shard.source.url: {e}") from e
    if not found:
        kinds = ", ".join(f"*.{s}" for s in suffixes)
        raise DataError(f"shard.source.url: there are no {what} at {url} (a file, a folder or a pattern of {kinds})")
    return directory, sorted(found)


def _find(url: str, suffixes: Sequence[str], endpoint: str | None) -> tuple[Storage, list[tuple[str, int]]]:
    wild = re.search(r"[*?\[]", url) if not url.startswith(("http://", "https://")) else None
    if wild is not None:
        base, slash, _ = url[: wild.start()].rpartition("/")
        directory = Storage(base or slash or ".", endpoint)
        return directory, [(p, s) for p, s in directory.walk(url[len(base + slash) :]) if kind_of(p) in suffixes]
    whole, (head, _, tail) = Storage(url, endpoint), url.rpartition("/")
    if kind_of(tail) in suffixes and not whole.fs.isdir(whole.path):
        size = _size(whole)
        return Storage(head or ".", endpoint), [] if size is None else [(tail, size)]
    return whole, [(p, s) for p, s in whole.walk() if kind_of(p) in suffixes and not any(w[:1] in "._" for w in p.split("/"))]


def _size(whole: Storage) -> int | None:
    try:
        return whole.head("").size
    except FileNotFoundError:
        return None


def kind_of(name: str) -> str:
    """The suffix, less that of a compression: `csv` of `a.csv.gz`."""
    words = name.partition("?")[0].rpartition("/")[2].lower().split(".")
    if words[-1] in _COMPRESSIONS:
        words.pop()
    return words[-1] if len(words) > 1 else ""


def is_packed(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _COMPRESSIONS


def each(action: Callable[[T], U], files: Sequence[T]) -> list[U]:
    """The result of `action` for each file, several at once.

    Raises:
        DataError: naming all files for which it failed.
    """
    failed: list[str] = []
    if len(files) == 1:
        return [action(files[0])]

    def tried(file: T) -> U | None:
        try:
            return action(file)
        except DataError as e:
            failed.append(str(e).removeprefix("shard.source.url: "))
            return None

    with ThreadPoolExecutor(_OPENED) as pool:
        results = list(pool.map(tried, files))
    if failed:
        failed.sort()
        more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise DataError(f"shard.source.url: {len(failed)} of {len(files)} tables cannot be used: {'; '.join(failed[:_NAMED])}{more}")
    return [r for r in results if r is not None]


def open_parquet(directory: Storage, name: str, size: int) -> pq.ParquetFile:
    """A Parquet file, read a buffer at a time. On a store it has `size` bytes. Raises DataError where it is none."""
    with explained(name):
        if directory.is_local:
            return pq.ParquetFile(f"{directory.path}/{name}", buffer_size=_BUFFER)
        return pq.ParquetFile(io.BufferedReader(Ranges(directory, name, size), _BUFFER), buffer_size=_BUFFER)


def table_rows(directory: Storage, name: str, size: int) -> Iterator[dict[str, Any] | BadRow]:
    """A table's rows in order, by column name.

    Raises:
        DataError: the file is damaged, or has another form than its suffix says.
    """
    kind = kind_of(name)
    with explained(name):
        if kind == "parquet":
            with open_parquet(directory, name, size) as file:
                held = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
                most = max(1, min(_ROWS, _BATCH * file.metadata.num_rows // max(1, held)))
                for batch in file.iter_batches(most, use_threads=False):
                    yield from as_rows(batch)
        elif kind in ("csv", "tsv"):
            yield from _read_csv(directory, name, size, "\t" if kind == "tsv" else ",")
        else:
            yield from _read_jsonl(directory, name, size)


def as_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch, few at a time where they are long."""
    most = max(1, len(batch) * _HELD // max(1, batch.nbytes))
    for start in range(0, len(batch), most):
        yield from batch.slice(start, most).to_pylist()


def column_names(directory: Storage, name: str, size: int) -> list[str]:
    """Of JSON lines those of the first line. Raises as `table_rows`."""
    kind = kind_of(name)
    with explained(name):
        if kind == "parquet":
            with open_parquet(directory, name, size) as file:
                return file.schema_arrow.names
        if kind in ("csv", "tsv"):
            return _csv_columns(directory, name, size, "\t" if kind == "tsv" else ",")
        first = next((row for row in _read_jsonl(directory, name, size) if isinstance(row, dict)), {})
        return list(first)


def _stream(directory: Storage, name: str, size: int) -> pa.NativeFile:
    compression = _COMPRESSIONS.get(name.rpartition(".")[2].lower())
    if directory.is_local:
        return pa.input_stream(f"{directory.path}/{name}", compression=compression, buffer_size=_BUFFER)
    file = pa.PythonFile(io.BufferedReader(Ranges(directory, name, size), _BUFFER), mode="r")
    return pa.CompressedInputStream(file, compression) if compression else file


def _csv_columns(directory: Storage, name: str, size: int, delimiter: str) -> list[str]:
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    with (
        _stream(directory, name, size) as stream,
        pa.csv.open_csv(stream, pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK), parse) as reader,
    ):
        return reader.schema.names


def _read_csv(directory: Storage, name: str, size: int, delimiter: str) -> Iterator[dict[str, Any] | BadRow]:
    """All as bytes at first: a column may hold numbers for a million rows, and then a word; or text that is not UTF-8."""
    bad: list[str] = []

    def skip(row: Any) -> str:
        bad.append(f"it has {row.actual_columns} columns, the table has {row.expected_columns}")
        return "skip"

    names = _csv_columns(directory, name, size, delimiter)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip)
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), check_utf8=False)
    read = pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK)
    with _stream(directory, name, size) as stream, pa.csv.open_csv(stream, read, parse, convert) as reader:
        for batch in reader:
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield {n: v.decode("utf-8", "replace") if v else None for n, v in zip(names, values, strict=True)}
            yield from (BadRow(detail) for detail in bad)
            bad.clear()
    yield from (BadRow(detail) for detail in bad)


def as_number(text: Any) -> Any:
    """The number that a cell of a CSV spells, or the cell."""
    if not isinstance(text, str) or not (match := _NUMBER.fullmatch(text)):
        return text
    return float(text) if match[2] or match[3] else int(text) if len(text) < 19 else text


def _read_jsonl(directory: Storage, name: str, size: int) -> Iterator[dict[str, Any] | BadRow]:
    rest = b""
    with _stream(directory, name, size) as stream:
        while block := stream.read(_BUFFER):
            *lines, rest = (rest + block).split(b"\n")
            yield from map(_parse_line, filter(bytes.strip, lines))
            if len(rest) > _LINE:
                raise DataError(f"shard.source.url: {name} has a line of more than {_LINE >> 20} MiB: JSON lines have a row each")
    if rest.strip():
        yield _parse_line(rest)


def _parse_line(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        return BadRow(f"is not JSON ({str(e)[:200]})")
    return row if isinstance(row, dict) else BadRow(f"holds a {type(row).__name__}, not an object")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What reading a table raises, as one sentence that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"shard.source.url: {name} vanished after it was listed") from None
    except (UserError, InfrastructureError):
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as e:
        raise DataError(f"shard.source.url: {name} is damaged, or no {kind_of(name)} ({' '.join(str(e).split())[:300]})") from e
