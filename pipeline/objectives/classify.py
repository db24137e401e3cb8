"""Supervised classification with softmax cross-entropy.

Shapes: b micro-batch, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.stream.mixing import Mix


class Classify:
    """Label smoothing (arXiv 1512.00567, section 7) by `smoothing`; a sample without a label (-1) is left out."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, mix: Mix | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Normalised images (b, 3, P, P) and labels (b,) to the loss and metrics, each a mean over labelled samples; 0 without any.

        `mix` says how the images were mixed, the labels were not: the loss is lam CE(labels) + (1 - lam) CE(partners'
        labels), which is cross-entropy with the mixed labels as soft targets. A label that is missing leaves its term out,
        the partner's stays with the weight it has; so each label weighs 1 in all, mixed or not. `top1` is then against the
        label with the larger share.
        """
        logits = model(images).float()
        labelled = (labels >= 0).sum().clamp(min=1)
        loss = self._total(logits, labels)
        if mix is not None:
            partners = labels.flip(0)
            loss = mix.lam * loss + (1 - mix.lam) * self._total(logits, partners)
            labels = labels if mix.lam >= 0.5 else partners
        return loss / labelled, {"top1": (logits.argmax(dim=1) == labels).sum() / labelled}

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, ignore_index=-1, reduction="sum")
