"""Accuracy while training, on a small task with labels: of nearest neighbours, and of captions. All ranks share the work, and make the
same number of forward passes, so that collectives match at every ZeRO stage.

Shapes: b micro-batch, N images of a bank, M test images, D features, C classes, T captions of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config.inputs import Cache
from pipeline.config.pretrain import Pretrain
from pipeline.config.validate import Knn, ZeroShot
from pipeline.core.errors import ConfigError, choose
from pipeline.core.world import World
from pipeline.objectives import OBJECTIVES, VALIDATION, Objective
from pipeline.objectives.scores import mean_captions, nearest_classes
from pipeline.shards.manifest import Manifest
from pipeline.stream import Dataset, open_dataset
from pipeline.stream.batches import MicroBatch, evaluation_batches, filler
from pipeline.stream.text import Tokenizer
from pipeline.train.speed import Row
from pipeline.train.watch import VALIDATING, beat
from pipeline.train.zero import Engine

WHERE = "pretrain.validate"
KNN, ZERO_SHOT = "knn", "zero_shot"


@dataclass(frozen=True)
class Task:
    """A labelled test split, and for nearest neighbours the `bank` whose labels are known; of each, the numbers of the samples to take."""

    test: Dataset
    numbers: list[int]
    bank: Dataset | None = None
    bank_numbers: list[int] | None = None


@dataclass(frozen=True)
class Scores:
    """What is scored; None where it is not asked for."""

    knn: Task | None = None
    zero_shot: Task | None = None


def wanted(p: Pretrain) -> list[str]:
    """Names of the metrics that validation scores beside the objective's own."""
    v = p.validation
    return [name for name in (KNN, ZERO_SHOT) if v and getattr(v, name) is not None]


def check_scores(p: Pretrain, has_many: bool) -> None:
    """Raises ConfigError for a score that the objective's models cannot have, or whose data is not named; `has_many`: the run has more than
    one dataset."""
    if p.validation is None:
        return
    if p.validation.zero_shot is not None and OBJECTIVES[p.objective.name].families != {"clip"}:
        allowed = ", ".join(sorted(name for name, kind in OBJECTIVES.items() if kind.families == {"clip"}))
        raise ConfigError(
            f"{WHERE}.zero_shot: needs a model that embeds captions, and {p.objective.name!r} trains none (allowed: {allowed})"
        )
    for name in wanted(p):
        if has_many and getattr(p.validation, name).data is None:
            raise ConfigError(f"{WHERE}.{name}.data: is missing; the run is trained on several datasets, so name the one to score on")


def splits_of(p: Pretrain) -> Iterator[tuple[str, str | None, str]]:
    """(config path, URL of a dataset or None for the run's own, split) of all that is scored."""
    if p.validation is None:
        return
    if (knn := p.validation.knn) is not None:
        yield f"{WHERE}.knn.train", knn.data, knn.train or p.split
        yield f"{WHERE}.knn.test", knn.data, knn.test or p.validation.split
    if (zero_shot := p.validation.zero_shot) is not None:
        yield f"{WHERE}.zero_shot.split", zero_shot.data, zero_shot.split or p.validation.split


def check_data(p: Pretrain, own: str | None, manifest_of: Callable[[str], Manifest | None]) -> None:
    """Raises ConfigError where what is scored has no such split, fewer than two classes, or other classes than are named. `own` is the URL
    of the run's dataset; None where that is not there yet."""
    for path, url, split in splits_of(p):
        if (url := url or own) is None:
            continue
        manifest, where = manifest_of(url), path.rpartition(".")[0]
        if manifest is None:
            raise ConfigError(f"{where}.data: there is no dataset at {url} (no manifest.json)")
        choose(path, split, manifest.splits)
        if len(manifest.classes) < 2:
            raise ConfigError(f"{where}: needs labels of two classes or more, and the dataset at {url} has {len(manifest.classes)}")
        zero_shot = p.validation.zero_shot if p.validation and where.endswith(ZERO_SHOT) else None
        if zero_shot and zero_shot.class_names is not None and len(zero_shot.class_names) != len(manifest.classes):
            named = f"names {len(zero_shot.class_names)} classes, and the dataset at {url} has {len(manifest.classes)}"
            raise ConfigError(f"{where}.class_names: {named}")


