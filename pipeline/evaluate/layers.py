"""iGPT's linear probe of every layer (Chen et al. 2020, sections 2.4 and 4.1, figure 2).

Shapes: N images, L + 1 layers (what each of L blocks sees, and what the head sees), D features.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError, DataError
from pipeline.core.progress import Progress
from pipeline.evaluate.features import extract, load_model
from pipeline.evaluate.probe import COARSE, STEPS, Fit, fit, held_out, strength
from pipeline.evaluate.results import Result, make_result
from pipeline.evaluate.tasks import Task
from pipeline.models.igpt import IGPT

SWEEP = 200  # iterations of a fit that only compares strengths


def evaluate_layers(card: ModelCard, state: dict[str, torch.Tensor], task: Task, fingerprint: str, seed: int) -> Result:
    """The test score of the layer that is best on a held-out tenth of the training split (of a tie the one nearest the middle, near
    which the paper found the best); `details` holds the curve.

    All layers come from one pass over the images: N (L + 1) D numbers in memory. Each is fitted as `linear` fits, but the strength is
    one of the seven coarse ones, two decades apart, and these are tried from the strongest on, each for `SWEEP` iterations from where
    the last one ended: enough to tell layers apart, at a tenth of the cost.

    Raises:
        CheckpointError: the model is no iGPT. DataError: the training split has fewer than two classes.
    """
    start = time.perf_counter()
    model = load_model(card, state)
    if not isinstance(model, IGPT):
        raise CheckpointError(f"{card.model} has no layers to probe one by one; layers is for models of igpt")

    def all_layers(tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack(model.layers(tokens), dim=1)

    train, test = (extract(all_layers, card, task.open(split)) for split in (task.train, task.test))
    inner, outer = held_out(len(train.labels), seed)
    if len(np.unique(train.labels[inner])) < 2:
        raise DataError(f"evaluate: {task.name}: the split {task.train!r} has too few classes for a linear probe")
    rows: list[dict[str, Any]] = []
    with Progress("layers", train.values.shape[1], "layers") as progress:
        for layer in range(train.values.shape[1]):
            x = train.values[:, layer]
            step, score = choose_strength(x[inner], train.labels[inner], x[outer], train.labels[outer])
            final = fit(x, train.labels, strength(step))
            hits = int((final.model.predict(test.values[:, layer]) == test.labels).sum())
            rows.append({"layer": layer, "held_out_top1": score, "hits": hits, "lambda": strength(step), "converged": final.converged})
            progress.update(1, f"layer {layer} {hits / len(test.labels):.1%}")
    middle = (train.values.shape[1] - 1) / 2
    best = max(rows, key=lambda row: (row["held_out_top1"], -abs(row["layer"] - middle)))
    n = len(test.labels)
    curve = [{**{k: v for k, v in row.items() if k != "hits"}, "top1": row["hits"] / n} for row in rows]
    details = {"layers": curve, "best": best["layer"]}
    seconds = time.perf_counter() - start
    return make_result("layers", task, [best["hits"]], n, seconds=seconds, fingerprint=fingerprint, details=details)


def choose_strength(x: np.ndarray, y: np.ndarray, held_out_x: np.ndarray, held_out_y: np.ndarray) -> tuple[int, float]:
    """(step of the grid, its held-out score); of a tie the one nearest the middle, as `linear` has it."""
    tried: dict[int, float] = {}
    last: Fit | None = None
    for step in range(STEPS, -1, -COARSE):
        last = fit(x, y, strength(step), after=last, iterations=SWEEP)
        tried[step] = float(last.model.score(held_out_x, held_out_y))
    best = max(tried, key=lambda step: (tried[step], -abs(step - STEPS // 2)))
    return best, tried[best]
