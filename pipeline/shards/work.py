"""What lies beside the shards of a dataset while they are made, and what stays of it for the next version.

<dataset>/.plan/v<N>/    the plan and records of a version (`plan.py`); of a finished one there is left
                         state.json    what it was made of (`State`)
                         known/        the keys of its rows
"""

from __future__ import annotations

import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pipeline.core.storage import Storage
from pipeline.shards.deny import DIRECTORY
from pipeline.shards.plan import Header
from pipeline.shards.table import ShardTable

WORK = ".plan"
_STATE = "state.json"
_AT_ONCE = 32  # objects removed: there may be millions, and a store takes tens of milliseconds for each
_WORKED_OUT = re.compile(r"(duplicates|contamination|source|score-.+?)(-v\d+)?\.parquet")  # deny-lists


@dataclass(frozen=True)
class State:
    """What the next version needs to know of a finished one: the stamp of its source, and by version the ranges of keys in `known/`."""

    stamp: str
    classes: list[str]
    rows_a_shard: int | None
    groups: list[int]


def place_of(directory: Storage, version: int) -> Storage:
    return directory / WORK / f"v{version}"


def clear(directory: Storage, place: Storage, is_first: bool) -> None:
    """Before the first shard of a plan is written: what an unfinished or different dataset left goes, its manifest first. Takedowns stay
    (`_forget_lists`)."""
    if place.exists("cleared"):
        return
    if is_first:
        directory.remove("manifest.json")
        _remove(directory, [name for name in directory.names() if name not in (WORK, DIRECTORY) and _is_ours(name)])
        _forget_lists(directory)
        for name in (directory / WORK).names():
            if name != "v1":
                (directory / WORK).remove(name)
        directory.abort_uploads("")
    directory.check_writable()
    place.write("cleared", b"")


def forget(directory: Storage) -> None:
    """Remove what a dataset has beside its tars and their indices: its manifests, tables and audits, what a next version would begin with,
    and the deny-lists that were worked out of it."""
    directory.remove("manifest.json")  # first, so that nobody reads an old table beside new indices
    of_tars = (".tar", ".index.parquet")
    _remove(directory, [n for n in directory.names() if n == WORK or (_is_ours(n) and n != DIRECTORY and not n.endswith(of_tars))])
    _forget_lists(directory)


def _remove(directory: Storage, names: list[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        deque(pool.map(directory.remove, names), maxlen=0)


def _forget_lists(directory: Storage) -> None:
    """The deny-lists that were worked out of a dataset. A takedown stays, and any other list: keys are those of paths and URLs, so what was
    denied would come back."""
    for name in (directory / DIRECTORY).names():
        if _WORKED_OUT.fullmatch(name):
            (directory / DIRECTORY).remove(name)


def _is_ours(name: str) -> bool:
    is_version = name.startswith(("manifest-v", "shards-v")) and name.endswith((".json", ".parquet"))
    is_named = name in ("shards.parquet", "columns.json", DIRECTORY)
    is_audit = name.startswith(("duplicates", "contamination", "statistics")) and name.endswith(".json")
    return is_version or is_named or is_audit or name.endswith((".tar", ".index.parquet")) or name.startswith(".tmp-")


def tidy(directory: Storage, version: int) -> None:
    """Remove what served to make a version, except what the next one needs, and files that a killed job left half-written."""
    place = place_of(directory, version)
    left = [name for name in place.names() if name not in ("known", _STATE)]
    if left:
        for name in directory.names():
            if name.startswith(".tmp-"):
                directory.remove(name)
    for name in left:
        place.remove(name)


def read_state(directory: Storage, version: int) -> State | None:
    """Of a finished version; None where it was made elsewhere, or by others."""
    try:
        return State(**json.loads(place_of(directory, version).read(_STATE)))
    except FileNotFoundError:
        return None


def write_state(directory: Storage, header: Header, before: State | None, version: int) -> None:
    groups = (before.groups if before else []) + ([header.groups] if header.read else [])
    state = State(header.stamp, header.classes, header.rows_a_shard, groups)
    place_of(directory, version).write(_STATE, json.dumps(asdict(state)).encode())


def free_numbers(directory: Storage, version: int) -> dict[str, int]:
    """By split, the number after those of all its shards."""
    numbers: dict[str, int] = {}
    for record in ShardTable(directory, version=version):
        number = int(record.name.removesuffix(".tar").rpartition("-")[2])
        numbers[record.split] = max(numbers.get(record.split, 0), number + 1)
    return numbers
