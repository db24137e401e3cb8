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
_AHEAD = 256  # records held at once; one that names a thousand dropped images takes half a megabyte

EARLIER = "earlier"  # a key of what was read from a record
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
    """What `body` returns for each job, read from its record, and marked as `EARLIER`, where it has one; the others run on Ray. `jobs` is
    asked for them twice.

    Raises:
        TesseraError: as `run_tasks`, after all jobs that can be done have their record.
    """
    names = {name.removesuffix(".json") for name in (place / stage).names() if name.endswith(".json")}
    total, done, left, finished = 0, 0, 0, list[str]()
    for units, arguments in jobs():
        total += units
        if arguments[0] in names:
            done += units
            finished.append(arguments[0])
        else:
            left += 1
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(finished), _AHEAD):
            for result in pool.map(lambda name: json.loads(place.read(f"{stage}/{name}.json")), finished[first : first + _AHEAD]):
                yield {**result, EARLIER: True}
    if not left:
        return

    def recorded(name: str, *arguments: Any) -> Result:
        result = body(name, *arguments)
        place.write(f"{stage}/{name}.json", json.dumps(result).encode())
        return result

    from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

    waiting = (job for job in jobs() if job[1][0] not in names)
    yield from run_tasks(label, unit, recorded, waiting, shared, workers, told, total=total, done=done, persist=True, kept=True)
