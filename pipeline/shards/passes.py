"""A pass over the finished shards of a dataset: a Ray task a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.core.storage import Storage
from pipeline.shards.manifest import ShardTable

T = TypeVar("T")


def over_shards(
    label: str,
    directory: Storage,
    body: Callable[..., T],
    shared: tuple[Any, ...],
    told: Callable[[], str],
    workers: int | None = None,
    gpus: float = 0,
    kept: bool = False,
) -> Iterator[T]:
    """What `body(record, *shared)` gives for each shard of the dataset at `directory`, in no particular order. Needs a Ray that is
    initialised; a task has `gpus` of a GPU, and `told` is asked what to show beside the progress. `kept`: `body` knows the shards that
    it has done when it is asked again, so that the same command repeats those alone that failed.

    A shard that fails is tried again elsewhere; if it keeps failing, the others are finished first.

    Raises:
        DataError, StorageError, InfrastructureError: some shards failed; they are named.
    """
    from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

    table = ShardTable(directory)
    jobs, total = ((record.samples, (record,)) for record in table), int(table.samples.sum())
    return run_tasks(label, "samples", body, jobs, shared, workers, told, total=total, persist=True, kept=kept, gpus=gpus)
