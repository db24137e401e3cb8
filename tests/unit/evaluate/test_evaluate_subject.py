"""`evaluate.model`: another run or a published model, in place of what a config trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.config import Config, parse_config
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import load_model
from pipeline.evaluate.job import evaluate
from pipeline.evaluate.subject import check_subject, find_subject, training_view
from pipeline.evaluate.tasks import check_evaluate
from pipeline.models import create, formats
from pipeline.shards.manifest import Manifest
from pipeline.stream.palette import Palette
from pipeline.stream.text import Tokenizer
from tests.checkpoints import commit_model

HALF = (0.5, 0.5, 0.5)
IGPT = {"pixels": 8, "width": 16, "depth": 1, "heads": 2, "colors": 512}
CLIP = {
    "pixels": 8, "embed": 8, "vocabulary": 520, "context": 8,
    "vision": {"kind": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2},
    "text": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = Storage(str(tmp_path_factory.mktemp("subject")))
    make_dataset(directory, {"train": 24, "test": 9})
    return directory.url


@pytest.fixture
def published(tmp_path: Path) -> Callable[[ModelCard], str]:
    """Commits a checkpoint of fresh weights, without a run.yaml, and gives its directory."""

    def write(card: ModelCard) -> str:
        commit_model(str(tmp_path / "other"), card, card.make(seed=0).state_dict())
        return str(tmp_path / "other")

    return write


def card_of(model: str, options: dict[str, Any], **more: Any) -> ModelCard:
    card = ModelCard(
        model, options, "next-pixel" if model == "igpt" else "contrastive", ["0", "1", "2"], HALF, HALF, "hash", "other", 5, **more
    )
    return replace(card, options=card.make(device="meta").options.model_dump(mode="json"))


def config_of(tmp_path: Path, model: str, data: str | None, **evaluate: Any) -> Config:
    suite = {"name": "colours", "data": data}
    return parse_config(
        {"name": "t", "storage": str(tmp_path / "runs"), "cluster": "local", "evaluate": {"model": model, "suites": [suite], **evaluate}}
    )


def test_another_run_is_scored(published: Callable[[ModelCard], str], data: str, tmp_path: Path, cluster: None) -> None:
    url = published(card_of("igpt", IGPT, palette=Palette.three_bit().colors.tolist()))
    config = config_of(
        tmp_path,
        f"{url}@5",
        data,
        protocols=["supervised", "few-shot", "fine-tune"],
        shots=[5],
        seeds=2,
        fine_tune={"steps": 2, "batch": 8, "lr": [0.01]},
    )
    check_evaluate(config)
    check_subject(config)
    run = Storage(str(tmp_path / "runs" / "t"))
    results, _ = evaluate(config, run, "nowhere")
    assert [(r.suite, r.name) for r in results] == [("colours", "few-shot/5"), ("colours", "fine-tune")]
    assert results[1].details["pixels"] == 8, "a model of pixels is fine-tuned at its own resolution"
    view, micro_batch = training_view(config, find_subject(config, run)[0])
    assert (view.pixels, micro_batch) == (8, 64)


def test_a_published_model_is_scored(data: str, tmp_path: Path, cluster: None) -> None:
    model = create("vit", pixels=8, patch=4, width=16, depth=1, heads=2, classes=3, seed=0)
    with torch.no_grad():
        model.head.weight.normal_()
    formats.export(model, str(tmp_path / "hf"), "hf", classes=["0", "1", "2"])
    config = config_of(
        tmp_path,
        str(tmp_path / "hf"),
        data,
        protocols=["supervised", "linear", "fine-tune"],
        seeds=2,
        fine_tune={"steps": 2, "batch": 8, "lr": [0.01]},
    )
    check_evaluate(config)
    check_subject(config)
    results, _ = evaluate(config, Storage(str(tmp_path / "runs" / "t")), "nowhere")
    assert [r.name for r in results] == ["supervised", "linear", "fine-tune"]
    card, state = find_subject(config, Storage(str(tmp_path)))
    assert (card.pixels, card.classes) == (8, ["0", "1", "2"])
    torch.testing.assert_close(state["head.weight"], model.head.weight.detach(), rtol=0, atol=0)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load_model(card, state)(images), model.eval()(images))


def test_palette_and_tokenizer_are_named_where_the_model_has_none(published: Callable[[ModelCard], str], data: str, tmp_path: Path) -> None:
    url = published(card_of("igpt", IGPT))
    with pytest.raises(ConfigError, match=r"evaluate\.palette: is missing; .* is a model of pixels.*three-bit"):
        check_subject(config_of(tmp_path, url, data, protocols=["layers"]))
    config = config_of(tmp_path, url, data, protocols=["layers"], palette="three-bit")
    check_subject(config)
    card, state = find_subject(config, Storage(str(tmp_path)))
    assert card.palette is not None
    assert len(card.palette) == 512
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    few = Palette(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    few.save(str(tmp_path / "two.npy"))
    with pytest.raises(ConfigError, match=r"evaluate\.palette: has 2 colours, and .* is of 512"):
        check_subject(config_of(tmp_path, url, data, protocols=["layers"], palette=str(tmp_path / "two.npy")))
    with pytest.raises(DataError, match=r"none\.npy"):
        check_subject(config_of(tmp_path, url, data, protocols=["layers"], palette=str(tmp_path / "none.npy")))


def test_a_tokenizer_of_the_right_size(published: Callable[[ModelCard], str], data: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["red green blue black"] * 2, 520)
    Tokenizer.train(["red"] * 2, 516).save(str(tmp_path / "small.json"))
    tokenizer.save(str(tmp_path / "tokens.json"))
    url = published(card_of("clip", {**CLIP, "vocabulary": tokenizer.size}))
    with pytest.raises(ConfigError, match=r"evaluate\.tokenizer: is missing"):
        check_subject(config_of(tmp_path, url, data, protocols=["zero-shot"]))
    with pytest.raises(ConfigError, match=rf"evaluate\.tokenizer: has 51\d tokens, and .* is of {tokenizer.size}"):
        check_subject(config_of(tmp_path, url, data, protocols=["zero-shot"], tokenizer=str(tmp_path / "small.json")))
    check_subject(config_of(tmp_path, url, data, protocols=["zero-shot"], tokenizer=str(tmp_path / "tokens.json")))
    check_subject(config_of(tmp_path, url, data, protocols=["linear"]))  # needs none


def test_what_is_missing_is_named(published: Callable[[ModelCard], str], data: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^evaluate\.model: "):
        check_subject(config_of(tmp_path, str(tmp_path / "nowhere"), data))
    with pytest.raises(ConfigError, match=r"evaluate\.suites\.0\.data: is missing, and the config names no data of its own"):
        check_evaluate(config_of(tmp_path, "x", None))
    url = published(card_of("clip", CLIP))
    with pytest.raises(ConfigError, match=r"evaluate\.protocols\.0: 'layers' is for models of igpt, and this one is of clip"):
        check_subject(config_of(tmp_path, url, data, protocols=["layers"]))


def test_names_of_other_classes_and_captions_without_a_place(data: str, tmp_path: Path) -> None:
    values = {"name": "t", "storage": str(tmp_path), "cluster": "local"}
    suite = {"name": "colours", "data": data, "class_names": ["red", "green"]}
    with pytest.raises(ConfigError, match=r"evaluate\.suites\.0\.class_names: names 2 classes, and the dataset at .* has 3, 0, 1, 2"):
        check_evaluate(parse_config({**values, "evaluate": {"model": "x", "suites": [suite]}}))
    with pytest.raises(ConfigError, match=r"evaluate\.suites\.0\.templates.*'a photo' should hold {} once"):
        parse_config({**values, "evaluate": {"model": "x", "suites": [{"name": "a", "templates": ["{}.", "a photo"]}]}})


def test_either_a_model_or_pre_training(data: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": "t", "storage": str(tmp_path), "cluster": "local", "data": data}
    with pytest.raises(ConfigError, match=r"evaluate\.model: is missing, and there is no pretrain section"):
        parse_config({**values, "evaluate": {"suites": ["x"]}})
    pretrain = {"model": "vit_s16", "duration": "1 epoch"}
    with pytest.raises(ConfigError, match=r"evaluate\.model: give either that or a pretrain section"):
        parse_config({**values, "pretrain": pretrain, "evaluate": {"model": "x", "suites": ["x"]}})
