"""Which tasks a config asks for, and whether they can be done."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pipeline.config.schema import Config, Suite
from pipeline.core.errors import ConfigError, DataError, choose
from pipeline.core.storage import Storage
from pipeline.models import check_model
from pipeline.shards.manifest import Manifest, find_manifest
from pipeline.stream import Dataset, open_dataset

# Protocol -> what it measures, in a short phrase for people.
PROTOCOLS = {
    "supervised": "the model's own head",
    "linear": "logistic regression on frozen features",
    "few-shot": "least squares on a few labelled images a class, frozen features",
    "fine-tune": "all weights trained on, with a new head at a higher resolution",
}


@dataclass(frozen=True)
class Task:
    """A labelled dataset with a split to learn from and a split to be tested on; `hash` names its content."""

    name: str
    url: str
    train: str
    test: str
    classes: list[str] = field(repr=False)
    hash: str = ""
    endpoint: str | None = None

    def open(self, split: str) -> Dataset:
        return open_dataset(self.url, split, self.endpoint)


def slug(name: str) -> str:
    """`few-shot/5` as `few-shot-5`: for file and metric names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def check_evaluate(config: Config) -> None:
    """Refuse what cannot be done before anything starts.

    Raises:
        ConfigError: an unknown protocol, a suite given twice, a split that is not there, a resolution that the patches
            do not divide. DataError: a suite's dataset is missing or has no labels.
    """
    if config.evaluate is None or config.pretrain is None:
        return
    for i, protocol in enumerate(config.evaluate.protocols):
        choose(f"evaluate.protocols.{i}", protocol, PROTOCOLS)
    names = [slug(suite.name) for suite in config.evaluate.suites]
    for i, suite in enumerate(config.evaluate.suites):
        if names[i] in names[:i]:
            raise ConfigError(f"evaluate.suites.{i}.name: {suite.name!r} is given twice, its results would overwrite each other")
        _check_suite(config, suite, f"evaluate.suites.{i}")
    if "fine-tune" in config.evaluate.protocols:
        model, pixels = config.pretrain.model, fine_tune_pixels(config)
        patch = check_model(model.name, model.arguments, config.pretrain.image.pixels).patch
        if pixels % patch:
            raise ConfigError(f"evaluate.fine_tune.pixels: {pixels} is not a multiple of the patch, {patch} pixels")


def fine_tune_pixels(config: Config) -> int:
    """The input side of fine-tuning, in pixels: as told, or twice that of pre-training."""
    assert config.evaluate is not None and config.pretrain is not None
    return config.evaluate.fine_tune.pixels or 2 * config.pretrain.image.pixels


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
        tasks.append(Task(suite.name, url, suite.train, suite.test, manifest.classes, manifest.hash, config.storage.endpoint))
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
    if _is_own(suite) and config.data and len(config.data) > 1:
        raise ConfigError(f"{where}.data: is missing; the run is trained on {len(config.data)} datasets, so name the one to evaluate on")
    url = config.data[0].url if _is_own(suite) and config.data else str(suite.data)
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


def _check_splits(suite: Suite, allowed: list[str], where: str) -> None:
    choose(f"{where}.train", suite.train, allowed)
    choose(f"{where}.test", suite.test, allowed)
    if suite.train == suite.test:
        raise ConfigError(f"{where}.test: {suite.test!r} is also the split to learn from; the score would mean nothing")
