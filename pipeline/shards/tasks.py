"""Many small tasks on Ray, for the jobs of this room. The only file of it that imports ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.core import progress
from pipeline.core.errors import ConfigError, CredentialsError, DataError, InfrastructureError, StorageError, TesseraError, find_error

T = TypeVar("T")

_POLL = 1.0  # seconds
_ATTEMPTS = 3  # of a piece whose own code fails; a machine that dies under it is Ray's to make up for
_MOST_FAILURES = 100  # pieces that may fail before the others are given up too
_NAMED = 10  # of them, in one sentence
_AT_ONCE = (ConfigError, CredentialsError)  # what every piece would meet


@dataclass(frozen=True)
class _Job:
    units: int
    arguments: tuple[Any, ...]
    attempt: int = 1

    @property
    def name(self) -> str:
        return str(self.arguments[0])


def run_tasks(
    label: str,
    unit: str,
    body: Callable[..., T],
    jobs: Iterable[tuple[int, tuple[Any, ...]]],
    shared: tuple[Any, ...],
    workers: int | None,
    told: Callable[[], str],
    *,
    total: int | None = None,
    done: int = 0,
    persist: bool = False,
    kept: bool = False,
    gpus: float = 0,
) -> Generator[T, None, None]:
    """What `body` returns for each job, in no particular order: Ray tasks, at most `workers` at a time, the others wait here.

    A job is the `unit`s it counts for and its arguments, before those that are `shared`; the first of them names it. `told` is asked what
    to show beside the progress, of which `done` of `total` units were done before. With `persist`, a job that fails is tried again after
    others, and if it keeps failing, the others are finished first. `kept` says that whoever calls this knows a finished job when it is
    asked for again. A task has one CPU, and `gpus` of a GPU.

    Raises:
        InfrastructureError: a machine failed more often than tasks are retried.
        ConfigError: GPUs are asked for, and this Ray has none.
        TesseraError: the one that `body` raised; with `persist` one of its kind, that names all jobs that failed. Whatever else it raises
            comes as Ray's own error, with the task's traceback.
    """
    if gpus and not ray.cluster_resources().get("GPU", 0):
        raise ConfigError(f"{label}: its tasks ask for {gpus:g} of a GPU each, and Ray has none here (gpus: 0 computes on CPUs)")
    # A machine that dies is retried elsewhere; what our own code raises would be raised again.
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(body)
    workers = workers or default_workers()
    common = [ray.put(argument) for argument in shared]
    if total is None:
        assert isinstance(jobs, Sized), "where nobody says how much there is, it can be counted"
        total = done + sum(count for count, _ in jobs)
    waiting, again = iter(_Job(*job) for job in jobs), list[_Job]()
    running: dict[ray.ObjectRef, _Job] = {}
    failed: dict[str, BaseException] = {}
    with progress.Progress(label, total, unit, done) as shown:
        while True:
            while len(running) < workers and len(failed) < _MOST_FAILURES:
                piece = next(waiting, None) or (again.pop(0) if again else None)
                if piece is None:
                    break
                # A second attempt goes to another machine, where there is one.
                at = task if piece.attempt == 1 else task.options(scheduling_strategy="SPREAD")
                running[at.remote(*piece.arguments, *common)] = piece
            if not running:
                break
            for reference in ray.wait(list(running), timeout=_POLL)[0]:
                piece = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as e:
                    error = _plain(label, e)
                    if not persist or isinstance(error, _AT_ONCE):
                        raise error from e
                    if piece.attempt < _ATTEMPTS and not isinstance(error, DataError):
                        again.append(_Job(piece.units, piece.arguments, piece.attempt + 1))
                    else:
                        failed[piece.name] = error
                    continue
                yield result
                shown.update(piece.units, told())
            shown.update(0)
        if failed:
            raise _summed(label, failed, kept)
        # Tasks that still run end with the driver. Cancelled as it finishes, a task makes Ray (2.60) abort the driver.


def default_workers() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _plain(label: str, error: RayError) -> BaseException:
    if (ours := find_error(error)) is not None:
        return ours
    if isinstance(error, RayTaskError) and not isinstance(error, OutOfMemoryError):
        return error
    return InfrastructureError(f"{label}: a task was lost and its retries too ({error})")


def _summed(label: str, failed: dict[str, BaseException], kept: bool) -> BaseException:
    """One error for all jobs that failed."""
    if len(failed) == 1 and not isinstance(error := next(iter(failed.values())), TesseraError):
        return error  # with its traceback
    kinds = {type(e) for e in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 and kinds <= {DataError, StorageError} else InfrastructureError
    told = "; ".join(f"{name}: {_sentence(failed[name])}" for name in sorted(failed)[:_NAMED]) + ("; .." if len(failed) > _NAMED else "")
    finished = "the others are finished, and the same command repeats these alone" if kept else "the same command begins anew"
    rest = "the others were given up" if len(failed) >= _MOST_FAILURES else finished
    return kind(f"{label}: {len(failed)} {'piece' if len(failed) == 1 else 'pieces'} of the work failed ({rest}): {told}")


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, TesseraError) else str(error).strip().splitlines()[-1]


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
    workers = workers or default_workers()
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
        raise _plain(label, e) from e
