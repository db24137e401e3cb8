"""The stages of one config, in order, on the Ray that is there: shard, pretrain, evaluate, report.

`check_config` and `check_resources` find what is wrong before anything starts; `run_stages` runs; `plan_config` says
what would happen. Each stage that is finished already is passed over, so that the same command again goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import yaml

from pipeline import report
from pipeline.checkpoint import Checkpoints, Run, claim_run
from pipeline.checkpoint.commit import check_conditional
from pipeline.checkpoint.model import check_start
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.run import flatten, kept_micro_batch, run_directory, tracking_uri
from pipeline.config import Config, fingerprint
from pipeline.config.data import Data
from pipeline.core.errors import CheckpointError, TesseraError, choose
from pipeline.core.functions import load_function
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.tracking import Tracker
from pipeline.evaluate.results import Result
from pipeline.evaluate.scoring import check_scores, score_dataset
from pipeline.evaluate.subject import check_subject
from pipeline.evaluate.tasks import check_evaluate, find_tasks, look_up
from pipeline.models import build
from pipeline.objectives import Facts
from pipeline.plan import Plan, make_plan
from pipeline.plan.calibration import find_measured
from pipeline.plan.devices import find_device
from pipeline.plan.fit import check_fits, has_auto, settle
from pipeline.plan.plan import check_groups
from pipeline.shards.duplicates.stage import check_sets, treat_copies
from pipeline.shards.job import find_made, make_dataset
from pipeline.shards.scores import check_columns
from pipeline.shards.sources import check_source, open_source
from pipeline.shards.statistics import encode_statistics, file_of, keep_statistics
from pipeline.shards.takedown import check_lists, take_down
from pipeline.stream import Collection, open_collection
from pipeline.stream.collection import Reading
from pipeline.stream.reader import BLOCK
from pipeline.train.inputs import check_captions, check_teacher, named_inputs, options_of, planned_facts
from pipeline.train.keeper import Signals
from pipeline.train.library import check_deepspeed, check_precision, is_slow
from pipeline.train.preflight import check_pretrain
from pipeline.train.scores import check_data, splits_of

TIMINGS = "timings.json"


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show."""

    run: Run
    results: list[Result]
    page: str | None


def check_config(config: Config) -> None:
    """Raises ConfigError for what is wrong with a config in itself; touches nothing outside it."""
    tracking_uri(config)
    p = config.pretrain
    if p:
        check_pretrain(p, has_many=len(config.data or []) > 1)
        check_groups(config)
        find_device(config.cluster, 1)
        if config.shard:
            choose("pretrain.split", p.split, config.shard.splits)
            if p.validation:
                choose("pretrain.validate.split", p.validation.split, config.shard.splits)
            for path, url, split in splits_of(p):
                if url is None:
                    choose(path, split, config.shard.splits)
    if config.shard:
        check_columns(config.shard.scores)
    check_evaluate(config)


def made_by(configs: Sequence[Config]) -> frozenset[str]:
    """URLs of the datasets that these configs will have made."""
    return frozenset((run_directory(config) / "shards").url for config in configs if config.shard)


def check_resources(config: Config, write: bool = True, coming: frozenset[str] = frozenset(), fresh: bool = False) -> None:
    """Raises TesseraError for what the config names and is not there, or cannot be used: source, data, storage, start.

    With `write`, an object is written to the storage and removed. Datasets at the URLs of `coming` need not be there yet. With `fresh`,
    what the run has there already is not looked at.
    """
    p, endpoint = config.pretrain, config.storage.endpoint
    if p and config.cluster.is_local:
        check_precision(p.precision)
        if write and is_slow(p.precision):
            say("warning: pretrain.precision: this CPU has no instructions for bf16, and fp32 would be many times as fast")
    if p and write:  # a plan imports no engine
        check_deepspeed(p)
    if config.shard and not find_made(config.shard, run_directory(config) / "shards"):
        check_source(config.shard, config.storage)
        if config.shard.filter is not None:
            load_function("shard.filter", config.shard.filter)
    if config.shard and write and (fresh or not _has_trained(config)):  # a plan reads no weights
        check_scores(config.shard.scores, endpoint)
        check_lists(config.shard.takedown, endpoint)
        check_sets(config.shard.contamination, endpoint)
    check_subject(config)
    is_to_run = write or _is_at_hand(config)  # a recipe can be planned with nothing at hand
    classes = None
    if p and config.data and not _data_urls(config) & coming and is_to_run:
        data = _open_data(config, config.data)
        data.check_pixels(p.image)
        data.check_cache(p.loader.cache)
        classes = data.classes
        check_captions(p, data)
        plan, _, _ = plan_config(config, fresh=fresh)
        assert plan is not None, "it has a section pretrain"
        if write:  # a plan alone says that it does not fit, and what would
            check_fits(plan)
    if p and is_to_run:
        own = str(config.data[0].url) if config.data and not _data_urls(config) & coming else None
        check_data(p, own, lambda url: look_up(url, endpoint))
        check_teacher(p, classes, endpoint)
    if p and is_to_run and (fresh or not _has_trained(config)):  # with checkpoints of its own a run needs no other
        named = named_inputs(p, endpoint, None if fresh else run_directory(config))
        if p.start:
            check_start(p.start.from_, p.start.load, lambda n: build(p.model.name, options_of(p, n, named), device="meta"), endpoint)
    if write:
        root = Storage(config.storage.url, endpoint)
        root.check_writable()
        check_conditional(root, is_needed=p is not None and config.storage.conditional)


