"""Which tasks a config asks for, and whether they can be done."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from pipeline.config.evaluate import Suite
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, DataError, choose
from pipeline.core.storage import Storage
from pipeline.evaluate.protocols import Kind, check_protocols
from pipeline.shards.manifest import Manifest, find_manifest
from pipeline.stream import Dataset, open_dataset

TEMPLATES = ("a photo of a {}.",)  # of zero-shot, where none are given


@dataclass(frozen=True)
class Task:
    """A labelled dataset with a split to learn from and a split to be tested on; `hash` names its content.

    For zero-shot: caption `templates`, and `names` to put into them, where they are not those of the classes.
    """

    name: str
    url: str
    train: str
    test: str
    classes: list[str] = field(repr=False)
    hash: str = ""
    endpoint: str | None = None
    templates: tuple[str, ...] = field(default=TEMPLATES, repr=False)
    names: list[str] | None = field(default=None, repr=False)

    def open(self, split: str) -> Dataset:
        return open_dataset(self.url, split, self.endpoint)


def slug(name: str) -> str:
    """`few-shot/5` as `few-shot-5`: for file and metric names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def check_evaluate(config: Config) -> None:
    """Refuse what cannot be done before anything starts.

    Raises:
        ConfigError: a suite given twice, a split that is not there, names of other classes than the dataset's, or what
            `check_protocols` refuses; of a model that `evaluate.model` names `check_subject` tells that. DataError: a suite's dataset
            is missing or has no labels.
    """
    if config.evaluate is None:
        return
    if config.pretrain:
        check_protocols(config.evaluate, Kind.planned(config.pretrain))
    names = [slug(suite.name) for suite in config.evaluate.suites]
    for i, suite in enumerate(config.evaluate.suites):
        if names[i] in names[:i]:
            raise ConfigError(f"evaluate.suites.{i}.name: {suite.name!r} is given twice, its results would overwrite each other")
        _check_suite(config, suite, f"evaluate.suites.{i}")


def fine_tune_seeds(config: Config) -> int:
    assert config.evaluate is not None
    return config.evaluate.fine_tune.seeds or config.evaluate.seeds


def find_tasks(config: Config, dataset_url: str) -> list[Task]:
    """The tasks of `config.evaluate`; `dataset_url` is the dataset that the run was trained on.

    Raises:
        DataError: a dataset is missing or has no labels. ConfigError: it lacks a split.
    """
    assert config.evaluate is not None
    tasks = []
    for i, suite in enumerate(config.evaluate.suites):
        url, where = dataset_url if _is_own(suite) else str(suite.data), f"evaluate.suites.{i}"
        manifest = look_up(url, config.storage.endpoint)
        if manifest is None:
            raise DataError(f"{where}.data: there is no dataset at {url} (no manifest.json)")
        _check_manifest(manifest, suite, url, where)
        task = Task(suite.name, url, suite.train, suite.test, manifest.classes, manifest.hash, config.storage.endpoint)
        tasks.append(replace(task, templates=tuple(suite.templates), names=suite.class_names))
    return tasks


def _is_own(suite: Suite) -> bool:
    return suite.data in (None, "own")


def _check_suite(config: Config, suite: Suite, where: str) -> None:
    if _is_own(suite) and suite.name.startswith("vtab"):
        # Scores on one's own images under a benchmark's name would be false.
        raise ConfigError(
            f"{where}: the public suite {suite.name!r} does not come with this version; give the URL of a dataset as {where}.data"
        )
    if _is_own(suite) and config.shard is not None:
        _check_splits(suite, list(config.shard.splits), where)
        return
    if _is_own(suite) and not config.data:
        raise ConfigError(f"{where}.data: is missing, and the config names no data of its own; give the URL of a dataset")
    if _is_own(suite) and config.data and len(config.data) > 1:
        raise ConfigError(f"{where}.data: is missing; the run is trained on {len(config.data)} datasets, so name the one to evaluate on")
    url = config.data[0].url if _is_own(suite) and config.data else suite.data
    if url is None:  # a config that can only be planned
        return
    manifest = look_up(url, config.storage.endpoint)
    if manifest is not None:
        _check_manifest(manifest, suite, url, where)
    elif not _is_own(suite):
        raise DataError(f"{where}.data: there is no dataset at {url} (no manifest.json)")


def look_up(url: str, endpoint: str | None) -> Manifest | None:
    """The manifest of the dataset at `url` (`URL` or `URL@version`), or None where there is none."""
    base, at, version = url.rpartition("@")
    return find_manifest(Storage(base if at and version.isdigit() else url, endpoint))


def _check_manifest(manifest: Manifest, suite: Suite, url: str, where: str) -> None:
    _check_splits(suite, list(manifest.splits), where)
    if len(manifest.classes) < 2:
        raise DataError(f"{where}: the dataset at {url} has {len(manifest.classes)} classes, evaluation needs labels of two or more")
    if suite.class_names is not None and len(suite.class_names) != len(manifest.classes):
        raise ConfigError(
            f"{where}.class_names: names {len(suite.class_names)} classes, and the dataset at {url} has {len(manifest.classes)}, "
            f"{', '.join(manifest.classes[:3])} .."
        )


def _check_splits(suite: Suite, allowed: list[str], where: str) -> None:
    choose(f"{where}.train", suite.train, allowed)
    choose(f"{where}.test", suite.test, allowed)
    if suite.train == suite.test:
        raise ConfigError(f"{where}.test: {suite.test!r} is also the split to learn from; the score would mean nothing")
