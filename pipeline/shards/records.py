"""Pieces of work that are done once, whatever happens: each leaves a record, written last, by which a later run knows it.

A record is `<place>/<stage>/<name>.json`: what the piece's task returned. So a job that was killed at any moment goes on with the pieces
that have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.core.storage import Storage

_READERS = 32  # records read at once
_AHEAD = 4096

Result = dict[str, Any]
Job = tuple[int, tuple[Any, ...]]  # units, and arguments of which the first is the piece's name


def run_recorded(
    label: str,
    unit: str,
    stage: str,
    body: Callable[..., Result],
    jobs: Callable[[], Iterable[Job]],
    shared: tuple[Any, ...],
    place: Storage,
    workers: int | None,
    told: Callable[[], str] = str,
) -> Iterator[Result]:
    """What `body` returns for each job, read from its record where it has one; the others run on Ray. `jobs` is asked for them twice.

    Raises:
        TesseraError: as `run_tasks`, after all jobs that can be done have their record.
    """
    names = {name.removesuffix(".json") for name in (place / stage).names() if name.endswith(".json")}
    total = done = 0
    finished = list[str]()
    for units, arguments in jobs():
        total += units
        if arguments[0] in names:
            done += units
            finished.append(arguments[0])
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(finished), _AHEAD):
            yield from pool.map(lambda name: json.loads(place.read(f"{stage}/{name}.json")), finished[first : first + _AHEAD])
    if len(finished) == total == 0 or done == total and not any(a[0] not in names for _, a in jobs()):
        return
    from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

    left = (job for job in jobs() if job[1][0] not in names)
    task = _Recorded(body, stage, len(shared))
    yield from run_tasks(label, unit, task.run, left, (*shared, place), workers, told, total=total, done=done, persist=True)


class _Recorded:
    """A task's body that leaves a record behind; its place comes last among the arguments."""

    def __init__(self, body: Callable[..., Result], stage: str, shared: int) -> None:
        self.body, self.stage, self.shared = body, stage, shared

    def run(self, name: str, *arguments: Any) -> Result:
        *rest, place = arguments
        result = self.body(name, *rest)
        place.write(f"{self.stage}/{name}.json", json.dumps(result).encode())
        return result
