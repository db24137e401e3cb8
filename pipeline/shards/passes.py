"""A pass over the finished shards of a dataset: a Ray task a shard, and a list of those that failed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from pipeline.core.errors import DataError, InfrastructureError, StorageError, TesseraError, UserError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.manifest import ShardRecord, ShardTable

T = TypeVar("T")
_MOST_FAILURES = 100  # shards that may fail before the others are given up too
_LISTED = 10  # in one sentence


def over_shards(
    label: str,
    directory: Storage,
    body: Callable[..., T],
    shared: tuple[Any, ...],
    told: Callable[[], str],
    *,
    where: str,
    workers: int | None = None,
    gpus: float = 0,
) -> Iterator[T]:
    """What `body(record, *shared)` gives for each shard of the dataset at `directory`, in no particular order. Needs a Ray that is
    initialised; a task has `gpus` of a GPU, and `told` is asked what to show beside the progress.

    What fails by the store or the machine is tried once more when the others are done. Shards that fail all the same end the pass, after
    the others: `where` begins the sentence that lists them.

    Raises:
        DataError, StorageError, ..: some shards failed. InfrastructureError: a machine failed more often than tasks are retried.
    """
    table, failures = ShardTable(directory), dict[str, tuple[ShardRecord, TesseraError]]()

    def run(records: list[ShardRecord]) -> Generator[T, None, None]:
        from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

        jobs = [(record.samples, (record,)) for record in records]
        tasks = run_tasks(label, "samples", _try, jobs, (body, *shared), workers, lambda: told() + _failed(failures), gpus)
        for record, result, error in tasks:
            if error is None:
                yield result
                continue
            failures[record.name] = record, error
            if len(failures) >= _MOST_FAILURES:
                tasks.close()

    yield from run(list(table))
    again = [record for record, error in failures.values() if isinstance(error, StorageError | InfrastructureError)]
    if again and len(failures) < _MOST_FAILURES:
        say(f"warning: {label}: {len(again):,} shards failed and are tried again ({failures[again[0].name][1]})")
        for record in again:
            del failures[record.name]
        yield from run(again)
    if failures:
        _refuse(directory, where, len(table), {name: error for name, (_, error) in failures.items()})


def _try(record: ShardRecord, body: Callable[..., Any], *shared: Any) -> tuple[ShardRecord, Any, TesseraError | None]:
    try:
        return record, body(record, *shared), None
    except (UserError, InfrastructureError) as e:
        return record, None, e


def _failed(failures: dict[str, Any]) -> str:
    return f", {len(failures):,} shards failed" if failures else ""


def _refuse(directory: Storage, where: str, shards: int, failures: dict[str, TesseraError]) -> None:
    kinds = {type(e) for e in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else DataError
    told = "; ".join(f"{name}: {failures[name]}" for name in sorted(failures)[:_LISTED]) + ("; .." if len(failures) > _LISTED else "")
    least = "at least " if len(failures) >= _MOST_FAILURES else ""
    raise kind(f"{where}: {least}{len(failures)} of the {shards:,} shards in {directory.url} failed, the others are done: {told}")
