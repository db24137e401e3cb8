"""The linear probe of CLIP (arXiv 2103.00020, appendix A.3).

Logistic regression by L-BFGS, at most 1,000 iterations, on the frozen features that the head sees. As CLIP does it, the
features are not standardised. The strength lambda of the L2 penalty is one of 96 logarithmic steps from 1e-6 to 1e6, found
on a held-out tenth of the training split: seven coarse points, then half the distance around the best until one step
is left. Then all of the training split is fitted once more.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import DataError
from pipeline.evaluate.features import extract, load_model
from pipeline.evaluate.results import Result, make_result
from pipeline.evaluate.tasks import Task

STEPS = 96
COARSE = 16  # seven points: 0, 16, .., 96
ITERATIONS = 1000


@dataclass(frozen=True)
class Fit:
    model: LogisticRegression
    converged: bool


def strength(step: int) -> float:
    """lambda of a step of the grid: 1e-6 at 0, 1e6 at 96."""
    return 10.0 ** (-6 + 12 * step / STEPS)


def fit(x: np.ndarray, y: np.ndarray, penalty: float, *, after: Fit | None = None, iterations: int | None = None) -> Fit:
    """Features (N, D) and labels (N,) with L2 strength `penalty`, lambda = 1 / C; from zero, or on from where `after` is, which it
    uses up; for at most `iterations`, by default `ITERATIONS`."""
    model = after.model if after else LogisticRegression(solver="lbfgs", warm_start=True)
    model.set_params(C=1 / penalty, max_iter=iterations or ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    stopped = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for other in caught:
        if other not in stopped:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return Fit(model, not stopped)


def search(score: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """(best step, score of each step tried) on the grid 0..96; of a tie the one nearest the middle.

    At the strong end scores depend on where the solver stops: weights are tiny, and the fit of nine tenths may end before the
    intercepts move (all held-out images right), where that of all goes on until they outweigh the features.
    """
    tried = {step: score(step) for step in range(0, STEPS + 1, COARSE)}

    def best() -> int:
        return max(tried, key=lambda step: (tried[step], -abs(step - STEPS // 2)))

    distance = COARSE // 2
    while distance:
        centre = best()
        for step in (centre - distance, centre + distance):
            if 0 <= step <= STEPS and step not in tried:
                tried[step] = score(step)
        distance //= 2
    return best(), tried


def held_out(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(nine tenths, one tenth) of the row numbers 0 to count - 1, each sorted; at least one row is held out."""
    order = np.random.default_rng(seed).permutation(count)
    size = max(1, count // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def evaluate_linear(card: ModelCard, state: dict[str, torch.Tensor], task: Task, fingerprint: str, seed: int) -> Result:
    """`details`: the chosen lambda, the held-out scores of the sweep, and whether the last fit converged.

    Raises:
        DataError: the training split has fewer than two classes.
    """
    start = time.perf_counter()
    model = load_model(card, state)
    train, test = (extract(model.features, card, task.open(split)) for split in (task.train, task.test))
    inner, outer = held_out(len(train.labels), seed)
    if len(np.unique(train.labels[inner])) < 2:
        raise DataError(f"evaluate: {task.name}: the split {task.train!r} has too few classes for a linear probe")

    def score(step: int) -> float:
        probe = fit(train.values[inner], train.labels[inner], strength(step)).model
        return float(np.mean(probe.predict(train.values[outer]) == train.labels[outer]))

    step, tried = search(score)
    final = fit(train.values, train.labels, strength(step))
    correct = int((final.model.predict(test.values) == test.labels).sum())
    details = {
        "lambda": strength(step),
        "sweep": [{"lambda": strength(s), "held_out_top1": v} for s, v in sorted(tried.items())],
        "converged": final.converged,
        "standardised": False,
    }
    seconds = time.perf_counter() - start
    return make_result("linear", task, [correct], len(test.labels), seconds=seconds, fingerprint=fingerprint, details=details)
