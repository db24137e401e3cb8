"""Closed-form few-shot classification: big_vision's `fewshot_lsr`.

Least squares with an L2 penalty onto targets -1 and 1, from the first k images a class of a random order, on the frozen
features that the head sees. Shapes: N few-shot images, D features with the bias, C classes, M test images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.evaluate.features import extract, labelled, load_model
from pipeline.evaluate.results import Result, make_result
from pipeline.evaluate.tasks import Task

PENALTY = 2.0**10
BIAS = 100.0  # a large constant feature, so that the bias is hardly penalised
EPSILON = 1e-5


def draw(labels: np.ndarray, classes: int, shots: int, seed: int) -> np.ndarray:
    """Row numbers of `shots` images of each class (all it has, where it has fewer), classes in order.

    Fewer shots of the same seed are a part of more.
    """
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
    return np.concatenate([r[:shots] for r in rows])


def standardise(x: np.ndarray, shots: np.ndarray) -> np.ndarray:
    """x (M, D - 1) by mean and deviation of the few-shot features, with the bias feature appended: (M, D), float64."""
    shots = shots.astype(np.float64)
    scaled = (x - shots.mean(axis=0)) / (shots.std(axis=0) + EPSILON)
    return np.pad(scaled, ((0, 0), (0, 1)), constant_values=BIAS)


def solve(x: np.ndarray, y: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """W (D, C) that minimises |XW - Y|^2 + penalty |W|^2, for X (N, D) and Y (N, C).

    By the eigenvectors of the smaller of two matrices: (X'X + l I)^-1 X'Y, or where D > N its dual form X'(XX' + l I)^-1 Y.
    """
    dual = x.shape[1] > x.shape[0]
    eigenvalues, q = np.linalg.eigh(x @ x.T if dual else x.T @ x)
    inner = y if dual else x.T @ y
    solved = (q / (eigenvalues + penalty)) @ (q.T @ inner)
    return x.T @ solved if dual else solved


def classify(shots: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Class numbers (M,) of the features `test`, from the features `shots` (N, D - 1) with `labels` (N,)."""
    targets = 2 * np.eye(classes)[labels] - 1
    weights = solve(standardise(shots, shots), targets)
    return (standardise(test, shots) @ weights).argmax(axis=1)


def evaluate_fewshot(
    card: ModelCard, state: dict[str, torch.Tensor], task: Task, fingerprints: dict[int, str], seeds: Sequence[int]
) -> list[Result]:
    """One result for each number of shots in `fingerprints`; `details["short_classes"]` names classes with fewer images."""
    start = time.perf_counter()
    model, classes = load_model(card, state), len(task.classes)
    train, test = task.open(task.train), extract(model.features, card, task.open(task.test))
    numbers = labelled(train)
    labels = train.labels()[numbers]
    drawn = {(shots, seed): draw(labels, classes, shots, seed) for shots in fingerprints for seed in seeds}
    used = np.unique(np.concatenate(list(drawn.values())))
    pool = extract(model.features, card, train, numbers[used])
    counts = np.bincount(labels, minlength=classes)
    shared = (time.perf_counter() - start) / len(fingerprints)

    results = []
    for shots, fingerprint in fingerprints.items():
        start, correct = time.perf_counter(), []
        for seed in seeds:
            rows = np.searchsorted(used, drawn[shots, seed])
            predicted = classify(pool.values[rows], pool.labels[rows], test.values, classes)
            correct.append(int((predicted == test.labels).sum()))
        details = {
            "shots": shots,
            "penalty": PENALTY,
            "short_classes": {task.classes[c]: int(counts[c]) for c in range(classes) if counts[c] < shots},
        }
        seconds = shared + time.perf_counter() - start
        name = f"few-shot/{shots}"
        results.append(make_result(name, task, correct, len(test.labels), seconds=seconds, fingerprint=fingerprint, details=details))
    return results
