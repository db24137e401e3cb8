from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.evaluate import probe
from pipeline.evaluate.probe import evaluate_linear, fit, held_out, search, strength
from pipeline.evaluate.tasks import Task


def test_grid_is_96_log_steps() -> None:
    assert strength(0) == pytest.approx(1e-6)
    assert strength(48) == pytest.approx(1)
    assert strength(96) == pytest.approx(1e6)


@pytest.mark.parametrize("peak", [0, 17, 48, 63, 96])
def test_search_finds_a_single_peak_in_few_tries(peak: int) -> None:
    best, tried = search(lambda step: -abs(step - peak))
    assert best == peak
    assert len(tried) <= 7 + 2 * 4
    assert set(range(0, 97, 16)) <= set(tried)


def test_search_prefers_the_middle_in_a_tie() -> None:
    """At a penalty of 1e6 all held-out scores may still be perfect, and the last fit, which goes on longer, be no better than chance."""
    assert search(lambda step: 1.0)[0] == 48 and search(lambda step: float(step >= 60))[0] <= 66


def test_held_out_is_a_tenth_and_nothing_is_lost() -> None:
    inner, outer = held_out(55, seed=3)
    assert len(outer) == 5
    assert sorted([*inner, *outer]) == list(range(55))
    assert (held_out(55, seed=3)[1] == outer).all()


def test_a_fit_that_stops_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 5)) * 50, np.arange(60) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(x, y, 1.0).converged
        monkeypatch.setattr(probe, "ITERATIONS", 2)
        assert not fit(x, y, 1e-6).converged


def test_penalty_is_one_over_c() -> None:
    assert fit(np.eye(4), np.array([0, 1, 0, 1]), 4.0).model.C == 0.25


def test_linear_probe_of_untrained_features(card: ModelCard, state: dict[str, torch.Tensor], task: Task) -> None:
    result = evaluate_linear(card, state, task, "f", seed=0)
    assert result.value > 0.8
    assert result.low < result.value <= result.high
    assert result.n == len(task.open("test"))
    assert result.details["converged"] in (True, False)
    assert result.details["lambda"] in [row["lambda"] for row in result.details["sweep"]]
