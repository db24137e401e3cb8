"""Images and captions that belong together: CLIP's softmax and SigLIP's sigmoid, over all pairs of the global batch.

Shapes: b micro-batch, n own pairs of a rank, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.core.world import World
from pipeline.models.options import Options
from pipeline.objectives.joint import Coupled, Embedded, JointObjective
from pipeline.objectives.objective import Facts
from pipeline.objectives.pairs import PairLoss, Pairs, sigmoid_pairs, softmax_pairs
from pipeline.stream.batches import MicroBatch


class _Contrastive(JointObjective):
    """`top1`: how often an image is nearest to its own caption."""

    families = frozenset({"clip"})
    needs = frozenset({"captions"})
    metrics = frozenset({"logit_scale", "top1"})

    def embed(self, model: nn.Module, batch: MicroBatch) -> Embedded:
        """Features of images and captions (b, E), of length 1 and in fp32; the scale, and the bias where the model has one."""
        assert batch.tokens is not None, "an objective of captions is given tokens"
        image, text, *scalars = model(self.inputs.images(batch), batch.tokens)
        return Embedded((image, text), tuple(scalars))

    def couple(self, own: Embedded, sizes: Sequence[int], world: World) -> Coupled:
        scale = own.scalars[0]
        found = self.of_pairs(Pairs(*own.features), own.scalars, sizes, world)
        share = len(own.features[0]) / sum(sizes)
        metrics = {"top1": found.hits / sum(sizes), "logit_scale": scale * share}
        scalars = (found.scale, found.bias)[: len(own.scalars)]
        return Coupled(found.loss, metrics, (found.images, found.captions), scalars)

    def of_pairs(self, own: Pairs, scalars: tuple[torch.Tensor, ...], sizes: Sequence[int], world: World) -> PairLoss:
        raise NotImplementedError


class Contrastive(_Contrastive):
    """CLIP (arXiv 2103.00020, figure 3): symmetric cross-entropy over the cosine similarities of all pairs, scaled."""

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        return {"vocabulary": facts.vocabulary, "context": facts.context}

    def of_pairs(self, own: Pairs, scalars: tuple[torch.Tensor, ...], sizes: Sequence[int], world: World) -> PairLoss:
        return softmax_pairs(own, scalars[0], sizes, world)


class SigmoidContrastive(_Contrastive):
    """SigLIP (arXiv 2303.15343, equation 1): each pair of an image and a caption on its own, summed over pairs, a mean over images."""

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        """Temperature and bias begin as section 3.2 has them, where the config says nothing else."""
        return {"vocabulary": facts.vocabulary, "context": facts.context, "logit_scale": math.log(10), "logit_bias": -10.0}

    def of_pairs(self, own: Pairs, scalars: tuple[torch.Tensor, ...], sizes: Sequence[int], world: World) -> PairLoss:
        scale, bias = scalars if len(scalars) == 2 else (scalars[0], torch.zeros_like(scalars[0]))
        return sigmoid_pairs(own, scale, bias, sizes, world)
