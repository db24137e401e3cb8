"""Accuracies while training: the rules themselves, and real DeepSpeed on gloo against the same scores of a saved checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from workshop import STEPS, Workshop, close

from pipeline.checkpoint import find_model
from pipeline.config import parse_config
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import extract, load_model
from pipeline.evaluate.tasks import Task
from pipeline.evaluate.zeroshot import evaluate_zeroshot
from pipeline.objectives.scores import mean_captions, nearest_classes
from pipeline.preflight import check_config, check_resources
from pipeline.stream import open_dataset

K, TEMPERATURE = 7, 0.2
CLASSES = 3


def by_sklearn(bank: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Of vectors of length 1 the cosine follows from the distance."""
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, images)]
    bank, images = bank.astype(np.float64) / lengths[0], images.astype(np.float64) / lengths[1]
    rule = KNeighborsClassifier(K, weights=lambda d: np.exp((1 - d**2 / 2) / TEMPERATURE), algorithm="brute")
    return rule.fit(bank, labels).predict(images)


def test_nearest_classes_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, 8))
    labels = random.integers(0, CLASSES, 200)
    bank, images = centres[labels] + random.normal(size=(200, 8)) * 2, random.normal(size=(90, 8)) * 3
    found = nearest_classes(torch.tensor(bank), torch.tensor(labels), torch.tensor(images), CLASSES, K, TEMPERATURE)
    expected = by_sklearn(bank, labels, images)
    assert (found.numpy() == expected).all() and len(set(expected)) == CLASSES
    unweighted = nearest_classes(torch.tensor(bank), torch.tensor(labels), torch.tensor(images), CLASSES, K, 1e6)
    assert (unweighted != found).any(), "the nearer count more"


def test_few_neighbours_and_small_temperatures() -> None:
    bank, labels = torch.eye(3), torch.tensor([2, 0, 1])
    assert nearest_classes(bank, labels, bank, 3, k=20).tolist() == [2, 0, 1], "no more than there are"
    assert nearest_classes(bank, labels, bank, 3, k=3, temperature=1e-3).tolist() == [2, 0, 1]
    assert nearest_classes(bank, labels, bank[:0], 3).tolist() == []


def test_mean_captions() -> None:
    captions = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), dim=1)
    assert torch.allclose(mean_captions(captions, 2), torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


VISION = "{kind: vit, width: 16, depth: 1, heads: 2, patch: 4}"
CLIP = (
    f"pretrain.model={{name: clip, embed: 8, vision: {VISION}, text: {{kind: transformer, width: 16, depth: 1, heads: 2}}}}",
    "pretrain.objective=contrastive",
    "pretrain.text={size: 520, length: 12}",
)
IGPT = ("pretrain.model={name: igpt, width: 16, depth: 2, heads: 2}", "pretrain.objective=next-pixel", "pretrain.palette=three-bit")
TEMPLATES = ["a {}", "test {}", "{} again"]
NEIGHBOURS = f"pretrain.validate.knn={{k: {K}, temperature: {TEMPERATURE}}}"
ZERO_SHOT = f"pretrain.validate.zero_shot={{templates: {TEMPLATES}}}"
# At stage 3 nothing is small enough to be kept whole: tokens and positions of a tower, which its features use, are in parts, too.
GATHERED = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from pipeline.train.library import import_deepspeed
import_deepspeed()
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default = 0
DeepSpeedZeroConfig.model_rebuild(force=True)
import drive
drive.main(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("validate")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 21}, unlabelled=9)
    return Workshop(root)


@pytest.fixture(scope="module")
def trained(shop: Workshop) -> Workshop:
    best = ("pretrain.save.best={metric: validate/knn, higher: true}",)
    alone = [
        shop.job("plain"),
        shop.job("vit", NEIGHBOURS, *best),
        shop.job("igpt", *IGPT, NEIGHBOURS),
        shop.job("clip", *CLIP, NEIGHBOURS, ZERO_SHOT),
    ]
    assert not any(shop.train(1, alone))
    pair = [shop.job(f"vit{n}", NEIGHBOURS, f"pretrain.zero.stage={n}") for n in (1, 3)]
    pair += [shop.job(f"clip{n}", *CLIP, NEIGHBOURS, ZERO_SHOT, f"pretrain.zero.stage={n}") for n in (0, 2, 3)]
    pair += [shop.job("igpt3", *IGPT, NEIGHBOURS, "pretrain.zero.stage=3")]
    assert not any(shop.train(2, pair))
    script = shop.root / "gathered.py"
    script.write_text(GATHERED.format(folder=str(Path(__file__).parent)))
    gathered = [
        shop.job(f"{name}-gathered", *more, NEIGHBOURS, "pretrain.zero.stage=3")
        for name, more in (("clip", (*CLIP, ZERO_SHOT)), ("vit", ()))
    ]
    assert not any(shop.train(3, gathered, script))
    return shop


