"""An objective whose loss goes wrong at given micro-batches, for `drive.py`: what odd data would do, at a known place."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import nn

from pipeline.objectives.classify import Classify, ClassifyOptions
from pipeline.objectives.objective import Metrics, unwrapped
from pipeline.objectives.registry import OBJECTIVES
from pipeline.stream.batches import MicroBatch


class SpoiltOptions(ClassifyOptions):
    """The loss of the micro-batches `at` is no number, or is infinite without an infinite gradient, or has such a gradient alone, or is
    20 higher; or it is as it was, and a bit of a weight changes on the rank that has the micro-batch."""

    pause: float = 0.0  # seconds a micro-batch, for a save to end meanwhile
    at: tuple[int, ...] = ()
    how: Literal["nan", "inf", "gradient", "high", "flip"] = "nan"


class Spoilt(Classify):
    arguments = SpoiltOptions
    options: SpoiltOptions  # type: ignore[assignment]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        time.sleep(self.options.pause)
        loss, metrics = super().loss(model, batch)
        if batch.index in self.options.at and torch.is_grad_enabled():  # validation counts its batches too
            match self.options.how:
                case "gradient":
                    zero = loss - loss.detach()
                    loss = loss.detach() + zero.sqrt()  # the slope of a root at 0
                case "flip":
                    bits = unwrapped(model).get_parameter("head.weight").data.view(torch.int32)
                    bits[0, 0] ^= 1
                case "high":
                    loss = loss + 20
                case how:
                    loss = loss + float(how)
        return loss, metrics


OBJECTIVES["spoilt"] = Spoilt
