"""Which samples were in step k of a run, and which stand at a position of the training order.

A run is read as its directory tells it, with storage and config alone: run.yaml, and of the newest committed checkpoint the
loader's state. (The room that writes these, `checkpoint/`, stands above this one; the tests make runs with it.)
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.config.data import Data
from pipeline.config.inputs import Image
from pipeline.config.load import parse_config, parse_yaml
from pipeline.config.pretrain import Pretrain
from pipeline.config.schema import Config
from pipeline.core.errors import CheckpointError, ConfigError, DataError, NoSuchRun, UserError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.stream.collection import open_collection
from pipeline.stream.ledger import BadSample, Ledger, Replacement
from pipeline.stream.loader import Stream, open_stream
from pipeline.stream.look import THREADS, class_name
from pipeline.stream.reader import Dataset
from pipeline.stream.skips import told_skip


@dataclass(frozen=True)
class Place:
    """What stands at `position`: sample `number` of `dataset`; `replaced` is what gave way to it."""

    position: int
    dataset: Dataset
    number: int
    epoch: int
    replaced: Replacement | None

    def values(self) -> dict[str, Any]:
        """Plain values of what is not in the sample itself."""
        r = self.replaced
        gone = {"number": r.number, "shard": r.shard, "key": r.key, "reason": r.reason, "detail": r.detail} if r else None
        return {"position": self.position, "epoch": self.epoch, "dataset": self.dataset.directory.url, "replaced": gone}


@dataclass(frozen=True)
class Positions:
    """The sequence of samples that `stream` trains on; `readers` are its datasets, read a sample at a time, since a few of
    many blocks are wanted."""

    stream: Stream
    readers: list[Dataset]

    def at(self, start: int, count: int = 1) -> list[Place]:
        found = self.stream.mixture.at(start, count)
        places = []
        for i, (d, number, epoch) in enumerate(zip(found.dataset.tolist(), found.number.tolist(), found.epoch.tolist(), strict=True)):
            replaced = self.stream.ledger.at(start + i)
            places.append(Place(start + i, self.readers[d], replaced.by if replaced else number, epoch, replaced))
        return places

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """Plain values of what stands there, as it reads now."""
        with ThreadPoolExecutor(THREADS) as pool, Progress("samples", count, "samples") as shown:
            rows = []
            for row in pool.map(self._row, self.at(start, count)):
                rows.append(row)
                shown.update()
            return rows

    def _row(self, place: Place) -> dict[str, Any]:
        dataset = place.dataset
        row: dict[str, Any] = {"micro_batch": place.position // self.stream.micro_batch, **place.values(), "number": place.number}
        row |= {
            "shard": dataset.shards[dataset.locate(place.number)[0]].name,
            "key": "",
            "label": -1,
            "class": "",
            "caption": "",
            "problem": "",
        }
        try:
            sample = dataset.read(place.number)
        except BadSample as e:
            return row | {"key": e.key, "problem": str(e)}
        return row | {"key": sample.key, "label": sample.label, "class": class_name(dataset.classes, sample.label), "caption": sample.text}


def open_positions(url: str, split: str, endpoint: str | None, seed: int, batch: int) -> Positions:
    """The order in which a config with this seed and batch would train on one dataset."""
    data = [Data(url=url)]
    stream = open_stream(
        open_collection(data, split, endpoint), global_batch=batch, micro_batch=batch, seed=seed, image=Image(pixels=1, enlarge=True)
    )
    return Positions(stream, _readers(stream, data, split, endpoint))


# Runs


@dataclass(frozen=True)
class PastRun:
    """`newest` is the step of the newest committed checkpoint, 0 where there is none; before step 1 the samples of `first` global batches
    were trained on."""

    directory: Storage
    pretrain: Pretrain
    positions: Positions
    newest: int
    first: int
    steps: int

    def start_of(self, step: int) -> int:
        """The position where `step` (from 1) begins. Raises UserError where the run has no such step."""
        batch = self.first + step - 1
        if not 1 <= step <= self.steps or batch < 0:
            raise UserError(f"run {self.directory.url}: there is no step {step:,} in it (its steps: 1 to {self.steps:,})")
        return self.positions.stream.ledger.position(batch * self.pretrain.batch)

    def skips(self) -> list[dict[str, Any]]:
        """Plain values of the batches that did not train the model, as far as the newest checkpoint knows them."""
        ledger = self.positions.stream.ledger
        return [{**values, "told": told_skip(skip)} for values, skip in zip(ledger.skips_as_values(), ledger.skips, strict=True)]

    def step(self, step: int) -> dict[str, Any]:
        """Plain values of one optimiser step, replacements applied as far as the newest checkpoint knows them."""
        start, p = self.start_of(step), self.pretrain
        notes = []
        if step > self.newest:
            since = f"after the newest checkpoint, of step {self.newest:,}" if self.newest else "and there is no checkpoint yet"
            notes.append(f"step {step:,} is {since}: what had to be replaced or skipped there is not known")
        skips = self.positions.stream.ledger.skips
        notes += [told_skip(skip) for skip in skips if start == (skip.last if skip.is_passed else skip.first)]
        if p.start and p.start.load == "all":
            notes.append(f"the run goes on from {p.start.from_}: steps up to the one there were that run's")
        samples = self.positions.rows(start, p.batch)
        return {"run": self.directory.url, "step": step, "steps": self.steps, "start": start, "notes": notes, "samples": samples}


def open_run(url: str, endpoint: str | None = None) -> PastRun:
    """The run whose directory is at `url`; `endpoint` is by default the one of its config, once that could be read.

    Raises:
        NoSuchRun: there is none. DataError: its data are not what they were. CheckpointError, ConfigError: it cannot be read.
    """
    directory = Storage(url, endpoint)
    config = _config(directory)
    p, endpoint = config.pretrain, endpoint or config.storage.endpoint
    if p is None:
        raise ConfigError(f"run {directory.url}: its config has no pretrain section, so it has no steps")
    data = config.data or [Data(url=f"{directory.url}/shards")]
    collection = open_collection(data, p.split, endpoint, block=p.loader.block)
    newest, state = _newest_state(directory)
    stream = open_stream(
        collection,
        global_batch=p.batch,
        micro_batch=p.micro_batch,
        seed=config.seed,
        image=p.image,
    )
    if state:
        stream.ledger = Ledger.from_values(state["replaced"], skips=state["skipped"])
    if state and state["view"] != stream.view:
        raise DataError(
            f"run {directory.url}: its data are no longer what it was trained on (view {state['view'][:12]}.., now {stream.view[:12]}..)"
        )
    if not state and p.start and p.start.load == "all":
        raise UserError(
            f"run {directory.url}: it goes on from {p.start.from_} and has no checkpoint yet, so where its steps begin is not known"
        )
    first = (state["consumed"] - stream.ledger.passed(state["consumed"])) // p.batch - newest if state else 0
    return PastRun(
        directory,
        p,
        Positions(stream, _readers(stream, data, p.split, endpoint)),
        newest,
        first,
        p.duration.steps(p.batch, collection.samples),
    )


def _readers(stream: Stream, data: list[Data], split: str, endpoint: str | None) -> list[Dataset]:
    if all(d.directory.is_local for d in stream.datasets):
        return stream.datasets
    return open_collection(data, split, endpoint, block=1).datasets


def _config(run: Storage) -> Config:
    where = f"{run.url}/run.yaml"
    try:
        record = parse_yaml(run.read("run.yaml"), where)
    except FileNotFoundError:
        raise NoSuchRun(f"run {run.url}: there is no run here (no run.yaml)") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{where}: is not the record of a run (needed: config)")
    try:
        return parse_config(record["config"])
    except ConfigError as e:
        raise ConfigError(f"run {run.url}: this version refuses its config ({e})") from e


def _newest_state(run: Storage) -> tuple[int, dict[str, Any] | None]:
    """(step, loader's state) of the newest committed checkpoint; (0, None) where there is none."""
    checkpoints = run / "checkpoints"
    for step in sorted((int(m[1]) for name in checkpoints.names() if (m := re.fullmatch(r"step-(\d+)", name))), reverse=True):
        try:
            commit = checkpoints.read(f"step-{step}/COMMIT.json")
        except FileNotFoundError:
            continue  # not finished, or set aside
        where = f"checkpoint {checkpoints.url}/step-{step}"
        try:
            state = json.loads(checkpoints.read(f"step-{step}/{json.loads(commit)['attempt']}/state.json"))["loader"]
            return step, {**{name: state[name] for name in ("consumed", "view", "replaced")}, "skipped": state.get("skipped", [])}
        except FileNotFoundError:
            raise CheckpointError(f"{where}: holds no state.json; an older version wrote it, or it is damaged") from None
        except (ValueError, LookupError, TypeError) as e:
            raise CheckpointError(f"{where}: its loader's state cannot be read ({e!r})") from e
    return 0, None
