from __future__ import annotations

import numpy as np
import pytest

from pipeline.checkpoint.interval import LEAST, best_interval, mean_time_between_failures


def loss(interval: float, cost: float, between_failures: float, seed: int = 0) -> float:
    """Share of the time that a long simulated run loses, to saves and to what failures undo."""
    random = np.random.default_rng(seed)
    done = spent = 0.0
    next_failure = random.exponential(between_failures)
    for _ in range(20_000):
        if spent + interval + cost <= next_failure:
            done, spent = done + interval, spent + interval + cost
        else:
            spent = next_failure
            next_failure += random.exponential(between_failures)
    return 1 - done / spent


@pytest.mark.parametrize(("cost", "between_failures"), [(5.0, 3600.0), (30.0, 1800.0), (60.0, 86_400.0)])
def test_no_other_interval_loses_much_less(cost: float, between_failures: float) -> None:
    chosen = best_interval(cost, between_failures, in_flight=0.0)
    least = min(loss(chosen * factor, cost, between_failures) for factor in (0.25, 0.5, 0.7, 1.4, 2.0, 4.0))
    assert loss(chosen, cost, between_failures) < least + 0.004
    assert loss(4 * chosen, cost, between_failures) > loss(chosen, cost, between_failures) + 0.01


def test_daly_by_hand() -> None:
    """Daly 2006, equation 37, with C = 2, M = 100: sqrt(400) (1 + sqrt(0.01) / 3 + 0.01 / 9) - 2."""
    assert best_interval(2.0, 100.0, 0.0) == pytest.approx(20 * (1 + 0.1 / 3 + 0.01 / 9) - 2)
    assert best_interval(300.0, 100.0, 0.0) == 100.0, "a save dearer than twice the time between failures"


def test_never_before_the_last_is_committed() -> None:
    assert best_interval(0.5, 86_400.0, in_flight=1000.0) == 1000.0
    assert best_interval(0.0, 60.0, in_flight=0.0) == LEAST


def test_the_rate_of_failures_is_learned() -> None:
    assert mean_time_between_failures(0.0, 0) == 86_400.0
    assert mean_time_between_failures(10 * 86_400.0, 0) == 11 * 86_400.0
    assert mean_time_between_failures(86_400.0, 95) == pytest.approx(1800.0)
