"""Objectives whose loss goes wrong at given micro-batches, for `drive.py`: what odd data would do, at a known place."""

from __future__ import annotations

import time
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from pipeline.models.options import Options
from pipeline.objectives.classify import Classify, ClassifyOptions
from pipeline.objectives.contrastive import Contrastive
from pipeline.objectives.joint import Embedded
from pipeline.objectives.objective import Metrics, unwrapped
from pipeline.objectives.registry import OBJECTIVES
from pipeline.stream.batches import MicroBatch


class SpoiltOptions(ClassifyOptions):
    """The loss of the micro-batches `at` is no number, or is infinite without an infinite gradient, or has such a gradient alone, or is
    20 higher, or has a gradient 1000 times as large; or it is as it was, and a bit of a weight changes on the rank that has the
    micro-batch."""

    pause: float = 0.0  # seconds a micro-batch, for a save to end meanwhile
    paused: tuple[int, int] = (0, 2**31)  # from which micro-batch on, and up to which
    slow: float = 0.0  # seconds a micro-batch, on the last rank alone
    at: tuple[int, ...] = ()
    how: Literal["nan", "inf", "gradient", "high", "steep", "flip"] = "nan"


class Spoilt(Classify):
    arguments = SpoiltOptions
    options: SpoiltOptions  # type: ignore[assignment]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        first, end = self.options.paused
        pause = self.options.pause * (first <= batch.index < end)
        time.sleep(pause + self.options.slow * (dist.get_rank() == dist.get_world_size() - 1))
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
                case "steep":
                    loss = loss + 1000 * (loss - loss.detach())
                case how:
                    loss = loss + float(how)
        return loss, metrics


class SpoiltPairsOptions(Options):
    """The second image of the micro-batches `at` has features that are no numbers."""

    at: tuple[int, ...] = ()


class SpoiltPairs(Contrastive):
    arguments = SpoiltPairsOptions
    options: SpoiltPairsOptions  # type: ignore[assignment]

    def embed(self, model: nn.Module, batch: MicroBatch) -> Embedded:
        embedded = super().embed(model, batch)
        if batch.index not in self.options.at:
            return embedded
        images, *others = embedded.features
        factor = torch.ones(len(images), 1)
        factor[1] = torch.nan
        return Embedded((images * factor, *others), embedded.scalars)


OBJECTIVES["spoilt"] = Spoilt
OBJECTIVES["spoilt-pairs"] = SpoiltPairs
