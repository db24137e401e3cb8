from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import ModelCard, Run, claim_run
from pipeline.checkpoint.run import run_directory
from pipeline.config import Config, parse_config
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.models import create, formats
from pipeline.objectives import Facts
from pipeline.preflight import check_config, check_resources, plan_config
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import Manifest, publish
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard
from pipeline.stream import Collection, Dataset, open_dataset
from pipeline.stream.collection import open_collection
from pipeline.stream.palette import Palette
from pipeline.stream.text import Tokenizer
from pipeline.train.inputs import PALETTE, TOKENIZER, open_inputs, planned_facts, prepare_inputs
from tests.checkpoints import commit_model

SIZE = {"width": 16, "depth": 1, "heads": 2}
VIT = {"name": "vit", **SIZE, "patch": 4}
PIXELS = {"model": {"name": "igpt", **SIZE}, "objective": "next-pixel"}
PAIRS = {"model": {"name": "clip", "embed": 8, "vision": {"kind": "vit", **SIZE, "patch": 4}, "text": SIZE}, "objective": "contrastive"}
NONE = Collection([], [])  # from which nothing can be learned


class Home:
    """Runs beside a dataset of 50 captioned images of 8 x 8 pixels, of 3 classes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def config(self, name: str, pretrain: dict[str, Any], **changes: Any) -> Config:
        section = {"image": {"pixels": 8}, "batch": 8, "micro_batch": 4, "duration": "1 epoch", "precision": "fp32", **pretrain}
        data = changes.pop("data", f"{self.root}/data")
        values = {"name": name, "storage": f"{self.root}/runs", "cluster": "local", "data": data, "pretrain": section}
        return parse_config({**values, **changes})

    def run(self, name: str, pretrain: dict[str, Any]) -> Run:
        return claim_run(self.config(name, pretrain))

    def data(self) -> Collection:
        return open_collection(self.config("any", PIXELS).data or [])

    def trained(self, name: str, card: ModelCard) -> str:
        """The URL of a run with one checkpoint."""
        directory = Storage(f"{self.root}/runs/{name}")
        commit_model(directory, card, card.make().state_dict(), step=1)
        return directory.url


def make_bare_dataset(directory: Storage) -> Dataset:
    """Three images of 8 x 8 pixels with labels, and no captions."""
    samples = []
    for n in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * n, np.uint8)).save(png := io.BytesIO(), "PNG")
        samples.append(Sample(sample_key(str(n)), Checked(png.getvalue(), "png", 8, 8), n, b"", b"{}"))
    shard = write_shard(directory, "train-00000.tar", "train", samples)
    assert shard is not None
    manifest = Manifest(
        hash="none", config="none", source="made", classes=["0", "1", "2"], splits={"train": 3}, bytes=shard.record.bytes, read=3,
        written=3, ignored=0, dropped={}, dropped_samples=[], smallest=(8, 8),
    )  # fmt: skip
    publish(directory, [shard.record], manifest)
    return open_dataset(directory.url)


@pytest.fixture
def home(tmp_path: Path, make_dataset: Callable[..., Any]) -> Home:
    make_dataset(Storage(str(tmp_path / "data")), {"train": 50})
    return Home(tmp_path)


def card(model: str, options: dict[str, Any], classes: int = 3, **changes: Any) -> ModelCard:
    values = {"objective": "classify", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "dataset": "hash", "run": "id", "step": 1}
    return ModelCard(model=model, options=options, classes=[str(n) for n in range(classes)], **{**values, **changes})


def test_a_palette_is_learned_once(home: Home) -> None:
    run = home.run("a", {**PIXELS, "palette": {"colors": 5}})
    first = prepare_inputs(run, home.data(), World())
    assert first.palette is not None and first.palette.size == 5 and first.tokenizer is None
    assert run.directory.exists("palette.npy") and not run.directory.exists("tokenizer.json")
    again = prepare_inputs(run, NONE, World())
    assert again.palette is not None and torch.equal(again.palette.colors, first.palette.colors)
    assert again.facts(3) == Facts(3, 5, 0, 77)


def test_a_tokenizer_is_learned_once(home: Home) -> None:
    run = home.run("a", {**PAIRS, "text": {"size": 520, "length": 6}})
    first = prepare_inputs(run, home.data(), World())
    assert first.tokenizer is not None and first.palette is None and not run.directory.exists("palette.npy")
    assert 514 < first.tokenizer.size <= 520, "'train' is in each caption"
    assert first.facts(3) == Facts(3, 0, first.tokenizer.size, 6)
    again = prepare_inputs(run, NONE, World())
    assert again.tokenizer is not None and again.tokenizer.to_json() == first.tokenizer.to_json()


def test_a_model_of_images_needs_neither(home: Home) -> None:
    run = home.run("a", {"model": VIT})
    prepared = prepare_inputs(run, NONE, World())
    assert (prepared.palette, prepared.tokenizer) == (None, None)
    assert sorted(run.directory.names()) == ["run.yaml"]


def test_a_named_palette(home: Home) -> None:
    colors = np.random.default_rng(0).uniform(-1, 1, (7, 3)).astype(np.float32)
    np.save(home.root / "mine.npy", colors)
    url, digest = str(home.root / "mine.npy"), hashlib.sha256((home.root / "mine.npy").read_bytes()).hexdigest()
    prepared = prepare_inputs(home.run("a", {**PIXELS, "palette": {"url": url, "sha256": digest}}), NONE, World())
    assert prepared.palette is not None and np.array_equal(prepared.palette.colors.numpy(), colors) and prepared.palette.hash == digest
    with pytest.raises(DataError, match=r"mine\.npy"):
        prepare_inputs(home.run("b", {**PIXELS, "palette": {"url": url, "sha256": "0" * 64}}), NONE, World())
    with pytest.raises(DataError, match=r"none\.npy"):
        prepare_inputs(home.run("c", {**PIXELS, "palette": str(home.root / "none.npy")}), NONE, World())


def test_three_bit_colours(home: Home) -> None:
    prepared = prepare_inputs(home.run("a", {**PIXELS, "palette": "three-bit"}), NONE, World())
    assert prepared.palette is not None and torch.equal(prepared.palette.colors, Palette.three_bit().colors)


def test_a_named_tokenizer(home: Home) -> None:
    mine = Tokenizer.train(["a cat and a cat", "a dog"], 520)
    mine.save(str(home.root / "mine.json"))
    section = {**PAIRS, "text": {"tokenizer": str(home.root / "mine.json"), "sha256": mine.hash}}
    prepared = prepare_inputs(home.run("a", section), NONE, World())
    assert prepared.tokenizer is not None and torch.equal(prepared.tokenizer(["a cat"]), mine(["a cat"]))
    assert prepared.facts(0).vocabulary == mine.size


def test_what_a_run_starts_from_gives_its_palette(home: Home) -> None:
    """And gives it once: a run that has begun goes on when the one before is gone."""
    colors = np.random.default_rng(1).uniform(-1, 1, (6, 3)).astype(np.float32)
    options = {**SIZE, "pixels": 8, "colors": 6}
    start = home.trained("before", card("igpt", options, objective="next-pixel", palette=colors.tolist()))
    run = home.run("a", {**PIXELS, "start": start})
    prepared = prepare_inputs(run, NONE, World())
    assert prepared.palette is not None and np.array_equal(prepared.palette.colors.numpy(), colors)
    named = prepare_inputs(home.run("b", {**PIXELS, "start": start, "palette": "three-bit"}), NONE, World())
    assert named.palette is not None and named.palette.size == 512, "what the config names comes first"
    Storage(start).remove()
    again = prepare_inputs(run, NONE, World())
    assert again.palette is not None and np.array_equal(again.palette.colors.numpy(), colors)
    assert plan_config(run.config)[0] is not None


def test_what_a_run_starts_from_gives_its_tokenizer(home: Home) -> None:
    mine = Tokenizer.train(["a cat and a cat", "a dog"], 520)
    options = {**{k: v for k, v in PAIRS["model"].items() if k != "name"}, "pixels": 8, "vocabulary": mine.size, "context": 9}  # type: ignore[attr-defined]
    start = home.trained("before", card("clip", options, objective="contrastive", tokenizer=mine.to_json()))
    prepared = prepare_inputs(home.run("a", {**PAIRS, "start": start, "text": {"length": 9}}), NONE, World())
    assert prepared.tokenizer is not None and prepared.tokenizer.to_json() == mine.to_json() and prepared.context == 9
    check_resources(home.config("c", {**PAIRS, "start": start, "text": {"length": 9}}), write=False)
    with pytest.raises(
        CheckpointError, match=r"of a different model, clip .*its text.pos_embed has shape \(9, 16\), this model's has \(12, 16\)"
    ):
        check_resources(home.config("d", {**PAIRS, "start": start, "text": {"length": 12}}), write=False)


def distil(url: str) -> dict[str, Any]:
    return {"model": VIT, "objective": {"name": "distil", "teacher": url}, "image": {"pixels": 8, "mean": [0.5] * 3}}


def test_a_teacher(home: Home) -> None:
    """A run of another model and resolution, normalised its own way."""
    url = home.trained("teacher", card("vit", {**SIZE, "width": 8, "patch": 2, "pixels": 4, "classes": 3}))
    run = home.run("a", distil(url))
    inputs = open_inputs(run.config, prepare_inputs(run, NONE, World()), ["0", "1", "2"], torch.bfloat16, torch.device("cpu"))
    teacher = inputs.teacher
    assert teacher is not None and (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and inputs.mean == (0.5, 0.5, 0.5)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.model(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).shape == (2, 3)


def test_a_teacher_that_cannot_teach(home: Home) -> None:
    def open_teacher(url: str, classes: int = 3) -> None:
        config = home.config("a", distil(url))
        names = [str(n) for n in range(classes)]
        open_inputs(config, prepare_inputs(claim_run(config, fresh=True), NONE, World()), names, torch.float32, torch.device("cpu"))

    options = {**SIZE, "patch": 4, "pixels": 8}
    url = home.trained("four", card("vit", {**options, "classes": 4}, classes=4))
    with pytest.raises(ConfigError, match=rf"^pretrain.objective.teacher: {url} tells 4 classes apart, and the data has 3; it must be"):
        open_teacher(url)
    with pytest.raises(CheckpointError, match=r"^pretrain.objective.teacher: "):
        open_teacher(str(home.root / "nowhere"))
    open_teacher(url, classes=4)
    odd = replace(card("vit", {**options, "classes": 3}), classes=["2", "1", "0"])
    with pytest.raises(ConfigError, match="was trained on other classes than the data has, or in another order"):
        open_teacher(home.trained("odd", odd))
    pixels = card("igpt", {**SIZE, "pixels": 8, "colors": 512, "classes": 3}, objective="pixels-and-classes")
    words = card("vit", {**options, "classes": 3}, objective="bag-of-words")
    coarse = card("vit", {**SIZE, "patch": 3, "pixels": 9, "classes": 3})
    for name, teacher, said in (
        ("pixels", pixels, "is no classifier of images, but igpt"),
        ("words", words, "is no classifier of images, but vit"),
        ("coarse", coarse, "cannot see images of pretrain.image.pixels 8 .*not a multiple of the patch"),
    ):
        url = home.trained(name, teacher)
        with pytest.raises(ConfigError, match=said):
            check_resources(home.config("b", distil(url)), write=False)
        with pytest.raises(ConfigError, match=said):
            open_teacher(url)


@pytest.mark.parametrize(("pretrain", "model", "missing"), [
    (PIXELS, {"name": "igpt", **SIZE}, "pretrain.palette.url"), (PAIRS, PAIRS["model"], "pretrain.text.tokenizer")
])  # fmt: skip
def test_weights_without_their_palette_or_tokenizer(home: Home, pretrain: dict[str, Any], model: dict[str, Any], missing: str) -> None:
    """To learn one from the data would number colours or words otherwise than the weights know them."""
    name = model["name"]
    given = {"pixels": 8, "colors": 512} if name == "igpt" else {"pixels": 8, "vocabulary": 520, "context": 9}
    export = str(home.root / "published")
    formats.export(create(name, seed=0, **{k: v for k, v in model.items() if k != "name"}, **given), export, "hf")
    section = {**pretrain, "start": export, "text": {"length": 9}}
    with pytest.raises(ConfigError, match=rf"^{missing}: is missing; {export} comes without"):
        check_resources(home.config("a", section), write=False)
    if name == "igpt":
        check_resources(home.config("a", {**section, "palette": "three-bit"}), write=False)


@pytest.mark.parametrize(("pretrain", "name"), [(PIXELS, PALETTE), (PAIRS, TOKENIZER)])
def test_a_fresh_run_is_not_held_up_by_what_the_old_one_learned(home: Home, pretrain: dict[str, Any], name: str) -> None:
    config = home.config("a", pretrain)
    run_directory(config).write(name, b"damaged")
    with pytest.raises(DataError):
        check_resources(config, write=False)
    check_resources(config, write=False, fresh=True)
    with pytest.raises(DataError):
        plan_config(config)
    assert plan_config(config, fresh=True)[0] is not None


def test_data_without_captions(home: Home) -> None:
    bare = Storage(str(home.root / "bare"))
    make = make_bare_dataset(bare)
    assert not any(make[n].text for n in range(len(make)))
    with pytest.raises(ConfigError, match=r"^pretrain.objective: 'contrastive' needs captions, and none of 3 samples of .*bare has one$"):
        check_resources(home.config("a", PAIRS, data=bare.url), write=False)
    check_resources(home.config("a", PIXELS, data=bare.url), write=False)


@pytest.mark.parametrize(
    ("pretrain", "facts"),
    [
        ({"model": VIT}, Facts(9, 0, 0, 77)),
        (PIXELS, Facts(9, 512, 0, 77)),
        ({**PIXELS, "palette": {"colors": 16}}, Facts(9, 16, 0, 77)),
        ({**PIXELS, "palette": {"url": "three-bit", "colors": 16}}, Facts(9, 512, 0, 77)),
        (PAIRS, Facts(9, 0, 49408, 77)),
        ({**PAIRS, "text": {"size": 600, "length": 12}}, Facts(9, 0, 600, 12)),
    ],
)
def test_what_is_planned(home: Home, pretrain: dict[str, Any], facts: Facts) -> None:
    config = home.config("a", pretrain)
    check_config(config)
    assert config.pretrain is not None and planned_facts(config.pretrain, 9) == facts


def test_a_config_without_data_can_be_planned_but_not_run(home: Home) -> None:
    config = home.config("a", {"model": VIT, "batch": 1000, "micro_batch": 10}, data={"samples": "1.28M", "classes": 1000})
    check_config(config)
    check_resources(config, write=False)
    plan, is_estimate, workers = plan_config(config)
    assert plan is not None and is_estimate and workers >= 1
    assert (plan.samples_an_epoch, plan.steps, plan.reading) == (1_280_000, 1280, None)
    width = SIZE["width"]
    body = 48 * width + width + width + 5 * width + 12 * width**2 + 13 * width + 2 * width
    assert plan.parameters == body + 1000 * width + 1000
    with pytest.raises(
        ConfigError, match=r"^data.0.url: is missing; a config without it can be planned \(--plan\), to run it name your dataset$"
    ):
        check_resources(config)
    assert not (home.root / "runs").exists()


def test_a_mixture_of_which_one_part_is_missing(home: Home) -> None:
    config = home.config("a", {"model": VIT}, data=[f"{home.root}/data", {"samples": 70, "classes": 3}])
    with pytest.raises(ConfigError, match=r"^data.1.url: is missing"):
        check_resources(config)


@pytest.mark.parametrize("pretrain", [PIXELS, PAIRS])
def test_a_plan_holds_what_is_yet_to_be_learned(home: Home, pretrain: dict[str, Any]) -> None:
    small = {**pretrain, "palette": {"colors": 8}, "text": {"size": 600}}
    large = {**pretrain, "palette": {"colors": 24}, "text": {"size": 1600}}
    counts = [plan.parameters for p in (small, large) if (plan := plan_config(home.config("a", p))[0])]
    assert counts[1] - counts[0] == (2 * 16 * 16 if pretrain is PIXELS else 1000 * 16)
