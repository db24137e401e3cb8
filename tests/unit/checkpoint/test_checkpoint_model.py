from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.checkpoint import Checkpoints, ModelCard, adapt_weights, find_model
from pipeline.checkpoint.model import read_weights, split_url
from pipeline.checkpoint.read import newest_sound
from pipeline.core.errors import CheckpointError, NoSuchRun
from pipeline.core.storage import Storage
from pipeline.models import Model, create
from pipeline.models.positions import resize_positions
from tests.checkpoints import commit_model

OPTIONS = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "pixels": 8, "classes": 3}
CARD = ModelCard("vit", OPTIONS, "classify", ["a", "b", "c"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "hash", "run-id", 7)


def model(seed: int = 0, **changes: Any) -> Model:
    made = create("vit", seed=seed, **{**OPTIONS, **changes})
    if made.options.classes:
        torch.nn.init.ones_(made.head.weight)
    return made


def test_weights_come_back(store: Storage) -> None:
    with pytest.raises(NoSuchRun, match="there is no committed checkpoint here"):
        find_model(store)
    checkpoints = Checkpoints(store)
    for step in (7, 8):
        commit = commit_model(store, CARD, {k: v + step for k, v in model().state_dict().items()}, step=step)
    for asked, step in ((None, 8), (7, 7)):
        card, weights = find_model(store, asked)
        assert card == replace(CARD, step=step)
        assert all(torch.equal(weights[k], v + step) for k, v in model().state_dict().items())
    some = read_weights(checkpoints, commit, {"norm.weight", "head.bias"})
    assert set(some) == {"norm.weight", "head.bias"} and torch.equal(some["norm.weight"], model().norm.weight + 8)
    store.write(f"checkpoints/{commit.prefix}/rank-00000-of-00001.safetensors", b"damaged")
    assert torch.equal(find_model(store)[1]["norm.weight"], model().norm.weight + 7), "the newest sound one"
    with pytest.raises(CheckpointError, match=r"step-8/.*/rank-00000-of-00001\.safetensors: is damaged"):
        find_model(store, 8)
    sound = newest_sound(checkpoints)
    assert sound is not None and sound.step == 7 and checkpoints.steps() == [7], "the damaged one is set aside"
    with pytest.raises(CheckpointError, match=r"step-9: there is no such committed checkpoint \(committed steps: 7\)"):
        find_model(store, 9)


def test_the_same_model() -> None:
    weights = model(seed=1).state_dict()
    fitted = adapt_weights(CARD, weights, model(), "start")
    assert set(fitted) == set(weights) and all(torch.equal(fitted[k], weights[k]) for k in weights)


def test_another_resolution() -> None:
    weights, larger = model().state_dict(), model(pixels=16)
    fitted = adapt_weights(CARD, weights, larger, "start")
    larger.load_state_dict(fitted)
    assert torch.equal(fitted["pos_embed"], resize_positions(weights["pos_embed"], 4))
    assert torch.equal(fitted["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])
    assert weights["pos_embed"].shape[1] == 5  # what was given is left alone


def test_another_head_begins_at_zero() -> None:
    other = model(classes=10)
    fitted = adapt_weights(CARD, model().state_dict(), other, "start")
    other.load_state_dict(fitted)
    assert other.head.weight.shape == (10, 16) and not other.head.weight.any() and not other.head.bias.any()


def test_without_a_head() -> None:
    bare = model(classes=0)
    bare.load_state_dict(adapt_weights(CARD, model().state_dict(), bare, "start"))
    headed = model()
    headed.load_state_dict(adapt_weights(CARD, bare.state_dict(), headed, "start"))
    assert not headed.head.weight.any()


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [({"width": 32}, "blocks.0.attn.proj.bias"), ({"depth": 2}, "blocks.1.attn.proj.bias"), ({"mlp": 8}, "blocks.0.mlp.fc1.bias")],
)
def test_another_model_is_refused(arguments: dict[str, int], parameter: str) -> None:
    other = model(**arguments)
    with pytest.raises(CheckpointError) as e:
        adapt_weights(CARD, model().state_dict(), other, "pretrain.start.from")
    shape = tuple(other.state_dict()[parameter].shape)
    assert str(e.value).startswith(
        "pretrain.start.from: the checkpoint of run run-id at step 7 is of a different model, vit width 16, depth 1,"
    )
    assert f"its {parameter} has shape " in str(e.value) and f", this model's has {shape}" in str(e.value)


def test_a_patch_of_another_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"its patch_embed.proj.weight has shape \(16, 3, 4, 4\), this model's has \(16, 3, 2, 2\)"):
        adapt_weights(CARD, model().state_dict(), model(patch=2), "start")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://lab/runs/a@500", ("s3://lab/runs/a", 500)),
        ("s3://lab/runs/a", ("s3://lab/runs/a", None)),
        ("/runs/me@home/a", ("/runs/me@home/a", None)),
        ("/runs/me@home/a@7", ("/runs/me@home/a", 7)),
        ("/runs/a@", ("/runs/a@", None)),
        ("/runs/a@last", ("/runs/a@last", None)),
    ],
)
def test_split_url(url: str, expected: tuple[str, int | None]) -> None:
    assert split_url(url) == expected
