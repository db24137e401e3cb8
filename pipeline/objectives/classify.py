"""Supervised classification: softmax or sigmoid cross-entropy.

Shapes: b micro-batch, P input pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.options import Options, Rate
from pipeline.objectives.objective import Facts, Metrics, Objective
from pipeline.stream.batches import MicroBatch
from pipeline.stream.mixing import Mix

CLASSIFIERS = frozenset({"vit", "bit", "resnet"})


class ClassifyOptions(Options):
    """`smoothing`: label smoothing (arXiv 1512.00567, section 7). `loss`: one softmax over the classes, or a sigmoid for each
    (arXiv 2006.07159, section 4; AugReg's on ImageNet-21k, where classes overlap)."""

    smoothing: Rate = 0.0
    loss: Literal["softmax", "sigmoid"] = "softmax"


class Classify(Objective):
    """A sample without a label (-1) is left out."""

    families = CLASSIFIERS
    needs = frozenset({"labels"})
    metrics = frozenset({"top1"})
    mixes = True
    arguments = ClassifyOptions
    options: ClassifyOptions

    @staticmethod
    def model_options(options: ClassifyOptions, facts: Facts) -> Mapping[str, Any]:
        return {"classes": facts.classes}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """Means over labelled samples; 0 without any. `top1` of a mixed batch is against the label with the larger share."""
        return self.of_logits(model(self.inputs.images(batch)), batch)

    def of_logits(self, logits: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss of logits (b, C)."""
        return classification_loss(logits.float(), batch.labels, batch.mix, self.options)

    def count(self, batch: MicroBatch) -> torch.Tensor:
        return (batch.labels >= 0).sum()


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, mix: Mix | None, how: ClassifyOptions) -> tuple[torch.Tensor, Metrics]:
    """Logits (b, C) and labels (b,) to the loss and `top1`, means over labelled samples.

    `mix` says how the images were mixed, the labels were not: the loss is lam L(labels) + (1 - lam) L(partners' labels), which
    both losses, linear in their targets, make of the mixed labels. A label that is missing leaves its term out, the partner's
    stays with the weight it has; so each label weighs 1 in all, mixed or not.
    """
    labelled = (labels >= 0).sum().clamp(min=1)
    loss = _total(logits, labels, how)
    if mix is not None:
        partners = labels.flip(0)
        loss = mix.lam * loss + (1 - mix.lam) * _total(logits, partners, how)
        labels = labels if mix.lam >= 0.5 else partners
    return loss / labelled, {"top1": (logits.argmax(dim=1) == labels).sum() / labelled}


def _total(logits: torch.Tensor, labels: torch.Tensor, how: ClassifyOptions) -> torch.Tensor:
    """Summed over labelled samples; of the sigmoids, summed over the classes too."""
    if how.loss == "softmax":
        return F.cross_entropy(logits, labels, label_smoothing=how.smoothing, ignore_index=-1, reduction="sum")
    known = labels >= 0
    targets = torch.full_like(logits, how.smoothing / logits.shape[1])
    targets.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), torch.full_like(targets[:, :1], 1 - how.smoothing))
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1) * known).sum()
