"""Objectives whose loss couples all samples of the global batch, whatever the micro-batches and ranks.

    embed each micro-batch ─▶ features ─▶ couple: the loss of all, and its gradient by this rank's features ─▶ back through each

Where a rank has several micro-batches it embeds each twice, first without a graph (`train/accumulate.py`): GradCache, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.core.world import World
from pipeline.objectives.objective import Metrics, Objective
from pipeline.stream.batches import MicroBatch


@dataclass(frozen=True)
class Embedded:
    """What the loss sees of a model: `features` (b, ..) of each sample, and `scalars` () that belong to no sample, with their graph."""

    features: tuple[torch.Tensor, ...]
    scalars: tuple[torch.Tensor, ...]

    def detach(self) -> Embedded:
        return Embedded(tuple(f.detach() for f in self.features), tuple(s.detach() for s in self.scalars))

    def sound(self) -> torch.Tensor:
        """Whether all features of each sample are finite numbers, bool (b,): one that is not spoils the loss of all."""
        return torch.stack([f.detach().flatten(1).isfinite().all(dim=1) for f in self.features]).all(dim=0)


@dataclass(frozen=True)
class Coupled:
    """`loss` and `metrics` are this rank's share of means over the whole batch, of which all ranks' sum is the mean. The gradient of the
    whole loss: by this rank's `features` (n, ..), and its share of that by `scalars`."""

    loss: torch.Tensor
    metrics: Metrics
    features: tuple[torch.Tensor, ...]
    scalars: tuple[torch.Tensor, ...]

    def through(self, embedded: Embedded, at: slice, share: float) -> torch.Tensor:
        """A number () whose gradient is that of the loss through `embedded`, the samples `at` of this rank's, and through a `share` of
        the scalars'."""
        found = torch.zeros((), device=self.loss.device)
        for tensor, gradient in zip(embedded.features, self.features, strict=True):
            found = found + (tensor * gradient[at]).sum()
        for tensor, gradient in zip(embedded.scalars, self.scalars, strict=True):
            found = found + tensor * gradient * share
        return found


class JointObjective(Objective):
    """Base of these. `loss` of a batch alone has no others than its own samples: validation has it of each micro-batch."""

    def embed(self, model: nn.Module, batch: MicroBatch) -> Embedded:
        raise NotImplementedError

    def couple(self, own: Embedded, sizes: Sequence[int], world: World) -> Coupled:
        """Of this rank's samples `own`, without a graph; `sizes` says how many each rank has. All ranks together."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        embedded = self.embed(model, batch)
        own = embedded.detach()
        coupled = self.couple(own, [len(batch.images)], World())
        # The value of the loss, the gradient of the other.
        surrogate = coupled.through(embedded, slice(None), 1.0)
        return coupled.loss + surrogate - surrogate.detach(), coupled.metrics
