"""Images and captions that belong together: CLIP's softmax and SigLIP's sigmoid.

Shapes: b micro-batch, E embedding. Negatives come from the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.options import Options
from pipeline.objectives.objective import Facts, Metrics, Objective
from pipeline.stream.batches import MicroBatch


class Contrastive(Objective):
    """CLIP (arXiv 2103.00020, figure 3): symmetric cross-entropy over the cosine similarities of b x b pairs, scaled."""

    families = frozenset({"clip"})
    needs = frozenset({"captions"})
    metrics = frozenset({"logit_scale", "top1"})

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        return {"vocabulary": facts.vocabulary, "context": facts.context}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """`top1`: how often an image is nearest to its own caption."""
        images, texts, scale, _ = _embed(model, self.inputs.images(batch), batch)
        logits = scale * images @ texts.T
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, {"top1": (logits.argmax(dim=1) == own).float().mean(), "logit_scale": scale}


class SigmoidContrastive(Objective):
    """SigLIP (arXiv 2303.15343, equation 1): each of b x b pairs on its own, summed over pairs, a mean over images."""

    families = frozenset({"clip"})
    needs = frozenset({"captions"})
    metrics = frozenset({"logit_scale", "top1"})

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        """Temperature and bias begin as section 3.2 has them, where the config says nothing else."""
        return {"vocabulary": facts.vocabulary, "context": facts.context, "logit_scale": math.log(10), "logit_bias": -10.0}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        images, texts, scale, bias = _embed(model, self.inputs.images(batch), batch)
        logits = scale * images @ texts.T + bias
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        own = torch.arange(len(logits), device=logits.device)
        return -F.logsigmoid(signs * logits).sum() / len(logits), {
            "top1": (logits.argmax(dim=1) == own).float().mean(),
            "logit_scale": scale,
        }


def _embed(
    model: nn.Module, images: torch.Tensor, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Image and text features (b, E), the scale, the bias (0 where the model has none); the model gives fp32."""
    assert batch.tokens is not None, "an objective of captions is given tokens"
    image, text, scale, *bias = model(images, batch.tokens)
    return image, text, scale, bias[0] if bias else 0.0
