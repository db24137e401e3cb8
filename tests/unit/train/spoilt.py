"""An objective whose loss goes wrong at given micro-batches, for `drive.py`: what odd data would do, at a known place."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import nn

from pipeline.objectives.classify import Classify, ClassifyOptions
from pipeline.objectives.objective import Metrics
from pipeline.objectives.registry import OBJECTIVES
from pipeline.stream.batches import MicroBatch


class SpoiltOptions(ClassifyOptions):
    """The loss of the micro-batches `at` is no number, or is infinite without an infinite gradient, or has such a gradient alone, or is
    20 higher."""

    pause: float = 0.0  # seconds a micro-batch, for a save to end meanwhile
    at: tuple[int, ...] = ()
    how: Literal["nan", "inf", "gradient", "high"] = "nan"


class Spoilt(Classify):
    arguments = SpoiltOptions
    options: SpoiltOptions  # type: ignore[assignment]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        time.sleep(self.options.pause)
        loss, metrics = super().loss(model, batch)
        if batch.index in self.options.at and torch.is_grad_enabled():  # validation counts its batches too
            if self.options.how == "gradient":
                loss = loss + (loss - loss.detach()).sqrt() - (loss - loss.detach()).detach()  # the slope of a root at 0
            else:
                loss = loss + {"nan": float("nan"), "inf": float("inf"), "high": 20.0}[self.options.how]
        return loss, metrics


OBJECTIVES["spoilt"] = Spoilt
