from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import ModelCard
from pipeline.config import Config, parse_config
from pipeline.core.errors import CheckpointError
from pipeline.core.storage import Storage
from pipeline.evaluate.drawn import ABOUT, BLANK, COLUMNS, COMPLETIONS, SAMPLES, completed, draw, draw_pictures, open_drawer
from pipeline.evaluate.job import evaluate_model
from pipeline.evaluate.results import read_results
from pipeline.evaluate.tasks import Task
from pipeline.shards.manifest import Manifest
from pipeline.stream.palette import Palette

State = dict[str, torch.Tensor]
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def task(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = Storage(str(tmp_path_factory.mktemp("drawn")))
    manifest = make_dataset(directory, {"train": 30, "test": 12})
    return Task("colours", directory.url, "train", "test", manifest.classes, manifest.hash)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    options = {"pixels": 8, "width": 16, "depth": 1, "heads": 2, "colors": 512, "classes": 0, "masked": False}
    return ModelCard(
        "igpt", options, "next-pixel", ["0", "1", "2"], HALF, HALF, "hash", "tiny", 9, palette=Palette.three_bit().colors.tolist()
    )


@pytest.fixture(scope="module")
def state(card: ModelCard) -> State:
    """Untrained, with a head that prefers some colours."""
    state = card.make(seed=0).state_dict()
    return {**state, "head.weight": torch.randn(512, 16, generator=torch.Generator().manual_seed(0))}


def test_the_upper_half_is_kept_and_the_lower_one_is_drawn(card: ModelCard, state: State, task: Task) -> None:
    model, palette = open_drawer(card, state)
    images = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = completed(model, palette, images, tries=3).view(2, 5, 8, 8, 3)
    assert torch.equal(rows[:, 0], images)
    again = palette.decode(palette.encode(images), 8, 8)
    for column in range(1, 5):
        assert torch.equal(rows[:, column, :4], again[:, :4])
    assert (rows[:, 1, 4:] == torch.tensor(BLANK)).all()
    assert not torch.equal(rows[:, 2, 4:], rows[:, 3, 4:]), "each try is another draw"


def test_the_same_seed_draws_the_same_and_all_batches_differ(card: ModelCard, state: State) -> None:
    model, palette = open_drawer(card, state)
    first = draw(model, palette, 70, seed=3)
    assert first.shape == (70, 8, 8, 3)
    assert torch.equal(first, draw(model, palette, 70, seed=3))
    assert not torch.equal(first[:6], first[64:])
    likeliest = draw(model, palette, 3, top_k=1)
    assert torch.equal(likeliest[0], likeliest[1])


def test_pictures_are_sheets_of_the_test_split(card: ModelCard, state: State, task: Task) -> None:
    pictures = draw_pictures(card, state, task, 4, seed=0)
    side = 128 + 2  # a picture of 8 pixels, enlarged, with its border
    for path in (COMPLETIONS, SAMPLES):
        assert Image.open(io.BytesIO(pictures[path])).size == (COLUMNS * side + 2, 4 * side + 2)
    sheet = np.array(Image.open(io.BytesIO(pictures[COMPLETIONS])))
    first = sheet[2:130:16, 2:130:16]
    test = task.open("test")
    assert np.array_equal(first, np.array(Image.open(io.BytesIO(test[0].image))))


def test_models_that_draw_nothing_are_refused(card: ModelCard, state: State) -> None:
    masked = replace(card, options={**card.options, "masked": True})
    with pytest.raises(CheckpointError, match="BERT objective"):
        open_drawer(masked, state)
    with pytest.raises(CheckpointError, match="without its palette"):
        open_drawer(replace(card, palette=None), state)
    vit = replace(card, model="vit", options={"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2})
    with pytest.raises(CheckpointError, match="draws no pixels"):
        open_drawer(vit, vit.make().state_dict())


def config_of(tmp_path: Any, task: Task, **evaluate: Any) -> Config:
    model = {"name": "igpt", "width": 16, "depth": 1, "heads": 2}
    return parse_config(
        {
            "name": "tiny",
            "storage": str(tmp_path),
            "cluster": "local",
            "data": task.url,
            "pretrain": {"model": model, "objective": "next-pixel", "palette": "three-bit", "image": {"pixels": 8}, "duration": "1 epoch"},
            "evaluate": {"suites": ["colours"], "protocols": [], **evaluate},
        }
    )


def test_pictures_are_made_once_and_go_when_they_are_not_asked_for(
    card: ModelCard, state: State, task: Task, tmp_path: Any, cluster: None
) -> None:
    run, config = Storage(str(tmp_path / "run")), config_of(tmp_path, task, completions=2)
    assert evaluate_model(config, run, [task], card, state) == ([], {})
    about = json.loads(run.read(ABOUT))
    assert (about["suite"], about["completions"]) == ("colours", 2)
    assert read_results(run) == []
    run.write(SAMPLES, b"marked")
    evaluate_model(config, run, [task], card, state)
    assert run.read(SAMPLES) == b"marked", "what is there already is not made again"
    evaluate_model(config_of(tmp_path, task, completions=3), run, [task], card, state)
    assert run.read(SAMPLES) != b"marked"
    evaluate_model(config_of(tmp_path, task, protocols=["layers"]), run, [task], card, state)
    assert run.names("evaluation") == ["colours-layers.json"]
