"""Supervised classification with softmax cross-entropy.

Shapes: b micro-batch, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Classify:
    """Label smoothing (arXiv 1512.00567, section 7) by `smoothing`; a sample without a label (-1) is left out."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Normalised images (b, 3, P, P) and labels (b,) to the loss and metrics, each a mean over labelled samples; 0 without any."""
        logits = model(images).float()
        labelled = (labels >= 0).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, ignore_index=-1, reduction="sum") / labelled
        return loss, {"top1": (logits.argmax(dim=1) == labels).sum() / labelled}
