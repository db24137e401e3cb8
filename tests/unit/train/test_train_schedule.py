"""The learning rate at each step, and what a schedule may say."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError
from pipeline.objectives import Facts
from pipeline.plan import Plan, make_plan
from pipeline.train.schedule import SCHEDULES, factor


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.25), (3, 1.0), (4, 1.0),  # the warm-up, and the peak
        (34, 0.5**0.5), (94, 0.5),  # a time scale of 30 steps later: 1 / sqrt 2; of 90 steps: 1 / sqrt 4
        (184, 1 / 7**0.5),  # the cool-down begins, and is still whole
        (194, 0.5 / (1 + 190 / 30) ** 0.5), (203, 0.05 / (1 + 199 / 30) ** 0.5),
    ],
)  # fmt: skip
def test_reciprocal_square_root(step: int, value: float) -> None:
    """204 steps, 4 of them to warm up, 20 to cool down."""
    assert factor("rsqrt", step, 204, 4, 20, 30) == pytest.approx(value, abs=1e-12)


def test_reciprocal_square_root_does_not_know_the_end() -> None:
    short, long = ([factor("rsqrt", step, total, 10, 0, 100) for step in range(200)] for total in (200, 10_000))
    assert short == long


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("cooldown", [0, 30])
def test_every_schedule_rises_once_and_falls_once(name: str, cooldown: int) -> None:
    rates = [factor(name, step, 100, 20, cooldown, 50) for step in range(100)]
    assert rates[19] == rates[20] == max(rates) == 1.0 and min(rates) > 0
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] <= 1 / max(1, cooldown)


def config(schedule: Any) -> Config:
    model = {"name": "vit", "width": 8, "depth": 1, "heads": 1, "patch": 4}
    pretrain = {"model": model, "image": {"pixels": 8}, "batch": 100, "micro_batch": 10, "duration": "500 steps", "schedule": schedule}
    return parse_config({"name": "t", "storage": "runs", "data": "/d", "pretrain": pretrain})


def plan(**schedule: str) -> Plan:
    return make_plan(config(schedule), 1000, Facts(classes=3), 1)


def test_a_plan_counts_the_schedule_in_steps() -> None:
    p = plan(name="rsqrt", warmup="2 epochs", cooldown="20k samples", timescale="50 steps")
    assert (p.warmup, p.cooldown, p.timescale) == (20, 200, 50)
    p = plan(name="rsqrt")
    assert (p.warmup, p.cooldown, p.timescale) == (0, 0, 10_000)  # big_vision's time scale


def test_warmup_and_cooldown_fit_into_the_run() -> None:
    assert plan(name="rsqrt", warmup="100 steps", cooldown="400 steps").cooldown == 400
    with pytest.raises(ConfigError) as e:
        plan(name="rsqrt", warmup="100 steps", cooldown="401 steps")
    assert str(e.value) == "pretrain.schedule: warmup (100 steps) and cooldown (401 steps) are longer than the run (500 steps)"


@pytest.mark.parametrize("key", ["cooldown", "timescale"])
def test_only_rsqrt_has_a_cooldown(key: str) -> None:
    with pytest.raises(ConfigError) as e:
        config({"name": "linear", key: "10 steps"})
    assert str(e.value) == f"pretrain.schedule.{key}: is of the schedule rsqrt alone, and this is linear"
