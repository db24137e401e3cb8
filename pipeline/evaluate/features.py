"""A trained model run over a split, without augmentation.

Shapes: N samples, D the model's width, C classes, P input pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError
from pipeline.models import Model
from pipeline.models.igpt import IGPT
from pipeline.models.registry import family_of
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


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products and convolutions of fp32 keep its 24 bits on GPUs too: cuDNN's would have the 11 of TF32, by PyTorch's default, and those of
    matrices where somebody allowed it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def load_model(card: ModelCard, state: dict[str, torch.Tensor]) -> Model:
    """The model that `card` describes with the weights `state`, in fp32, ready to evaluate.

    Raises:
        CheckpointError: the weights are of another model.
    """
    model = card.make()
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise CheckpointError(f"checkpoint: the weights of step {card.step} do not fit the model {card.model!r} ({e})") from e
    return model.to(device()).eval()


def preprocess(card: ModelCard) -> Callable[[torch.Tensor], torch.Tensor]:
    """From uint8 (N, P, P, 3) to the model's input: normalised (N, 3, P, P), or the numbers of its palette's colours (N, P * P).

    Raises:
        CheckpointError: a model of pixels without a palette, as published ones come.
    """
    if family_of(card.model) == "igpt":
        palette = card.open_palette()
        if palette is None:
            raise CheckpointError(f"checkpoint: {card.run} is a model of pixels, and comes without the palette that it was trained with")
        return palette.encode
    return lambda images: normalize(images, card.mean, card.std)


def logits_of(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the model's input to its class logits (N, C)."""
    if isinstance(model, IGPT):
        return lambda tokens: model(tokens, classify=True)[1]
    return model


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
    """What `run` (a model's `features`, or its logits) gives for each sample of `numbers`, by default for all labelled ones.

    The view is `evaluation_view` at `pixels` (default: the card's), preprocessed as the card says.
    """
    prepare = preprocess(card)
    chosen = labelled(dataset) if numbers is None else np.asarray(numbers)
    values, labels, keys = [], [], []
    with torch.inference_mode():
        for piece in evaluation_batches(dataset, pixels or card.pixels, batch, workers=1, numbers=chosen.tolist()):
            values.append(run(prepare(piece.images.to(device()))).float().cpu().numpy())
            labels.append(piece.labels.numpy())
            keys += piece.keys
    return Features(np.concatenate(values), np.concatenate(labels), keys)
