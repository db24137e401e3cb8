"""The model's own head on a task with the model's own classes."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.evaluate.features import extract, load_model, logits_of
from pipeline.evaluate.protocols import tells_apart
from pipeline.evaluate.results import Result, make_result, predictions
from pipeline.evaluate.tasks import Task


def evaluate_supervised(card: ModelCard, state: dict[str, torch.Tensor], task: Task, fingerprint: str) -> Result:
    """Top-1 of the head; `details["predictions"]` keeps each test sample's key, label, prediction and probability."""
    assert tells_apart(card, task.classes), "the head knows its own classes only"
    start = time.perf_counter()
    logits = extract(logits_of(load_model(card, state)), card, task.open(task.test))
    probabilities = softmax(logits.values)
    correct = int((probabilities.argmax(axis=1) == logits.labels).sum())
    details = {"data": task.url, "split": task.test, "predictions": predictions(logits, probabilities)}
    seconds = time.perf_counter() - start
    return make_result("supervised", task, [correct], len(logits.labels), seconds=seconds, fingerprint=fingerprint, details=details)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, C) to probabilities (N, C), in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