def open_scores(p: Pretrain, own: str, endpoint: str | None, cache: Cache) -> Scores:
    """Raises DataError, ConfigError: a dataset is missing, or has no labels."""

    def part(where: str, url: str | None, split: str, most: int, seed: int) -> tuple[Dataset, list[int]]:
        dataset = open_dataset(url or own, split, endpoint, cache=cache)
        labelled = np.flatnonzero(dataset.labels() >= 0)
        if len(labelled) == 0 or len(dataset.manifest.classes) < 2:
            raise ConfigError(f"{where}: needs labels, and the split {split!r} of {url or own} has none")
        if len(labelled) > most:  # the same each time
            labelled = np.sort(np.random.default_rng(seed).choice(labelled, most, replace=False))
        return dataset, labelled.tolist()

    v = p.validation
    knn: Knn | None = v.knn if v else None
    zero_shot: ZeroShot | None = v.zero_shot if v else None
    neighbours = captions = None
    if v and knn is not None:
        test = part(f"{WHERE}.knn", knn.data, knn.test or v.split, knn.samples, 0)
        neighbours = Task(*test, *part(f"{WHERE}.knn", knn.data, knn.train or p.split, knn.bank, 1))
    if v and zero_shot is not None:
        captions = Task(*part(f"{WHERE}.zero_shot", zero_shot.data, zero_shot.split or v.split, zero_shot.samples, 0))
    return Scores(neighbours, captions)


def score(engine: Engine, objective: Objective, scores: Scores, tokenizer: Tokenizer | None, p: Pretrain, world: World) -> Row:
    """Top-1 accuracies between 0 and 1, the same on every rank. The model is in evaluation mode; no gradient is kept."""
    row: Row = {}
    if scores.knn and p.validation and p.validation.knn:
        row[f"{VALIDATION}{KNN}"] = _knn(engine, objective, scores.knn, p, p.validation.knn, world)
    if scores.zero_shot and p.validation and p.validation.zero_shot:
        assert tokenizer is not None, "objectives of captions come with a tokenizer"
        row[f"{VALIDATION}{ZERO_SHOT}"] = _zero_shot(engine, objective, scores.zero_shot, tokenizer, p, p.validation.zero_shot, world)
    return row


def _knn(engine: Engine, objective: Objective, task: Task, p: Pretrain, knn: Knn, world: World) -> float:
    assert task.bank is not None and task.bank_numbers is not None, "opened with a bank"
    with engine.answering(engine.model.features):

        def features(batch: MicroBatch) -> torch.Tensor:
            pixels = objective.inputs.pixels if "palette" in objective.needs and objective.families == {"igpt"} else objective.inputs.images
            return engine.module(pixels(batch))

        bank, labels = (world.rows(own) for own in _run(features, task.bank, task.bank_numbers, p, world))
        images, truth = _run(features, task.test, task.numbers, p, world)
    predicted = nearest_classes(bank, labels, images, len(task.test.manifest.classes), knn.k, knn.temperature)
    return _accuracy(predicted, truth, world)


def _zero_shot(
    engine: Engine, objective: Objective, task: Task, tokenizer: Tokenizer, p: Pretrain, zero_shot: ZeroShot, world: World
) -> float:
    names = zero_shot.class_names or task.test.manifest.classes
    captions = [template.replace("{}", name) for name in names for template in zero_shot.templates]
    own: list[torch.Tensor] = []
    places: list[int] = []
    for turn in range(-(-len(captions) // (p.micro_batch * world.size))):
        beat(VALIDATING)
        start = (turn * world.size + world.rank) * p.micro_batch
        mine = range(start, min(start + p.micro_batch, len(captions)))
        tokens = tokenizer([captions[n] for n in mine] or captions[:1], engine.model.options.context)
        own.append(engine.module(tokens=tokens.to(world.device))[1].float()[: len(mine)])
        places += mine
    order = world.rows(torch.tensor(places, dtype=torch.int64, device=world.device)).argsort()
    classes = mean_captions(world.rows(torch.cat(own))[order], len(names))
    images, truth = _run(lambda batch: engine.module(objective.inputs.images(batch))[0], task.test, task.numbers, p, world)
    return _accuracy((images @ classes.T).argmax(dim=1), truth, world)


def _run(
    function: Callable[[MicroBatch], torch.Tensor], dataset: Dataset, numbers: list[int], p: Pretrain, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `function` gives, in fp32, for this rank's share of the samples `numbers`, and their labels, both on the device."""
    batches = evaluation_batches(dataset, p.image.pixels, p.micro_batch, world.rank, world.size, workers=p.loader.workers, numbers=numbers)
    none, values, labels = filler(1, p.image.pixels), [], []
    for _ in range(-(-len(numbers) // (p.micro_batch * world.size))):
        beat(VALIDATING)
        batch = next(batches, none).to(world.device)
        value = function(batch).float()
        is_real = batch.weight > 0
        values.append(value if is_real else value[:0])
        labels.append(batch.labels if is_real else batch.labels[:0])
    return torch.cat(values), torch.cat(labels)


def _accuracy(predicted: torch.Tensor, truth: torch.Tensor, world: World) -> float:
    right, count = world.sum([float((predicted == truth).sum()), len(truth)])
    return right / count
