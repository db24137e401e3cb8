"""Every family is probed and fine-tuned, on real images, from weights that were not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.config.evaluate import Evaluate, FineTune
from pipeline.config.inputs import Image
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import extract, load_model, logits_of
from pipeline.evaluate.fewshot import evaluate_fewshot
from pipeline.evaluate.finetune import Settings, fine_tune, prepare
from pipeline.evaluate.protocols import Kind, check_protocols, fine_tune_pixels, has_head
from pipeline.evaluate.supervised import evaluate_supervised
from pipeline.evaluate.tasks import Task
from pipeline.shards.manifest import Manifest
from pipeline.stream.palette import Palette

HALF = (0.5, 0.5, 0.5)
VIT = {"patch": 4, "width": 16, "depth": 1, "heads": 2}
TEXT = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
PALETTE = Palette.three_bit().colors.tolist()
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit", {**VIT, "classes": 3}, "classify"),
    "two-layer head": ("vit", {**VIT, "classes": 3, "representation": 24}, "classify"),
    "relative": ("vit", {**VIT, "classes": 3, "positions": "relative"}, "classify"),
    "distilled": ("vit", {**VIT, "classes": 3, "distilled": True}, "distil"),
    "masked patches": ("vit", {**VIT, "classes": 0, "masked": True}, "masked-patches"),
    "mae": ("mae", {**VIT, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}, "mae"),
    "bit": ("bit", {"depths": (1,), "classes": 3}, "classify"),
    "resnet": ("resnet", {"depths": (1,), "width": 8, "classes": 3}, "classify"),
    "clip": ("clip", {"embed": 8, "vision": {"kind": "vit", **VIT}, "text": TEXT, "vocabulary": 520, "context": 8}, "contrastive"),
    "igpt": ("igpt", {"width": 16, "depth": 2, "heads": 2, "colors": 512}, "next-pixel"),
    "bert": ("igpt", {"width": 16, "depth": 2, "heads": 2, "colors": 512, "masked": True}, "bert-pixels"),
}


def card_of(model: str, options: dict[str, Any], objective: str) -> ModelCard:
    card = ModelCard(
        model, {**options, "pixels": 8}, objective, ["0", "1", "2"], HALF, HALF, "hash", "tiny", 7, PALETTE if model == "igpt" else None
    )
    return replace(card, options=card.make(device="meta").options.model_dump(mode="json"))


@pytest.fixture(scope="module")
def task(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = Storage(str(tmp_path_factory.mktemp("families")))
    manifest = make_dataset(directory, {"train": 30, "test": 9})
    return Task("colours", directory.url, "train", "test", manifest.classes, manifest.hash)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_features_serve_the_probes(name: str, task: Task) -> None:
    card = card_of(*FAMILIES[name])
    state = card.make(seed=0).state_dict()
    found = extract(load_model(card, state).features, card, task.open("test"))
    assert found.values.shape[0] == 9
    assert found.values.ndim == 2
    assert found.values.std(axis=0).max() > 0, "images differ"
    [result] = evaluate_fewshot(card, state, task, {5: "f"}, [0, 1])
    assert (result.name, result.n, len(result.values)) == ("few-shot/5", 9, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tuning_starts_at_a_head_of_zeros_and_trains(name: str, task: Task) -> None:
    card = card_of(*FAMILIES[name])
    state = card.make(seed=0).state_dict()
    if card.model != "igpt":  # whose head is of colours, and stays
        state |= {name: torch.randn_like(tensor) for name, tensor in state.items() if name.startswith(("head.", "head_dist.", "fc."))}
    pixels = fine_tune_pixels(FineTune(), Kind.of(card))
    assert pixels == (8 if card.model == "igpt" or name == "relative" else 16)
    model = prepare(card, state, pixels, 3)
    assert card.model == "igpt" or getattr(model.options, "representation", None) is None, "one linear layer"
    images = torch.randint(0, 512, (2, pixels**2)) if card.model == "igpt" else torch.randn(2, 3, pixels, pixels)
    assert logits_of(model.eval())(images).abs().max() == 0
    image = Image(pixels=pixels, crop="none", flip=False, enlarge=True)
    outcome = fine_tune(card, state, task, Settings(image, steps=1, batch=6, warmup=0, limit=3), lr=0.01, seed=0)
    generative = math.log(512) if card.model == "igpt" else 0.0
    assert outcome.loss == pytest.approx(math.log(3) + generative, abs=1e-4 if name != "bert" else 0.7)
    longer = fine_tune(card, state, task, Settings(image, steps=8, batch=30, warmup=0, limit=30), lr=0.02, seed=0)
    assert longer.loss < outcome.loss
    assert longer.n == 9


@pytest.mark.parametrize("name", ["vit", "bit", "resnet"])
def test_convolutions_have_heads_too(name: str, task: Task) -> None:
    card = card_of(*FAMILIES[name])
    assert has_head(card)
    assert evaluate_supervised(card, card.make(seed=0).state_dict(), task, "f").n == 9


def test_who_has_a_head_of_the_classes() -> None:
    assert [name for name in FAMILIES if has_head(card_of(*FAMILIES[name]))] == [
        "vit",
        "two-layer head",
        "relative",
        "distilled",
        "bit",
        "resnet",
    ]
    words = card_of("vit", {**VIT, "classes": 3}, "bag-of-words")
    assert not has_head(words), "its logits are of words"
    tuned = card_of("igpt", {"width": 16, "depth": 1, "heads": 2, "colors": 512, "classes": 3}, "pixels-and-classes")
    assert has_head(tuned)


@pytest.mark.parametrize(
    ("name", "evaluate", "words"),
    [
        ("vit", {"protocols": ["linear", "zero-shot"]}, r"evaluate\.protocols\.1: 'zero-shot' is for models of clip, and this one is of vit \(allowed for it: supervised, linear, few-shot, fine-tune\)"),
        ("igpt", {"protocols": ["zero-shot"]}, r"evaluate\.protocols\.0: .*allowed for it: supervised, linear, layers, few-shot, fine-tune"),
        ("clip", {"protocols": ["layers"]}, r"evaluate\.protocols\.0: 'layers' is for models of igpt, and this one is of clip"),
        ("vit", {"protocols": ["layrs"]}, r"evaluate\.protocols\.0: 'layrs' is not known, did you mean 'layers'"),
        ("vit", {"completions": 4}, r"evaluate\.completions: is for models of igpt, and this one is of vit"),
        ("bert", {"completions": 4}, r"evaluate\.completions: a model trained with the BERT objective"),
        ("mae", {"fine_tune": {"pixels": 18}}, r"evaluate\.fine_tune\.pixels: 18 is not a multiple of the patch, 4"),
        ("clip", {"fine_tune": {"pixels": 18}}, r"evaluate\.fine_tune\.pixels: 18 is not a multiple of the patch, 4"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_with_its_place(name: str, evaluate: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_protocols(Evaluate.model_validate({"suites": ["x"], **evaluate}), Kind.of(card_of(*FAMILIES[name])))


def test_what_it_can_do_passes() -> None:
    fits = {"clip": ["zero-shot"], "igpt": ["layers"], "bert": ["layers"], "bit": ["supervised"], "mae": ["linear", "fine-tune"]}
    for name, protocols in fits.items():
        check_protocols(Evaluate.model_validate({"suites": ["x"], "protocols": protocols}), Kind.of(card_of(*FAMILIES[name])))
    check_protocols(Evaluate.model_validate({"suites": ["x"], "completions": 2}), Kind.of(card_of(*FAMILIES["igpt"])))
