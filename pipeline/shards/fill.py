"""One shard: its rows' bytes are fetched in any order, made into samples as they come, and written in the order of the plan."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.shard import Fetch, Shard
from pipeline.core.errors import ConfigError, InfrastructureError
from pipeline.core.files import write_whole
from pipeline.core.functions import source_hash
from pipeline.core.storage import Storage
from pipeline.shards.dropped import UNANSWERED, Dropped
from pipeline.shards.executions import Execution, Published
from pipeline.shards.manifest import NAMED, named_each
from pipeline.shards.pixels import prepare
from pipeline.shards.samples import Recipe, Sample, make_sample, printable
from pipeline.shards.shuffle import Rule, first_rows, planned_rows
from pipeline.shards.sources import Item, Source
from pipeline.shards.spill import Spilt
from pipeline.shards.writer import write_shard

STAGE = "fill"  # of the job: where shards have their records
PROBED = 256  # rows
_MANY = 100  # rows of a shard; where not one of so many is answered, it is the network that is away, not they
_HELD = 1 << 28  # bytes of finished samples that wait in memory for those before them; further ones wait in a file
_HEADERS = 2048  # bytes of a sample in a tar beside its members, about


@dataclass(frozen=True)
class Filling:
    """What all shards of a job have in common. `share`: tasks that fetch at the same time. `filter_source`: the hash of the filter's source
    code where the job was begun. `named`: dropped samples that a shard names."""

    source: Source
    recipe: Recipe
    fetch: Fetch
    classes: list[str]
    share: int
    filter_source: str | None = None
    named: int = NAMED

    @staticmethod
    def of(source: Source, shard: Shard, classes: list[str], share: int, shards: int = 1) -> Filling:
        code = source_hash("shard.filter", shard.filter) if shard.filter is not None else None
        return Filling(source, Recipe.of(shard), shard.fetch, classes, share, code, named_each(shards))

    def check(self) -> None:
        """Raises ConfigError where the filter is another on this machine, or has changed meanwhile: shards must not be of both."""
        name = self.recipe.filter
        if name is not None and source_hash("shard.filter", name) != self.filter_source:
            raise ConfigError(
                f"shard.filter: the source code of {name} is not what it was when the job began: it was changed since, and the same "
                "command begins anew, or this machine has another copy"
            )


def fill_shard(name: str, split: str, group: int, row_group: int, filling: Filling, place: Storage, directory: Storage) -> dict[str, Any]:
    """Write the shard `name` and its index (the body of a Ray task). Returns what its record holds: `record` (None: no sample was left),
    `smallest`, `largest_label`, `dropped` by reason, and `named`, the first `filling.named` of them by file. Another execution may be
    under way (`executions.py`)."""
    try:
        with Execution(place, f"{STAGE}/{name}.json", name) as execution:
            return _fill_shard(name, split, group, row_group, filling, place, directory, execution)
    except Published as another:
        return another.result


def _fill_shard(
    name: str, split: str, group: int, row_group: int, filling: Filling, place: Storage, directory: Storage, execution: Execution
) -> dict[str, Any]:
    filling.check()
    rows = list(planned_rows(place, group, row_group))
    drops: list[dict[str, str]] = []
    dropped: Counter[str] = Counter()

    def good() -> Generator[Sample, None, None]:
        for index, sample in in_order(_made(rows, filling), len(rows), _HELD):
            if isinstance(sample, Dropped):
                dropped[sample.reason] += 1
                drops.append({"file": printable(rows[index][1].path), "reason": sample.reason, "detail": printable(sample.detail)})
            else:
                yield sample
        if len(rows) >= _MANY and sum(dropped[reason] for reason in UNANSWERED) == len(rows):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
            raise InfrastructureError(f"none of its {len(rows):,} URLs was answered ({reasons}): this machine may have no network")
        execution.settle()

    with warnings.catch_warnings(), closing(good()) as samples:  # closed, so that a shard that fails leaves no downloads under way
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata; damaged pixels raise
        written = write_shard(directory, name, split, samples, filling.recipe.images.hash)
    drops.sort(key=lambda d: d["file"])
    result = {"read": len(rows), "dropped": dict(dropped), "named": drops[: filling.named]}
    if written is None:
        return {**result, "record": None, "smallest": [0, 0], "largest_label": -1}
    return {**result, "record": asdict(written.record), "smallest": list(written.smallest), "largest_label": written.largest_label}


def probe_rows(name: str, spilt: Spilt, rule: Rule, filling: Filling, place: Storage) -> dict[str, Any]:
    """What some of the rows come to as samples, for `rows_of_shard` (the body of a Ray task)."""
    rows = first_rows(spilt, PROBED, rule, place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        samples = [sample for _, sample in _made(rows, filling) if isinstance(sample, Sample)]
    total = sum(sum(len(data) for data in s.members().values()) + _HEADERS for s in samples)
    return {"probed": len(rows), "written": len(samples), "bytes": total}


def _made(rows: Sequence[tuple[str, Item]], filling: Filling) -> Iterator[tuple[int, Sample | Dropped]]:
    """Samples as their bytes come, with their places in `rows`."""
    ids = {name: n for n, name in enumerate(filling.classes)}
    items = [item for _, item in rows]
    if filling.recipe.images.resize is not None:
        prepare()
    for index, files in filling.source.fetch(items, filling.fetch, filling.recipe.images.max_bytes, filling.share):
        key, item = rows[index]
        yield index, files if isinstance(files, Dropped) else make_sample(key, item, files, filling.recipe, ids)


def in_order(arriving: Iterator[tuple[int, Sample | Dropped]], count: int, held: int) -> Iterator[tuple[int, Sample | Dropped]]:
    """`count` numbered samples in order of their numbers. Those that come early wait, up to `held` bytes of them in memory."""
    waiting: dict[int, Sample | Dropped] = {}
    outside: dict[int, tuple[int, int]] = {}  # where in the file the image is
    following = size = end = 0
    with tempfile.TemporaryFile(prefix="tessera-shard-", buffering=0) as file:
        for number, sample in arriving:
            if number != following and isinstance(sample, Sample):
                length = len(sample.image.data)
                if size + length > held:
                    file.seek(end)
                    write_whole(file, sample.image.data)
                    outside[number], end = (end, length), end + length
                    sample = replace(sample, image=replace(sample.image, data=b""))
                else:
                    size += length
            waiting[number] = sample
            while following in waiting:
                sample = waiting.pop(following)
                if following in outside:
                    start, length = outside.pop(following)
                    file.seek(start)
                    assert isinstance(sample, Sample), "only samples wait in the file"
                    sample = replace(sample, image=replace(sample.image, data=file.read(length)))
                elif isinstance(sample, Sample) and following != number:
                    size -= len(sample.image.data)
                yield following, sample
                following += 1
    assert following == count, f"a source gives each item once: {following} of {count} came"


def rows_of_shard(probed: dict[str, Any], size: int) -> int:
    """By a probe's figures; where none of its rows was of use, nobody knows, and shards get 10,000 rows as those of img2dataset do."""
    if not probed["written"]:
        return 10_000
    return max(1, int(size * probed["probed"] / probed["bytes"]))
