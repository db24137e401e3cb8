"""Stage 1 on Ray: a plan, a task a shard, a manifest at the end; and again, with what is new, for the next version.

Whatever the number of workers, the result is the same to the last byte: what goes into which shard is planned before
anything is read, and nothing of the machine, the time or the order of arrival is written down. Every piece of work that is
finished leaves a record (`records.py`), so the same command goes on where a job was killed.

A shard of which no sample is left is not written, and its number stays free.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import Config, fingerprint
from pipeline.config.shard import Shard
from pipeline.core import progress
from pipeline.core.errors import ConfigError, CredentialsError, DataError, InfrastructureError, StorageError
from pipeline.core.functions import source_hash
from pipeline.core.storage import Storage
from pipeline.shards.dropped import DENIED
from pipeline.shards.executions import find_mixed
from pipeline.shards.fill import STAGE, Filling, fill_shard
from pipeline.shards.manifest import Manifest, ShardRecord, dataset_hash, find_manifest, first_named, publish
from pipeline.shards.plan import Header, Plan, Planner
from pipeline.shards.records import EARLIER, run_recorded
from pipeline.shards.samples import printable
from pipeline.shards.shuffle import Earlier
from pipeline.shards.sources import Source, open_source
from pipeline.shards.table import ShardTable
from pipeline.shards.withdrawn import withdraw
from pipeline.shards.work import State, clear, free_numbers, place_of, read_state, tidy, write_state

_ATTEMPTS = 3  # at shards of one piece
_DECIDES = {"images", "text", "filter", "splits", "size", "samples", "shuffle"}


def make_dataset(config: Config, directory: Storage, grow: bool = True) -> tuple[Manifest, dict[str, float]]:
    """Make the dataset that `config.shard` describes at `directory`, or find that it is there already.

    Needs a Ray that is initialised. Returns the manifest and metrics (`shard/read`, `shard/images_per_s`, ..), which are
    empty where the dataset was there already. Rows that its source has got since make a further version, if it may `grow`:
    those whose key is new; rows that are gone from the source stay, and what changed under a key it has is not read again; what
    the source has denied since is denied here too (`withdrawn.py`). An unfinished dataset is gone on with, a different one at
    `directory` is replaced.

    Raises:
        UserError: the source or the directory cannot be used, a split is empty, or every sample was dropped; or there is another dataset,
            and it may not `grow`, since a run has trained on it.
        InfrastructureError: a machine failed more often than tasks are retried.
    """
    shard = config.shard
    assert shard is not None, "called for a config with a shard section"
    found, start = find_made(shard, directory), time.monotonic()
    if found is None and not grow and find_manifest(directory) is not None:
        raise DataError(
            f"shard: the run has trained on the dataset in {directory.url}, of which the config, or the source code of shard.filter, was "
            "another; put it back, or begin anew (--fresh, or another name)"
        )
    if shard.filter is not None and source_hash("shard.filter", shard.filter) is None:
        progress.say(f"warning: shard.filter: the source code of {shard.filter} cannot be read, so nobody would see that it has changed")
    made = _grow(config, directory, found, grow) if found is not None else _make(config, directory, None, None)
    if made is None:
        assert found is not None, "only a dataset that is there can have nothing new"
        progress.say(f"shard        the dataset is there already: {found.written:,} samples in {directory.url}")
        return found, {}
    manifest, filled = made
    return manifest, _metrics(manifest, filled, time.monotonic() - start)


def find_made(shard: Shard, directory: Storage) -> Manifest | None:
    """The manifest at `directory` if it is that of the dataset which `shard` describes, made from the same URL."""
    found = find_manifest(directory)
    return found if found is not None and (found.config, found.source) == (dataset_fingerprint(shard), shard.source.url) else None


def dataset_fingerprint(shard: Shard) -> str:
    """Of what decides the bytes, the source code of the filter too; where the images come from, how they are fetched and how many workers
    read them does not. Raises ConfigError where the filter cannot be found."""
    decides = shard.model_dump(mode="json", include=_DECIDES)
    if shard.filter is not None:
        decides["filter_source"] = source_hash("shard.filter", shard.filter)
    return fingerprint({**decides, "source": {"format": shard.source.format, "columns": shard.source.columns}})


def _grow(config: Config, directory: Storage, found: Manifest, grow: bool) -> tuple[Manifest, _Filled] | None:
    """The next version, or None where the source has nothing new."""
    state = read_state(directory, found.version)
    if state is None:
        return None  # what its rows were is not known
    tidy(directory, found.version)
    return _make(config, directory, found, state) if grow else None


def _make(config: Config, directory: Storage, found: Manifest | None, state: State | None) -> tuple[Manifest, _Filled] | None:
    shard = config.shard
    assert shard is not None, "called for a config with a shard section"
    source = open_source(shard.source, config.storage)
    try:
        survey = source.survey()
    except (DataError, StorageError, CredentialsError) as e:
        if found is None:
            raise
        progress.say(f"warning: the dataset stays as it is, its source cannot be looked at ({e})")
        return None
    if state is not None and survey.stamp == state.stamp:
        return None
    version = found.version + 1 if found else 1
    header = Header(version, dataset_fingerprint(shard), shard.source.url, survey.stamp, source.classes())
    earlier, firsts = Earlier(), dict[str, int]()
    if found is not None and state is not None:
        header = Header(version, header.config, header.source, header.stamp, state.classes, state.rows_a_shard)
        earlier = Earlier([(place_of(directory, n), groups) for n, groups in enumerate(state.groups, 1)])
        firsts = free_numbers(directory, found.version)
    from pipeline.shards.tasks import default_workers  # Ray comes with it, of which a plan has no need

    place, workers = place_of(directory, version), shard.workers or default_workers()
    plan = Planner(shard, source, header, survey.rows, earlier, place, workers).plan(firsts)
    if found is not None:
        withdraw(directory, place)
        if plan.header.read == plan.header.dropped.get(DENIED, 0):  # which the version before has counted, or will never be written
            place.remove()
            write_state(directory, replace(plan.header, read=0), state, found.version)
            return None
    clear(directory, place, is_first=found is None)
    filled = _fill_whole(shard, source, plan, place, directory, workers)
    try:
        manifest, shards = _summarise(shard, plan, filled, found, directory)
    except DataError:
        place.remove()  # for the next attempt the source may have been mended, or be within reach again
        raise
    write_state(directory, plan.header, state, version)
    publish(directory, shards, manifest)
    tidy(directory, version)
    return manifest, filled


@dataclass
class _Filled:
    """What is kept of the shards as they are written."""

    records: list[ShardRecord] = field(default_factory=list)
    smallest: tuple[int, int] = (2**31, 2**31)
    largest_label: int = -1
    read: int = 0
    new_read: int = 0  # without what an earlier job did, that was killed
    new_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, str]] = field(default_factory=list)
    bytes: int = 0

    def add(self, result: dict[str, Any]) -> None:
        is_new = EARLIER not in result
        self.read += result["read"]
        self.new_read += result["read"] * is_new
        self.dropped.update(result["dropped"])
        self.named = first_named(self.named, result["named"])
        if result["record"] is not None:
            self.records.append(ShardRecord(**result["record"]))
            self.bytes += self.records[-1].bytes
            self.new_bytes += self.records[-1].bytes * is_new
            width, height = result["smallest"]
            self.smallest = min(self.smallest[0], width), min(self.smallest[1], height)
        self.largest_label = max(self.largest_label, result["largest_label"])


def _fill_whole(shard: Shard, source: Source, plan: Plan, place: Storage, directory: Storage, workers: int) -> _Filled:
    """All shards, each of one piece, and all by the filter that the plan was made with."""
    if dataset_fingerprint(shard) != plan.header.config:
        raise ConfigError(f"shard.filter: the source code of {shard.filter} has changed since it began; the same command begins anew")
    for _ in range(_ATTEMPTS):
        filled = _fill(shard, source, plan, place, directory, workers)
        mixed = find_mixed(place, directory, {record.name: record for record in filled.records})
        if not mixed:
            return filled
        progress.say(f"shard        {', '.join(mixed)}: two tasks have written it at once, so it is made anew")
        for name in mixed:
            place.remove(f"{STAGE}/{name}.json")
    raise InfrastructureError(f"shard: {', '.join(mixed)}: other tasks write it all the time; is the same job running twice?")


def _fill(shard: Shard, source: Source, plan: Plan, place: Storage, directory: Storage, workers: int) -> _Filled:
    filled, tally = _Filled(), progress.Tally()
    shared = (Filling.of(source, shard, plan.header.classes, workers, len(plan)), place, directory)

    for result in run_recorded("shard", "images", STAGE, fill_shard, plan.jobs, shared, place, workers, tally.told):
        before = filled.bytes
        filled.add(result)
        kept = result["read"] - sum(result["dropped"].values())
        tally.add(kept, result["dropped"], filled.bytes - before, is_new=EARLIER not in result)
    return filled


def _summarise(shard: Shard, plan: Plan, new: _Filled, found: Manifest | None, directory: Storage) -> tuple[Manifest, list[ShardRecord]]:
    """The manifest and all shards of a version, those of the versions before it among them."""
    header = plan.header
    dropped = Counter(header.dropped) + new.dropped
    before = Counter(found.dropped) if found else Counter[str]()
    denied = before.pop(DENIED, 0)  # looked at again, so they are among those of this version, unless they are denied no more
    splits = dict.fromkeys(sorted(shard.splits), 0) | (found.splits if found else {})
    for record in new.records:
        splits[record.split] += record.samples
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
    if not new.records and found is None:
        raise DataError(f"shard.source.url: none of the {header.read} images in {shard.source.url} can be used ({reasons})")
    for split, count in splits.items():
        if count == 0:
            raise DataError(f"shard.splits.{split}: all of its images were dropped (of the whole source: {reasons})")
    shards = ([*ShardTable(directory, version=found.version)] if found else []) + new.records
    named = first_named(header.named, [*new.named, *_still_dropped(found)])
    smallest = new.smallest if found is None else (min(new.smallest[0], found.smallest[0]), min(new.smallest[1], found.smallest[1]))
    dropped += before
    most = max(new.largest_label + 1, len(found.classes) if found else 0)
    manifest = Manifest(
        hash=dataset_hash(shards),
        config=header.config,
        source=shard.source.url,
        # Labels without names have their numbers.
        classes=[printable(c) for c in header.classes] or [str(n) for n in range(most)],
        splits=splits,
        bytes=sum(s.bytes for s in shards),
        read=header.read + (found.read - denied if found else 0),
        written=sum(splits.values()),
        decoded=shard.images.check == "decode",
        ignored=header.ignored,
        dropped=dict(sorted(dropped.items())),
        dropped_samples=named,
        unnamed=dropped.total() - len(named),
        smallest=smallest,
        version=header.version,
    )
    assert manifest.read == manifest.written + sum(manifest.dropped.values()), "every image is written or dropped"
    return manifest, shards


def _still_dropped(found: Manifest | None) -> list[dict[str, str]]:
    return [named for named in found.dropped_samples if named["reason"] != DENIED] if found else []


def _metrics(manifest: Manifest, filled: _Filled, seconds: float) -> dict[str, float]:
    """Of the dataset; rates are those of this job alone."""
    return {
        "shard/read": manifest.read,
        "shard/written": manifest.written,
        "shard/dropped": manifest.read - manifest.written,
        "shard/ignored": manifest.ignored,
        "shard/bytes": manifest.bytes,
        "shard/images_per_s": filled.new_read / seconds,
        "shard/seconds": seconds,
        "shard/mb_per_s": filled.new_bytes / 1e6 / seconds,
        "shard/success_rate": manifest.written / manifest.read,
        **{f"shard/dropped/{reason}": count for reason, count in manifest.dropped.items()},
    }
