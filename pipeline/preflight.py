"""What is found out of a config before anything starts: `check_config` and `check_resources` find what is wrong, `plan_config` says
what would happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.checkpoint import Checkpoints
from pipeline.checkpoint.lease import check_conditional
from pipeline.checkpoint.model import check_start
from pipeline.checkpoint.run import kept_micro_batch, run_directory, tracking_uri
from pipeline.config import Config
from pipeline.config.data import Data
from pipeline.core.errors import choose
from pipeline.core.functions import load_function
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.evaluate.scoring import check_scores
from pipeline.evaluate.subject import check_subject
from pipeline.evaluate.tasks import check_evaluate, look_up
from pipeline.models import build
from pipeline.objectives import Facts
from pipeline.plan import Plan, make_plan
from pipeline.plan.calibration import find_measured
from pipeline.plan.devices import find_device
from pipeline.plan.fit import check_fits, has_auto, settle
from pipeline.plan.plan import check_groups
from pipeline.shards.duplicates.stage import check_sets
from pipeline.shards.job import find_made
from pipeline.shards.scores import check_columns
from pipeline.shards.sources import check_source, open_source
from pipeline.shards.takedown import check_lists
from pipeline.stream import Collection, open_collection
from pipeline.stream.collection import Reading
from pipeline.stream.reader import BLOCK
from pipeline.train.inputs import check_captions, check_teacher, named_inputs, options_of, planned_facts
from pipeline.train.library import check_deepspeed, check_precision, is_slow
from pipeline.train.preflight import check_pretrain
from pipeline.train.scores import check_data, splits_of


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
    if config.shard and write and (fresh or not has_trained(config)):  # a plan reads no weights
        check_scores(config.shard.scores, endpoint)
        check_lists(config.shard.takedown, endpoint)
        check_sets(config.shard.contamination, endpoint)
    check_subject(config)
    is_to_run = write or _is_at_hand(config)  # a recipe can be planned with nothing at hand
    classes = None
    if p and config.data and not _data_urls(config) & coming and is_to_run:
        data = open_data(config, config.data)
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
    if p and is_to_run and (fresh or not has_trained(config)):  # with checkpoints of its own a run needs no other
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
    data = open_data(config, config.data or [Data(url=(run_directory(config) / "shards").url)])
    return data.samples, facts(len(data.classes)), data.reading, False


def _data_urls(config: Config) -> set[str]:
    """Of the datasets that `data` names."""
    return {Storage(part.url, config.storage.endpoint).url for part in config.data or [] if part.url}


def _is_at_hand(config: Config) -> bool:
    """Whether all of `data` is named; a config without can be planned alone."""
    return all(part.url for part in config.data or [])


def open_data(config: Config, data: list[Data]) -> Collection:
    assert config.pretrain is not None, "data is read to train on it"
    loader = config.pretrain.loader
    return open_collection(data, config.pretrain.split, config.storage.endpoint, block=loader.block, cache=loader.cache)


def has_trained(config: Config) -> bool:
    """Whether its run has begun to train: then it goes on with the data it began with."""
    return config.pretrain is not None and bool(Checkpoints(run_directory(config)).steps())


def _is_local(config: Config) -> bool:
    return Storage(config.storage.url).is_local
