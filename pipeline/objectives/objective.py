"""What an objective is: it says what the model must have, and turns a batch into a loss.

Shapes: b micro-batch, P input pixels a side, N places of a sequence, C classes, K colours, V tokens there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pipeline.models.model import Model
from pipeline.models.options import Options
from pipeline.stream.batches import MicroBatch
from pipeline.stream.decode import normalize
from pipeline.stream.mixing import mixed
from pipeline.stream.palette import Palette

Metrics = dict[str, torch.Tensor]
VALIDATION = "validate/"  # before the names of loss and metrics on held-out data
Need = Literal["labels", "captions", "palette", "teacher"]


@dataclass(frozen=True)
class Facts:
    """What the data gives, as far as models depend on it: classes C, colours K, tokens V, tokens a caption."""

    classes: int = 0
    colors: int = 0
    vocabulary: int = 0
    context: int = 0


@dataclass(frozen=True)
class Teacher:
    """A classifier to learn from, in evaluation mode, and the mean and deviation that it normalises with."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Inputs:
    """How pixels become a model's input: normalised in `dtype`, or as the numbers of a palette's colours."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: torch.dtype = torch.float32
    palette: Palette | None = None
    teacher: Teacher | None = None

    def images(self, batch: MicroBatch) -> torch.Tensor:
        """Normalised (b, 3, P, P), mixed as the batch says."""
        return mixed(normalize(batch.images, self.mean, self.std, self.dtype), batch.mix)

    def pixels(self, batch: MicroBatch) -> torch.Tensor:
        """Numbers of colours, int64 (b, P * P), row by row."""
        assert self.palette is not None, "an objective of pixels is given a palette"
        return self.palette.encode(batch.images)


def unwrapped(model: nn.Module) -> Model:
    """The model itself, of which DeepSpeed's engine is a wrapper."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, Model), "objectives train models of the registry"
    return inner


class Objective:
    """Base of all objectives. The loss is a mean over `count(batch)` samples, and so is each metric.

    `families` are those of the models it can train, `needs` what it asks of the data. Masks and other draws come from torch's
    generator, which the loop seeds by the micro-batch. `metrics`: what it measures beside the loss. `mixes`: whether targets follow when
    images are mixed (mixup, CutMix).
    """

    families: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[Need]]
    metrics: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[bool] = False
    arguments: ClassVar[type[Options]] = Options

    def __init__(self, options: Any, inputs: Inputs) -> None:
        self.options, self.inputs = options, inputs

    @staticmethod
    def model_options(options: Any, facts: Facts) -> Mapping[str, Any]:
        """What the model is built with, beside what the config says of it."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss of a batch on the model's device, and the metrics that the class names."""
        raise NotImplementedError

    def count(self, batch: MicroBatch) -> torch.Tensor:
        """Samples that the loss is a mean of."""
        return torch.tensor(len(batch.images), device=batch.images.device)
