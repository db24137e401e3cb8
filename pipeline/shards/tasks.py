"""Many small tasks on Ray, for the jobs of this room. The only file of it that imports ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.core import progress
from pipeline.core.errors import ConfigError, InfrastructureError, find_error

T = TypeVar("T")

_POLL = 1.0  # seconds


def run_tasks(
    label: str,
    unit: str,
    body: Callable[..., T],
    jobs: Sequence[tuple[int, tuple[Any, ...]]],
    shared: tuple[Any, ...],
    workers: int | None,
    told: Callable[[], str],
    gpus: float = 0,
) -> Generator[T, None, None]:
    """What `body` returns for each job, in no particular order: Ray tasks, at most `workers` at a time, the others wait here.

    A job is the `unit`s it counts for and its arguments, before those that are `shared`; `told` is asked what to show
    beside the progress. A task has one CPU, and `gpus` of a GPU.

    Raises:
        InfrastructureError: a machine failed more often than tasks are retried.
        ConfigError: GPUs are asked for, and this Ray has none.
        TesseraError: the one that `body` raised. Whatever else it raises comes as Ray's own error, with the task's traceback.
    """
    if gpus and not ray.cluster_resources().get("GPU", 0):
        raise ConfigError(f"{label}: its tasks ask for {gpus:g} of a GPU each, and Ray has none here (gpus: 0 computes on CPUs)")
    # A machine that dies is retried elsewhere; what our own code raises would be raised again.
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(body)
    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    common = [ray.put(argument) for argument in shared]
    waiting = list(jobs)[::-1]
    running: dict[ray.ObjectRef, int] = {}  # and the units in each
    with progress.Progress(label, sum(count for count, _ in jobs), unit) as shown, _explained(label):
        while waiting or running:
            while waiting and len(running) < workers:
                count, arguments = waiting.pop()
                running[task.remote(*arguments, *common)] = count
            for reference in ray.wait(list(running), timeout=_POLL)[0]:
                yield ray.get(reference)
                shown.update(running.pop(reference), told())
            shown.update(0)
        # Tasks that still run end with the driver. Cancelled as it finishes, a task makes Ray (2.60) abort the driver.


@dataclass(frozen=True)
class Piece:
    """Something that a task made, left where the cluster keeps it: in memory or, where that is full, on disk."""

    reference: ray.ObjectRef


def exchange(
    label: str,
    unit: str,
    body: Callable[..., Any],
    jobs: Sequence[tuple[int, tuple[Any, ...], Sequence[Piece]]],
    shared: tuple[Any, ...],
    parts: int,
    workers: int | None,
) -> list[list[Piece]]:
    """Run `body` once a job, and leave what it returns in the cluster: a list of `parts` things. Gives, for each of the parts, the piece of
    every job, in the order of the jobs: so the pieces of one part are a job of the next exchange, which has them alone in memory.

    A job is the `unit`s it counts for, its arguments, before those that are `shared`, and pieces, which come behind these as values.
    What a job reads is lost from the cluster once nobody holds its pieces. Raises as `run_tasks`.
    """
    task = ray.remote(num_cpus=1, max_retries=3, num_returns=parts + 1)(_marked(body))
    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    common = [ray.put(argument) for argument in shared]
    made: list[list[ray.ObjectRef]] = []
    running: dict[ray.ObjectRef, int] = {}
    with progress.Progress(label, sum(count for count, _, _ in jobs), unit) as shown, _explained(label):

        def settle(most: int) -> None:
            while len(running) > most:
                for reference in ray.wait(list(running), timeout=_POLL)[0]:
                    ray.get(reference)
                    shown.update(running.pop(reference))
                shown.update(0)

        for count, arguments, pieces in jobs:
            settle(workers - 1)
            *references, end = task.remote(*arguments, *common, *(p.reference for p in pieces))
            made.append(references)
            running[end] = count
        settle(0)
    return [[Piece(references[part]) for references in made] for part in range(parts)]


def take(label: str, piece: Piece) -> Any:
    """The value of a piece, here. Raises as `run_tasks`."""
    with _explained(label):
        return ray.get(piece.reference)


def _marked(body: Callable[..., Any]) -> Callable[..., Any]:
    """With one thing more behind what it returns, that takes nothing to fetch, and raises where the task failed."""

    def marked(*arguments: Any) -> Any:
        return [*body(*arguments), None]

    return marked


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Give back our own errors alone, and say what the loss of a machine means."""
    try:
        yield
    except RayError as e:
        if (ours := find_error(e)) is not None:
            raise ours from e
        if isinstance(e, RayTaskError):
            raise
        raise InfrastructureError(f"{label}: a task was lost and its retries too ({e})") from e
