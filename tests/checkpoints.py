"""Checkpoints made by hand, with the code that makes them in training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.checkpoint import Checkpoints, Commit, Lease, ModelCard
from pipeline.checkpoint.commit import HISTORY, STATE
from pipeline.checkpoint.fragments import WEIGHT, Fragment
from pipeline.checkpoint.model import CARD
from pipeline.checkpoint.retain import Retention
from pipeline.checkpoint.save import Saver, new_attempt
from pipeline.core.storage import Storage
from pipeline.core.world import World

KEEP_ALL = Retention(keep=1000)


def commit_model(
    run: Storage | str, card: ModelCard, weights: Mapping[str, torch.Tensor], *, step: int | None = None, history: Iterable[Any] = ()
) -> Commit:
    """Commit the weights of a model at `step`, by default the card's, as a single rank would."""
    at = card.step if step is None else step
    checkpoints = Checkpoints(run if isinstance(run, Storage) else Storage(run))
    fragments = [Fragment(WEIGHT, name, 0, tensor.detach().contiguous().view(-1)) for name, tensor in weights.items()]
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    files = {
        STATE: json.dumps({"engine": {"shapes": shapes}}).encode(),
        CARD: replace(card, step=at).to_json(),
        HISTORY: "".join(json.dumps(row) + "\n" for row in history).encode(),
    }
    lease = checkpoints.newest_lease() or checkpoints.acquire()
    return commit_fragments(checkpoints, lease, fragments, at, files)


def commit_fragments(
    checkpoints: Checkpoints,
    lease: Lease,
    fragments: Sequence[Fragment],
    step: int,
    files: Mapping[str, bytes],
    retention: Retention = KEEP_ALL,
    **changes: Any,
) -> Commit:
    saver = Saver(checkpoints, lease, fragments, retention, 5.0, World())
    try:
        values = {
            "step": step, "samples": 10 * step, "generation": lease.generation, "attempt": new_attempt(lease), "world_size": 1,
            "zero_stage": 0, "view": "view", "config": "config", "files": [],
        }  # fmt: skip
        saver.begin(fragments, Commit(**{**values, **changes}), files)
        outcome = saver.take(timeout=60)
        assert outcome is not None, "it took more than a minute"
        if outcome.error is not None:
            raise outcome.error
    finally:
        saver.close()
    return checkpoints.read(step)
