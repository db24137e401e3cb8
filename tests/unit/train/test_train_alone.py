"""A rank alone at stage 0, where DeepSpeed's averaging over the ranks is left out: what it did beside that is still done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.train.workshop import Workshop


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of ranks."""
    shop = Workshop(tmp_path_factory.mktemp("alone"))
    for size in (1, 2):
        shop.fork(size, [str(Path(__file__).with_name("unused.py")), str(shop.root / f"{size}.json")])
    return {size: json.loads((shop.root / f"{size}.json").read_text()) for size in (1, 2)}


def test_parameters_that_the_loss_never_sees_decay_alone_as_on_two_ranks(found: dict[int, dict[str, Any]]) -> None:
    assert found[1]["norms"] == pytest.approx(found[2]["norms"], rel=1e-5) and min(found[1]["norms"]) > 0
    for name, value in found[1]["after"].items():
        assert value == pytest.approx(found[2]["after"][name], rel=1e-5, abs=1e-5), name
    unseen = "mask_head.weight"
    assert found[1]["after"][unseen] == pytest.approx(found[1]["before"][unseen] * (1 - 0.01 * 0.1) ** 3, rel=1e-5)
    assert found[1]["after"]["head.weight"] != found[1]["before"]["head.weight"]


@pytest.mark.parametrize("size", [1, 2])
def test_statistics_are_those_of_before_a_step_that_is_left_out(found: dict[int, dict[str, Any]], size: int) -> None:
    first, moved, spoilt, after = found[size]["statistics"]
    assert first != moved and spoilt != moved, "each forward pass moves them"
    assert after == moved


@pytest.mark.parametrize("size", [1, 2])
def test_at_its_least_scale_fp16_leaves_updates_out_and_goes_on(found: dict[int, dict[str, Any]], size: int) -> None:
    """DeepSpeed alone would raise an exception at the second; here the guard says when it is enough."""
    assert found[size]["scales"] == [[1, 1], [1, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("size", [1, 2])
def test_updates_are_the_optimisers_steps_where_a_state_does_not_count_them(found: dict[int, dict[str, Any]], size: int) -> None:
    assert found[size]["updates"] == [3, 3]
