"""A trained model run over a split, without augmentation.

Shapes: N samples, D the model's width, C classes, P input pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError
from pipeline.models import build_model
from pipeline.models.vit import VisionTransformer
from pipeline.stream import Dataset
from pipeline.stream.batches import evaluation_batches
from pipeline.stream.decode import normalize

BATCH = 64


@dataclass(frozen=True)
class Features:
    """`values` float32 (N, D), or (N, C) where logits were asked for; `labels` int64 (N,); `keys` N sample keys."""

    values: np.ndarray
    labels: np.ndarray
    keys: list[str]

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.values[rows], self.labels[rows], [self.keys[r] for r in rows])


def device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def load_model(card: ModelCard, state: dict[str, torch.Tensor]) -> VisionTransformer:
    """The model that `card` describes with the weights `state`, in fp32, ready to evaluate.

    Raises:
        CheckpointError: the weights are of another model.
    """
    model = build_model(card.model, card.arguments, pixels=card.pixels, classes=len(card.classes))
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise CheckpointError(f"checkpoint: the weights of step {card.step} do not fit the model {card.model!r} ({e})") from e
    return model.to(device()).eval()


def labelled(dataset: Dataset) -> np.ndarray:
    """The numbers, in order, of the samples that have a label; int64."""
    return np.flatnonzero(dataset.labels() >= 0)


def extract(
    run: Callable[[torch.Tensor], torch.Tensor],
    card: ModelCard,
    dataset: Dataset,
    numbers: Sequence[int] | np.ndarray | None = None,
    *,
    pixels: int | None = None,
    batch: int = BATCH,
) -> Features:
    """What `run` (a model, or its `features`) gives for each sample of `numbers`, by default for all labelled ones.

    The view is `evaluation_view` at `pixels` (default: the card's), normalised with the card's mean and deviation.
    """
    chosen = labelled(dataset) if numbers is None else np.asarray(numbers)
    values, labels, keys = [], [], []
    with torch.inference_mode():
        for piece in evaluation_batches(dataset, pixels or card.pixels, batch, workers=1, numbers=chosen.tolist()):
            images = normalize(piece.images.to(device()), card.mean, card.std)
            values.append(run(images).float().cpu().numpy())
            labels.append(piece.labels.numpy())
            keys += piece.keys
    return Features(np.concatenate(values), np.concatenate(labels), keys)
