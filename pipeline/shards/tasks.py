"""Many small tasks on Ray, for the jobs of this room. The only file of it that imports ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
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
    with progress.Progress(label, sum(count for count, _ in jobs), unit) as shown:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    count, arguments = waiting.pop()
                    running[task.remote(*arguments, *common)] = count
                for reference in ray.wait(list(running), timeout=_POLL)[0]:
                    yield ray.get(reference)
                    shown.update(running.pop(reference), told())
                shown.update(0)
        except RayError as e:
            if (ours := find_error(e)) is not None:
                raise ours from e
            if isinstance(e, RayTaskError):
                raise
            raise InfrastructureError(f"{label}: a task was lost and its retries too ({e})") from e
        # Tasks that still run end with the driver. Cancelled as it finishes, a task makes Ray (2.60) abort the driver.
