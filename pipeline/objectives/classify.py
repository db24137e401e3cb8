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
        """Normalised images (b, 3, P, P) and labels (b,) to the mean loss and metrics, each a mean over samples."""
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, ignore_index=-1)
        return loss, {"top1": (logits.argmax(dim=1) == labels).float().mean()}
