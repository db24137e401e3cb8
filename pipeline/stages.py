"""The stages of one config, in order, on the Ray that is there: shard, pretrain, evaluate, report.

Each stage that is finished already is passed over, so that the same command again goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import yaml

from pipeline import report
from pipeline.checkpoint import Checkpoints, Run, claim_run
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.run import flatten
from pipeline.config import Config, fingerprint
from pipeline.core.errors import CheckpointError, TesseraError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.tracking import Tracker
from pipeline.evaluate.results import Result
from pipeline.evaluate.scoring import score_dataset
from pipeline.evaluate.tasks import find_tasks
from pipeline.preflight import has_trained, open_data
from pipeline.shards.duplicates.stage import treat_copies
from pipeline.shards.job import make_dataset
from pipeline.shards.statistics import encode_statistics, file_of, keep_statistics
from pipeline.shards.takedown import take_down
from pipeline.stream import Collection
from pipeline.train.keeper import Signals

TIMINGS = "timings.json"


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show."""

    run: Run
    results: list[Result]
    page: str | None


def _is_trained(checkpoints: Checkpoints, steps: int) -> bool:
    """Whether the newest checkpoint is of the last step, and every byte of it as it was saved. Of another step it is not read. A
    damaged one is left to the workers: to set it aside needs the lease that they hold."""
    commits = checkpoints.commits()
    if not commits or commits[-1].step != steps:
        return False
    try:
        verify(checkpoints, commits[-1])
    except CheckpointError:
        return False
    return True


def run_stages(config: Config, *, command: str, fresh: bool = False) -> Outcome:
    """Run the stages of `config`, going on with what an earlier call of it left; Ray must be connected.

    Raises:
        TesseraError: with one plain sentence; what was finished before stays.
    """
    run = claim_run(config, fresh)
    if not run.is_new:
        say(f"going on with the run in {run.directory.url}")
    tracker = run.tracker()
    try:
        tracker.params(flatten(config.model_dump(mode="json", by_alias=True)))
        tracker.tags({"tessera.run": run.directory.url, "tessera.config": fingerprint(config)})
        tracker.artifact("", "config.yaml", yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False).encode())
        outcome = _Stages(run, tracker, command).run_all()
    except BaseException as e:
        tracker.close("FAILED" if isinstance(e, TesseraError) else "KILLED", timeout=10)
        raise
    tracker.close()
    return outcome


def write_joint_page(outcomes: Sequence[Outcome], command: str) -> str:
    """One page of several runs, in the place of the first's own; its URL."""
    return report.write_joint_report([report.Shown(o.run.directory, o.run.config, o.run.dataset_url) for o in outcomes], command)


class _Stages:
    def __init__(self, run: Run, tracker: Tracker, command: str) -> None:
        self.run, self.tracker, self.command = run, tracker, command
        self.config = run.config
        self.times: list[dict[str, str | float]] = self._read_times()

    def run_all(self) -> Outcome:
        results: list[Result] = []
        if self.config.shard:
            self._shard()
        if self.config.pretrain:
            data = open_data(self.config, self.run.data)
            data.check_pixels(self.config.pretrain.image)
            data.check_cache(self.config.pretrain.loader.cache)
            self.tracker.tags({"dataset.hash": data.hash})
            self.tracker.params({"dataset.hash": data.hash})
            if self.config.evaluate:
                find_tasks(self.config, self.run.dataset_url)  # what is wrong with a task is said before the training
            self._pretrain(data)
        if self.config.evaluate:
            results = self._evaluate()
        with self._timed("report", "page"):
            page = report.write_report(self.run.directory, self.config, self.run.dataset_url, self.command)
        self.tracker.artifact("report", "index.html", self.run.directory.read("report/index.html"))
        return Outcome(self.run, results, page)

    def _shard(self) -> None:
        directory = self.run.directory / "shards"
        with self._stage("shard") as tracker, self._timed("shard", "source to shards"):
            may_grow = not has_trained(self.config)
            manifest, metrics = make_dataset(self.config, directory, grow=may_grow)
            tracker.tags({"dataset.hash": manifest.hash})
            tracker.metrics(metrics | self._mark(directory) if may_grow else metrics)
            # Last, since the indices may have got further columns.
            tracker.artifact("shard", file_of(manifest), encode_statistics(keep_statistics(directory, manifest)))

    def _mark(self, directory: Storage) -> dict[str, float]:
        """What is done to the finished dataset: columns for its indices, and deny-lists. Metrics."""
        shard = self.config.shard
        assert shard is not None, "called for a config that makes a dataset"
        metrics = treat_copies(directory, shard) | score_dataset(directory, shard.scores, shard.workers)
        if shard.takedown:
            done = take_down(directory, shard.takedown, shard.workers)
            metrics |= {"shard/takedown/samples": done.samples, "shard/takedown/unmatched": done.unmatched}
        return metrics

    def _pretrain(self, data: Collection) -> None:
        p = self.config.pretrain
        assert p is not None, "called for a config that pre-trains"
        steps = p.duration.steps(p.batch, data.samples)
        if _is_trained(Checkpoints(self.run.directory), steps):
            say(f"pretrain     finished already, at step {steps:,}")
            with self._stage("pretrain"):
                return  # what an earlier submission could not send to MLflow is sent now
        from pipeline.train.job import pretrain  # Ray comes with it, of which a plan has no need

        began = time.perf_counter()
        signals = Signals()
        with signals.listening():
            parts = pretrain(self.run, signals)
        rest = time.perf_counter() - began - sum(parts.values())
        for part, seconds in {**parts, "starting workers": parts.get("starting workers", 0.0) + rest}.items():
            self._add_time("pretrain", part, seconds)

    def _evaluate(self) -> list[Result]:
        from pipeline.evaluate.job import evaluate

        with self._stage("evaluate") as tracker, self._timed("evaluate", "all tasks"):
            results, metrics = evaluate(self.config, self.run.directory, self.run.dataset_url)
            tracker.metrics(metrics)
            self.tracker.metrics(metrics)
        return results

    @contextmanager
    def _stage(self, name: str) -> Iterator[Tracker]:
        """The nested MLflow run of one stage, ended as the stage ends."""
        tracker = self.run.tracker(name)
        try:
            yield tracker
        except BaseException:
            tracker.close("FAILED", timeout=10)
            raise
        tracker.close()

    @contextmanager
    def _timed(self, stage: str, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._add_time(stage, part, time.perf_counter() - began)

    def _read_times(self) -> list[dict[str, str | float]]:
        try:
            return json.loads(self.run.directory.read(TIMINGS))
        except FileNotFoundError:
            return []

    def _add_time(self, stage: str, part: str, seconds: float) -> None:
        """Add to what earlier submissions of this run spent, and keep it at once."""
        for row in self.times:
            if (row["stage"], row["part"]) == (stage, part):
                row["seconds"] = float(row["seconds"]) + seconds
                break
        else:
            self.times.append({"stage": stage, "part": part, "seconds": seconds})
        self.run.directory.write(TIMINGS, json.dumps(self.times).encode())
