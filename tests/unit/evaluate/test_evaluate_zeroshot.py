from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError
from pipeline.core.storage import Storage
from pipeline.evaluate.tasks import Task
from pipeline.evaluate.zeroshot import embed_classes, evaluate_zeroshot, open_tower
from pipeline.objectives import Inputs, build_objective
from pipeline.shards.manifest import Manifest
from pipeline.stream.batches import MicroBatch, evaluation_batches
from pipeline.stream.text import Tokenizer

COLOURS = ["red", "green", "blue"]  # the channel that is brightest in the images of a class
TEMPLATES = ("a photo of a {}.", "this is {} all over")
CONTEXT = 16
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def task(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = Storage(str(tmp_path_factory.mktemp("zeroshot")))
    manifest = make_dataset(directory, {"train": 48, "test": 45})
    return Task("colours", directory.url, "train", "test", manifest.classes, manifest.hash, templates=TEMPLATES, names=COLOURS)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    tokenizer = Tokenizer.train([t.replace("{}", c) for t in TEMPLATES for c in COLOURS] * 2, 540)
    options = {
        "pixels": 8,
        "embed": 8,
        "vision": {"kind": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2},
        "text": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
        "vocabulary": tokenizer.size,
        "context": CONTEXT,
    }
    half = (0.5, 0.5, 0.5)
    card = ModelCard("clip", options, "contrastive", ["0", "1", "2"], half, half, "hash", "tiny", 9, tokenizer=tokenizer.to_json())
    return replace(card, options=card.make(device="meta").options.model_dump(mode="json"))


@pytest.fixture(scope="module")
def trained(card: ModelCard, task: Task) -> State:
    """A CLIP that has learned the three captions in a hundred steps of three pairs."""
    tokenizer = card.open_tokenizer()
    assert tokenizer is not None
    model = card.make(seed=0)
    objective = build_objective("contrastive", {}, Inputs(card.mean, card.std))
    [batch] = evaluation_batches(task.open("train"), 8, 48)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(100):
        rows = [3 * (step % 16) + c for c in range(3)]  # one of each class
        captions = [TEMPLATES[step % 2].replace("{}", COLOURS[int(label)]) for label in batch.labels[rows]]
        few = MicroBatch(0, batch.images[rows], batch.labels[rows], [], captions, 1.0, tokenizer(captions, CONTEXT))
        optimizer.zero_grad()
        objective.loss(model, few)[0].backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_classes_are_told_by_their_captions(card: ModelCard, trained: State, task: Task) -> None:
    result = evaluate_zeroshot(card, trained, task, "f")
    assert result.value >= 0.85
    assert (result.name, result.protocol, result.n, result.low <= result.value <= result.high) == ("zero-shot", "zero-shot", 45, True)
    assert result.details["templates"] == list(TEMPLATES)
    kept = result.details["predictions"]
    assert np.mean(np.equal(kept["label"], kept["predicted"])) == result.value
    assert len(kept["key"]) == 45
    assert all(1 / 3 <= p <= 1 for p in kept["probability"])


def test_the_names_decide(card: ModelCard, trained: State, task: Task) -> None:
    turned = evaluate_zeroshot(card, trained, replace(task, names=COLOURS[1:] + COLOURS[:1]), "f")
    assert turned.value <= 0.15
    unknown = evaluate_zeroshot(card, trained, replace(task, names=None), "f")
    assert unknown.details["names"] == ["0", "1", "2"]


def test_class_embeddings_are_means_of_unit_captions_made_unit(card: ModelCard, trained: State) -> None:
    model, tokenizer = open_tower(card, trained)
    found = embed_classes(model, tokenizer, COLOURS, TEMPLATES)
    assert found.shape == (3, 8)
    for name, embedding in zip(COLOURS, found, strict=True):
        each = [F.normalize(model.text(tokenizer([t.replace("{}", name)], CONTEXT)), dim=-1)[0] for t in TEMPLATES]
        mean = (each[0] + each[1]) / 2
        torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_more_captions_than_a_pass_holds_change_nothing(card: ModelCard, trained: State) -> None:
    model, tokenizer = open_tower(card, trained)
    names = [f"{a} {b}" for a in COLOURS for b in range(30)]
    torch.testing.assert_close(
        embed_classes(model, tokenizer, names, TEMPLATES)[80:], embed_classes(model, tokenizer, names[80:], TEMPLATES)
    )


def test_what_zero_shot_cannot_do_without(card: ModelCard, trained: State) -> None:
    with pytest.raises(CheckpointError, match="comes without its tokenizer"):
        open_tower(replace(card, tokenizer=None), trained)
    vit = replace(card, model="vit", options={"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2})
    with pytest.raises(CheckpointError, match="knows no captions"):
        open_tower(vit, vit.make().state_dict())
