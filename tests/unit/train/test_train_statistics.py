"""Norms of weights, gradients and updates, at every ZeRO stage, against weights that were saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from workshop import STEPS, Workshop, close

from pipeline.checkpoint import find_model, read_history
from pipeline.core.storage import Storage
from pipeline.train.statistics import LAYERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONSTANT = "pretrain.schedule={name: constant, warmup: null}"  # so that a shorter run is the beginning of a longer one
NOW_AND_THEN = "pretrain.statistics=4 steps"
RARELY = "pretrain.log=100 steps"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("statistics")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    shop = Workshop(root)
    alone = [shop.job(f"for-{n}", CONSTANT, NOW_AND_THEN, RARELY, f"pretrain.duration={n} steps") for n in (3, 4)]
    assert not any(shop.train(1, [*alone, shop.job("none", CONSTANT, "pretrain.duration=12 steps")]))
    half = "pretrain.precision=bf16"
    pair = [
        shop.job(f"stage{n}", CONSTANT, NOW_AND_THEN, RARELY, f"pretrain.zero.stage={n}", "pretrain.duration=4 steps") for n in range(4)
    ]
    assert not any(shop.train(2, [*pair, shop.job("half", CONSTANT, NOW_AND_THEN, RARELY, "pretrain.zero.stage=2", half)]))
    return shop


def told(shop: Workshop, name: str, step: int) -> dict[str, float]:
    [row] = [row for row in shop.rows(name) if row["step"] == step and "train/loss" in row]
    return row


def test_they_are_those_of_the_weights_before_and_after(shop: Workshop) -> None:
    before, after = (find_model(shop.directory(f"for-{n}"))[1] for n in (3, 4))
    row = told(shop, "for-4", 4)
    updates = {name: float((after[name] - before[name]).double().norm()) for name in before}
    weights = {name: float(before[name].double().norm()) for name in before}
    whole = math.hypot(*updates.values()) / math.hypot(*weights.values())
    assert row["train/update_ratio"] == pytest.approx(whole, rel=1e-5) and 0 < whole < 1
    for name in before:
        assert row[f"{LAYERS}{name}/weight_norm"] == pytest.approx(weights[name], rel=1e-5)
        assert row[f"{LAYERS}{name}/update_ratio"] == pytest.approx(updates[name] / weights[name], rel=1e-4)
    assert {k.split("/")[1] for k in row if k.startswith(LAYERS)} == set(before)


def test_gradients_are_those_that_the_optimiser_gets(shop: Workshop) -> None:
    row = told(shop, "for-4", 4)
    clipped = min(1.0, row["train/grad_norm"])  # at 1.0
    assert math.hypot(*(v for k, v in row.items() if k.endswith("/grad_norm") and k.startswith(LAYERS))) == pytest.approx(clipped, rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_they_are_the_same_at_every_stage_and_number_of_ranks(shop: Workshop, stage: int) -> None:
    one, other = ([told(shop, name, step) for step in (1, 4)] for name in ("for-4", f"stage{stage}"))
    assert close(one, other, 1e-5)


def test_they_are_told_when_asked_for(shop: Workshop) -> None:
    assert [row["step"] for row in shop.rows("half") if "train/loss" in row] == [1, 4, STEPS]
    assert any(k.startswith(LAYERS) for k in told(shop, "half", 4)) and not any(k.startswith(LAYERS) for k in told(shop, "half", STEPS))
    rows = [row for row in read_history(shop.directory("none")) if "train/loss" in row]
    assert len(rows) == 12 and not any(k.startswith(LAYERS) for row in rows for k in row)
    assert [row["step"] for row in rows if row.get("train/update_ratio", 0) > 0] == [1, 10, 12], "of the first row in ten steps"
    assert told(shop, "half", 4)["train/update_ratio"] == pytest.approx(told(shop, "for-4", 4)["train/update_ratio"], rel=0.1)


def test_what_begins_as_zeros_has_no_ratio(shop: Workshop) -> None:
    """The head's: nothing can be divided by its norm at step 1. (The row is of a run with statistics at each step.)"""
    assert not any(shop.train(1, [shop.job("each", "pretrain.statistics=1 step", "pretrain.duration=2 steps")]))
    first, second = told(shop, "each", 1), told(shop, "each", 2)
    zeros = {k.removesuffix("/weight_norm") for k, v in first.items() if k.endswith("/weight_norm") and v == 0}
    assert f"{LAYERS}head.weight" in zeros
    assert not any(f"{name}/update_ratio" in first for name in zeros) and second[f"{LAYERS}head.weight/update_ratio"] > 0
    assert all(math.isfinite(v) for row in (first, second) for v in row.values())
