"""The bench of our step against a bare loop: both sides train the same, and all that ours does is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.storage import Storage
from tests.bench.engine import Times, time_turns
from tests.bench.pairs import ratio_of_medians

MODEL = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 4, "pool": "gap"}
PAIRS = 5


@pytest.mark.parametrize(("precision", "ranks", "feed"), [("fp32", 2, "shards"), ("bf16", 1, "memory")])
def test_each_step_of_ours_is_followed_by_one_of_the_bare_loop(
    precision: str, ranks: int, feed: str, tmp_path: Path, make_dataset: Callable[..., Any]
) -> None:
    make_dataset(Storage(str(tmp_path / "data")), {"train": 40}, width=16, height=16)
    found = time_turns(tmp_path, MODEL, 16, 4, precision, ranks, feed, PAIRS, threads=1)
    assert len(found["ours"]) == len(found["bare"]) == len(found["ours_on_cores"]) == PAIRS
    assert all(seconds > 0 for key in ("ours", "bare", "ours_on_cores", "bare_on_cores") for seconds in found[key])
    wanted = {"forward", "backward", "step", "record", "hooks", "MLflow's thread", "the rest"}
    assert set(found["parts"]) == wanted | ({"loader"} if feed == "shards" else set())
    assert set(found["bare_parts"]) == {"forward", "backward", "step", "the rest"}
    assert found["loss"] == pytest.approx(found["bare_loss"], rel=1e-4 if precision == "fp32" else 0.02), "both train the same model"


def test_parts_add_up_to_the_turn() -> None:
    times = Times()
    times.begin_turn()
    assert times.timed("a", lambda x: x + 1)(1) == 2 and times.timed("a", len)([1]) == 1
    times.end_turn()
    assert sum(times.parts[part][0] for part in ("a", "the rest")) == pytest.approx(times.steps[0])


def test_the_ratio_is_of_speeds() -> None:
    low, ratio, high = ratio_of_medians([2.0, 2.0, 2.1, 1.9], [1.0, 1.0, 1.05, 0.95])
    assert low <= ratio <= high and ratio == pytest.approx(0.5)