def plan_config(config: Config, before: Sequence[Config] = (), fresh: bool = False) -> tuple[Plan | None, bool, int]:
    """The plan of pre-training; whether its number of samples is an estimate, since the dataset may not be made yet (by it, or by
    those that run `before` it), and some images may then be dropped; and the number of workers it is for. With `fresh`, what the
    run has there already is not looked at. Starts and writes nothing."""
    workers = planned_workers(config)
    if config.pretrain is None:
        return None, False, workers
    samples, facts, reading, estimated = _survey(config, before, fresh)
    plan = make_plan(config, samples, facts, workers, reading)
    return replace(plan, measured=find_measured(plan.load, plan.device)), estimated, workers


def settle_config(config: Config, before: Sequence[Config] = (), fresh: bool = False) -> Config:
    """`config` with numbers where it says `auto`, as the run is claimed with them. A run that is there keeps its micro-batch, on which
    what it computes depends; the stage is chosen anew at each submission, for the machines that there are.

    Raises:
        ConfigError: as `plan.fit.settle`.
    """
    if not has_auto(config.pretrain):
        return config
    return settle(config, _survey(config, before, fresh)[1], planned_workers(config), None if fresh else kept_micro_batch(config))


def planned_workers(config: Config) -> int:
    gpus = torch.cuda.device_count() if config.cluster.gpus is None else config.cluster.gpus
    return config.cluster.workers or gpus or max(2, config.cluster.min_workers or 0)


def _survey(config: Config, before: Sequence[Config], fresh: bool) -> tuple[int, Facts, Reading | None, bool]:
    """Samples of an epoch, what the model depends on, what reading asks of the store, and whether the samples are an estimate."""
    p = config.pretrain
    assert p is not None, "called for a config that pre-trains"
    # A recipe is planned with nothing at hand, the run that it starts from among it.
    named = named_inputs(p, config.storage.endpoint, None if fresh else run_directory(config)) if _is_at_hand(config) else None

    def facts(classes: int) -> Facts:
        planned = planned_facts(p, classes)
        return named.facts(classes, planned) if named else planned

    if config.data and not _is_at_hand(config):
        samples, classes = sum(part.samples or 0 for part in config.data), max(part.classes or 0 for part in config.data)
        return samples, facts(classes), None, True
    maker = next((c for c in [*before, config] if c.shard and (c is config or made_by([c]) & _data_urls(config))), None)
    if maker and maker.shard and not find_made(maker.shard, run_directory(maker) / "shards"):
        survey = open_source(maker.shard.source, maker.storage).survey()
        samples = max(1, round(survey.rows * maker.shard.splits[p.split]))
        reading = Reading(survey.mean, p.loader.block or (1 if _is_local(config) else BLOCK))
        return samples, facts(survey.classes), reading, True
    data = _open_data(config, config.data or [Data(url=(run_directory(config) / "shards").url)])
    return data.samples, facts(len(data.classes)), data.reading, False


def _data_urls(config: Config) -> set[str]:
    """Of the datasets that `data` names."""
    return {Storage(part.url, config.storage.endpoint).url for part in config.data or [] if part.url}


def _is_at_hand(config: Config) -> bool:
    """Whether all of `data` is named; a config without can be planned alone."""
    return all(part.url for part in config.data or [])


def _open_data(config: Config, data: list[Data]) -> Collection:
    assert config.pretrain is not None, "data is read to train on it"
    loader = config.pretrain.loader
    return open_collection(data, config.pretrain.split, config.storage.endpoint, block=loader.block, cache=loader.cache)


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


def _has_trained(config: Config) -> bool:
    """Whether its run has begun to train: then it goes on with the data it began with."""
    return config.pretrain is not None and bool(Checkpoints(run_directory(config)).steps())


def _is_local(config: Config) -> bool:
    return Storage(config.storage.url).is_local


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
            data = _open_data(self.config, self.run.data)
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
            has_trained = _has_trained(self.config)
            manifest, metrics = make_dataset(self.config, directory, grow=not has_trained)
            tracker.tags({"dataset.hash": manifest.hash})
            tracker.metrics(metrics if has_trained else metrics | self._mark(directory))
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
