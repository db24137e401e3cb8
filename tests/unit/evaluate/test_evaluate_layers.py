from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError, DataError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import extract, load_model
from pipeline.evaluate.layers import evaluate_layers
from pipeline.evaluate.probe import fit
from pipeline.evaluate.tasks import Task
from pipeline.shards.manifest import Manifest
from pipeline.stream.palette import Palette

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def task(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = Storage(str(tmp_path_factory.mktemp("layers")))
    manifest = make_dataset(directory, {"train": 80, "test": 45})
    return Task("colours", directory.url, "train", "test", manifest.classes, manifest.hash)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    half = (0.5, 0.5, 0.5)
    options = {"pixels": 8, "width": 16, "depth": 2, "heads": 2, "colors": 512, "classes": 0, "masked": False}
    return ModelCard(
        "igpt", options, "next-pixel", ["0", "1", "2"], half, half, "hash", "tiny", 9, palette=Palette.three_bit().colors.tolist()
    )


@pytest.fixture(scope="module")
def state(card: ModelCard) -> State:
    return card.make(seed=0).state_dict()


def test_every_layer_is_scored_and_the_best_held_out_one_counts(card: ModelCard, state: State, task: Task) -> None:
    result = evaluate_layers(card, state, task, "f", seed=0)
    curve = result.details["layers"]
    assert [row["layer"] for row in curve] == [0, 1, 2]
    best = curve[result.details["best"]]
    assert best["held_out_top1"] == max(row["held_out_top1"] for row in curve)
    assert (result.value, result.n) == (best["top1"], 45)
    assert result.low <= result.value <= result.high
    assert result.value > 0.6  # a third by chance: colours are in the tokens' embeddings, whatever the weights


def test_a_layer_is_probed_on_its_own_features(card: ModelCard, state: State, task: Task) -> None:
    """The last row is what fitting the last layer's features at that strength gives."""
    row = evaluate_layers(card, state, task, "f", seed=0).details["layers"][2]
    model = load_model(card, state)
    train, test = (extract(lambda tokens: model.features(tokens, 2), card, task.open(split)) for split in ("train", "test"))  # type: ignore[call-arg]
    predicted = fit(train.values, train.labels, row["lambda"]).model.predict(test.values)
    assert row["top1"] == pytest.approx(np.mean(predicted == test.labels), abs=1.01 / 45)


def test_a_model_trained_with_the_bert_objective_is_probed_too(card: ModelCard, task: Task) -> None:
    masked = replace(card, objective="bert-pixels", options={**card.options, "masked": True, "depth": 1, "width": 8})
    assert len(evaluate_layers(masked, masked.make(seed=0).state_dict(), task, "f", 0).details["layers"]) == 2


def test_other_models_and_a_missing_palette_are_refused(card: ModelCard, state: State, task: Task) -> None:
    vit = replace(card, model="vit", options={"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2})
    with pytest.raises(CheckpointError, match="layers is for models of igpt"):
        evaluate_layers(vit, vit.make().state_dict(), task, "f", 0)
    with pytest.raises(CheckpointError, match="without the palette"):
        evaluate_layers(replace(card, palette=None), state, task, "f", 0)


def test_one_class_alone_cannot_be_probed(
    card: ModelCard, state: State, make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = Storage(str(tmp_path_factory.mktemp("single")))
    make_dataset(directory, {"train": 12, "test": 6}, classes=1)
    with pytest.raises(DataError, match="too few classes"):
        evaluate_layers(card, state, Task("one", directory.url, "train", "test", ["0"], "h"), "f", 0)
