"""Every byte of a dataset against what its manifest, its table of shards and its indices say of it.

Each tar is read once, from front to back, and its index is made anew and compared: so the tar, the index and the table
vouch for each other, and what differs is told sample by sample.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.shards import table
from pipeline.shards.duplicates.phash import PHASH
from pipeline.shards.index import TarIndex, json_columns
from pipeline.shards.manifest import INDEX_SCHEMA, ShardRecord, ShardTable, dataset_hash, read_manifest
from pipeline.shards.tars import End, Tape, read_blocks

_NAMED = 20  # samples of one shard that are named; the others are counted
_MB = 1e6


@dataclass(frozen=True)
class Problem:
    """`shard` is a file of the dataset, `key` a sample in it, empty for the file as a whole."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'sample {self.key}: ' if self.key else ''}{self.what}"


def verify(directory: Storage, split: str | None = None, workers: int = 8) -> Iterator[Problem]:
    """What is wrong with the dataset at `directory`, or one split of it, shard by shard in the order of their names.

    Reads `workers` tars at a time, in threads, of each a block and its index.

    Raises:
        DataError: there is no dataset, no such split, or its table of shards cannot be read.
        StorageError: the store cannot be read (a file that is not there is a problem, not an error).
    """
    manifest, everything = read_manifest(directory), ShardTable(directory)
    shards = ShardTable(directory, split) if split is not None else everything
    if dataset_hash(everything) != manifest.hash:
        yield Problem(table.FILE, "", "its hash differs from the manifest's: one of them is of another dataset, or was changed")
    if (samples := int(everything.samples.sum())) != sum(manifest.splits.values()):
        yield Problem(table.FILE, "", f"it has {samples:,} samples, the manifest says {sum(manifest.splits.values()):,}")
    lock, labels = threading.Lock(), len(manifest.classes) or None
    with Progress("verify", shards.bytes.sum() / _MB, "MB") as shown, ThreadPoolExecutor(workers) as pool:

        def passed(count: int) -> None:
            with lock:
                shown.update(count / _MB)

        running: deque[Future[list[Problem]]] = deque()
        try:
            for record in shards:
                running.append(pool.submit(check_shard, directory, record, labels, passed))
                if len(running) >= 2 * workers:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def check_shard(
    directory: Storage, record: ShardRecord, labels: int | None = None, passed: Callable[[int], None] = lambda count: None
) -> list[Problem]:
    """What is wrong with one shard. `labels`: how many classes there are, None for any number; `passed` is told of the bytes it reads."""
    try:
        index: pa.Table | str = _read_index(directory, record)
    except DataError as e:
        index = str(e)
    said = [] if isinstance(index, str) else index.to_pylist()
    made = TarIndex(labels, *(((), False) if isinstance(index, str) else (json_columns(index.schema), PHASH in index.column_names)))
    tape = Tape(_counted(read_blocks(directory, record.name), passed))
    try:
        ends, doubtful = _read_past_damage(tape, made, [row["offset"] for row in said])
    except FileNotFoundError:
        return [Problem(record.name, "", "it is missing")]
    problems = list[Problem]()
    if tape.position != record.bytes:
        problems.append(Problem(record.name, "", f"it has {tape.position:,} bytes, the table of shards says {record.bytes:,}"))
    elif tape.whole.hexdigest() != record.sha256:
        problems.append(Problem(record.name, "", "its sha256 differs from the table of shards"))
    # Tars that others wrote may have been cut when they were adopted; then the bytes are those that the table vouches for.
    sound = not problems
    problems += [Problem(record.name, "", str(end)) for end in ends if end.kind != "whole" and not sound]
    if isinstance(index, str):
        return [*problems, Problem(record.index_name, "", index)]
    if len(said) != record.samples:
        problems.append(Problem(record.index_name, "", f"it has {len(said):,} rows, the table of shards says {record.samples:,}"))
    return problems + _limited(record, _compare(record, said, made, doubtful, sound))


def _read_index(directory: Storage, record: ShardRecord) -> pa.Table:
    """Raises DataError, without the file's name, unless it is an index."""
    try:
        index = pq.read_table(io.BytesIO(directory.read(record.index_name)))
    except FileNotFoundError:
        raise DataError("it is missing") from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"it cannot be read ({e})") from e
    for column in INDEX_SCHEMA:
        if column.name not in index.column_names or index.schema.field(column.name).type != column.type:
            raise DataError(f"it has no column {column.name!r} of type {column.type}")
        if index[column.name].null_count:
            raise DataError(f"its column {column.name!r} has gaps")
    return index


def _read_past_damage(tape: Tape, made: TarIndex, offsets: list[int]) -> tuple[list[End], dict[str, dict[str, Any]]]:
    """Read a whole tar; where a header is damaged, go on at the next sample that the index knows.

    Returns how each stretch ended, and by key the samples just before a damage: it may have been theirs.
    """
    ends, doubtful = list[End](), dict[str, dict[str, Any]]()
    while True:
        ends.append(made.read(tape))
        if ends[-1].is_cut and made.doubtful is not None:
            doubtful[made.doubtful["key"]] = made.doubtful
        further = [offset for offset in offsets if offset >= tape.position]
        if ends[-1].kind not in ("damaged", "not-a-tar") or not further:
            tape.drain()
            return ends, doubtful
        tape.skip(min(further) - tape.position)


def _compare(record: ShardRecord, said: list[dict[str, Any]], made: TarIndex, doubtful: dict[str, Any], sound: bool) -> Iterator[Problem]:
    """Sample by sample, what the index says and what the tar holds."""
    rows, dropped = {row["key"]: row for row in made.rows}, dict(made.dropped)
    left = dict(rows)
    for row in said:
        key = row["key"]
        found = left.pop(key, None) or doubtful.pop(key, None)
        if found is None:
            why = f" ({dropped[key].reason}: {dropped[key].detail})" if key in dropped else ""
            yield Problem(record.name, key, f"the index has it, the tar does not{why}")
            continue
        differ = [column for column in found if found[column] != row[column]]
        if "crc32" in differ and not sound:
            yield Problem(record.name, key, f"its bytes are damaged ({', '.join(differ)} differ from the index)")
        elif differ:
            told = ", ".join(f"{c} is {row[c]!r} there and {found[c]!r} in the tar" for c in differ)
            yield Problem(record.index_name, key, f"the index is wrong: {told}")
    for key in left:
        yield Problem(record.name, key, "the tar has it, the index does not")
    if not left and [row["key"] for row in said] != list(rows) and {row["key"] for row in said} == set(rows):
        yield Problem(record.index_name, "", "its rows are not in the order of the tar")


def _limited(record: ShardRecord, problems: Iterator[Problem]) -> list[Problem]:
    found = list(problems)
    further = len(found) - _NAMED
    return found[:_NAMED] + ([Problem(record.name, "", f"and {further:,} samples more")] if further > 0 else [])


def _counted(blocks: Iterator[bytes], passed: Callable[[int], None]) -> Iterator[bytes]:
    for block in blocks:
        yield block
        passed(len(block))