def validated(shop: Workshop, name: str) -> list[dict[str, float]]:
    return [row for row in shop.rows(name) if "validate/loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["vit", "igpt", "clip"])
def test_neighbours_are_those_of_the_saved_model(trained: Workshop, name: str) -> None:
    card, weights = find_model(trained.directory(name))
    url, model = str(trained.root / "data"), load_model(card, weights)
    bank, test = (extract(model.features, card, open_dataset(url, split)) for split in ("train", "test"))
    assert len(bank.labels) < 50 and len(test.labels) < 21, "some samples have no label"
    expected = float((by_sklearn(bank.values, bank.labels, test.values) == test.labels).mean())
    assert [row["step"] for row in validated(trained, name)] == [3, 6]
    assert validated(trained, name)[-1]["validate/knn"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_shot_is_that_of_the_saved_model(trained: Workshop) -> None:
    card, weights = find_model(trained.directory("clip"))
    data = open_dataset(str(trained.root / "data"), "test")
    task = Task("t", str(trained.root / "data"), "train", "test", data.manifest.classes)
    result = evaluate_zeroshot(card, weights, dataclasses.replace(task, templates=tuple(TEMPLATES)), "f")
    assert validated(trained, "clip")[-1]["validate/zero_shot"] == pytest.approx(result.value)
    assert "validate/zero_shot" not in validated(trained, "vit")[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["vit1", "vit3", "vit-gathered", "clip0", "clip2", "clip3", "clip-gathered", "igpt3"])
def test_they_are_the_same_at_every_stage_and_number_of_ranks(trained: Workshop, name: str) -> None:
    ours, theirs = trained.rows(name), trained.rows(name.removesuffix("-gathered").rstrip("0123"))
    for rows in (ours, theirs):
        for row in rows:
            row.pop("train/grad_norm", None)
    assert close(ours, theirs, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_long_validation_shows_that_it_lives(trained: Workshop) -> None:
    """Every pass, of those on three ranks: else a watcher would take a long one for a rank that hangs."""

    def passes(samples: int) -> int:
        return -(-samples // (3 * 4))

    bank, test = (open_dataset(str(trained.root / "data"), split) for split in ("train", "test"))
    scored = passes(int((test.labels() >= 0).sum()))
    neighbours = passes(len(test)) + passes(int((bank.labels() >= 0).sum())) + scored
    captions = passes(CLASSES * len(TEMPLATES)) + scored
    own = STEPS - 1  # the loop's, after each step but the first, until which it starts
    assert trained.beats == [own + 2 * (neighbours + captions), own + 2 * neighbours]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_does_not_notice(trained: Workshop) -> None:
    with_scores = [{k: v for k, v in row.items() if k != "validate/knn"} for row in trained.rows("vit")]
    assert with_scores == trained.rows("plain")


def config(root: Path, **pretrain: Any) -> Any:
    values = {"model": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}, "image": {"pixels": 8}, "duration": "1 epoch"}
    data = pretrain.pop("data", str(root / "data"))
    return parse_config({"name": "a", "storage": str(root / "runs"), "cluster": "local", "data": data, "pretrain": {**values, **pretrain}})


def test_what_cannot_be_scored_is_refused(shop: Workshop, make_dataset: Callable[..., Any]) -> None:
    make_dataset(Storage(str(shop.root / "bare")), {"train": 5, "test": 5}, classes=1)

    def refused(check: Callable[[Any], None], match: str, **pretrain: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            check(config(shop.root, **pretrain))

    def resources(c: Any) -> None:
        check_resources(c, write=False)

    refused(
        check_config,
        r"pretrain.validate.zero_shot: needs a model that embeds captions, and 'classify' trains none \(allowed: contrastive, sigmoid-contrastive\)",
        validate={"zero_shot": {}},
    )
    refused(check_config, "pretrain.save.best.metric.*validate/knn", validate={}, save={"best": "validate/knn"})
    two = [{"url": str(shop.root / "data")}, {"url": str(shop.root / "bare")}]
    refused(check_config, "pretrain.validate.knn.data: is missing; the run is trained on several", data=two, validate={"knn": {}})
    refused(resources, "pretrain.validate.knn.test.*'tset'", validate={"knn": {"test": "tset"}})
    refused(resources, r"pretrain.validate.knn.data: there is no dataset at /none", validate={"knn": "/none"})
    bare = {"knn": str(shop.root / "bare")}
    refused(resources, "pretrain.validate.knn: needs labels of two classes or more, and the dataset at .*bare has 1", validate=bare)
    check_config(config(shop.root, validate={"knn": {}}, save={"best": {"metric": "validate/knn", "higher": True}}))
    check_resources(config(shop.root, validate={"knn": {}}), write=False)
    with pytest.raises(ConfigError, match=r"pretrain.validate.zero_shot.templates.*'a cat' should hold {} once"):
        config(shop.root, validate={"zero_shot": {"templates": ["a cat"]}})
