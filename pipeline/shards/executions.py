"""Executions of one shard's task that know of each other, so that tar, index and record are of one of them.

Ray executes a task again when the machine under it seems dead; behind a split network the first execution may go on. Of answers from the
web each makes other bytes, and stores have neither a rename nor, all of them, writes with a condition. So an execution

- leaves a mark before it begins, `<place>/running/<name>/<id>`, and looks which others are there. Where there are any, and the shard has no
  record, it is doubtful from now on (`<place>/doubtful/<name>`).
- looks again when all is made and nothing published. Where another has begun since, or its own mark is gone with the plan, this is the one
  that was presumed dead, and it gives up.

Whoever finds a record, written last by another, has that one's result for its own.

Before the manifest is published, doubtful shards are read, and compared with their records; what is not of one piece is made anew. Shards
that were under way when a machine died are doubtful too; they are read whole, at some 400 MB/s.

Why it holds: what was written is listed, on all stores. So of two executions one at least finds the mark of the other as it begins, and has
made the shard doubtful before it publishes anything: none that two have written escapes the comparison. That takes the record which the
table will have, compares the tar by its sha256, and the index with one that is made anew of that tar. What is left is an execution that
stands still between its second look and its last write, from before the other began until the whole job has ended; or, where its plan was
thrown away meanwhile and its mark with it, until another of a new plan has written the shard of its name.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from pipeline.core.errors import InfrastructureError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.shards.table import ShardRecord
from pipeline.shards.verify import check_shard

_RUNNING, _DOUBTFUL = "running", "doubtful"
_READERS = 8  # shards compared at a time


class Published(Exception):
    """Another execution of the same piece has its record: its `result` is everyone's."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("the piece has its record")
        self.result = result


class Execution:
    """`with Execution(place, "fill/train-00000.tar.json", "train-00000.tar") as execution: ..; execution.settle(); ..` An execution that
    fails takes its mark away."""

    def __init__(self, place: Storage, record: str, name: str) -> None:
        self._place, self._record, self._name = place, record, name
        self._id = uuid.uuid4().hex

    def __enter__(self) -> Self:
        self._place.write(f"{_RUNNING}/{self._name}/{self._id}", b"")
        self._before = self._marks() - {self._id}
        if self._before:
            self._look_for_record()
            self._place.write(f"{_DOUBTFUL}/{self._name}", b"")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._place.remove(f"{_RUNNING}/{self._name}/{self._id}")

    def settle(self) -> None:
        """The last look before anything is published.

        Raises:
            Published: the shard has a record. InfrastructureError: this execution was presumed dead.
        """
        marks = self._marks()
        if marks != {self._id}:
            self._look_for_record()
        if self._id not in marks or marks - self._before - {self._id}:
            raise InfrastructureError("this task was presumed dead, and others have gone on without it")

    def _look_for_record(self) -> None:
        if self._place.exists(self._record):
            raise Published(json.loads(self._place.read(self._record)))

    def _marks(self) -> set[str]:
        return {name for name in self._place.names(f"{_RUNNING}/{self._name}") if name[0] != "."}  # some are being written


def find_mixed(place: Storage, directory: Storage, records: Mapping[str, ShardRecord]) -> list[str]:
    """The doubtful shards in `directory` of which tar or index is not that of its record; one that is not among `records` has neither."""

    def is_mixed(name: str) -> bool:
        if (record := records.get(name)) is not None:
            return bool(check_shard(directory, record))
        return directory.exists(name) or directory.exists(ShardRecord(name, "", 0, 0, "").index_name)

    names, found = place.names(_DOUBTFUL), list[str]()
    if not names:
        return found
    with Progress("compare", len(names), "shards") as shown, ThreadPoolExecutor(_READERS) as pool:
        for name, mixed in zip(names, pool.map(is_mixed, names), strict=True):
            found += [name] if mixed else []
            shown.update()
    return found
