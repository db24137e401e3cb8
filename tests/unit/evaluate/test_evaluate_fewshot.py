from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.evaluate.fewshot import BIAS, PENALTY, classify, draw, evaluate_fewshot, solve, standardise
from pipeline.evaluate.tasks import Task


@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 30)])
def test_solution_equals_both_naive_forms(n: int, d: int) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(n, d)), random.normal(size=(n, 3))
    primal = np.linalg.solve(x.T @ x + 2 * np.eye(d), x.T @ y)
    dual = x.T @ np.linalg.solve(x @ x.T + 2 * np.eye(n), y)
    np.testing.assert_allclose(solve(x, y, 2), primal, atol=1e-10)
    np.testing.assert_allclose(solve(x, y, 2), dual, atol=1e-10)


def test_classify_follows_the_definition_step_by_step() -> None:
    random = np.random.default_rng(1)
    shots, labels = random.normal(3, 2, size=(12, 4)), np.arange(12) % 3
    test = random.normal(3, 2, size=(50, 4))
    mean, std = shots.mean(axis=0), shots.std(axis=0) + 1e-5
    x = np.hstack([(shots - mean) / std, np.full((12, 1), 100.0)])
    y = 2 * (labels[:, None] == np.arange(3)) - 1
    w = np.linalg.inv(x.T @ x + 2.0**10 * np.eye(5)) @ x.T @ y
    expected = (np.hstack([(test - mean) / std, np.full((50, 1), 100.0)]) @ w).argmax(axis=1)
    assert (classify(shots, labels, test, 3) == expected).all()
    assert (PENALTY, BIAS) == (1024, 100)


def test_a_constant_feature_does_not_divide_by_zero() -> None:
    assert np.isfinite(standardise(np.ones((3, 2)), np.ones((3, 2)))).all()


def test_draw_takes_k_of_each_class_and_nests() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 10)
    five, one = draw(labels, 3, 5, seed=0), draw(labels, 3, 1, seed=0)
    assert np.bincount(labels[five]).tolist() == [5, 3, 5]
    assert set(one) < set(five)
    assert set(draw(labels, 3, 5, seed=1)) != set(five)


def test_evaluation_names_classes_that_are_too_small(card: ModelCard, state: dict[str, torch.Tensor], task: Task) -> None:
    results = evaluate_fewshot(card, state, task, {2: "a", 1000: "b"}, seeds=[0, 1])
    assert [r.name for r in results] == ["few-shot/2", "few-shot/1000"]
    assert [r.fingerprint for r in results] == ["a", "b"]
    assert results[0].details["short_classes"] == {}
    assert set(results[1].details["short_classes"]) == {"blue", "green", "red"}
    assert results[1].values[0] == results[1].values[1], "all images of a class are the same whatever the seed"
    assert results[0].low <= results[0].value <= results[0].high
    assert results[1].value > 0.6, "the colours are plain even to untrained features"
