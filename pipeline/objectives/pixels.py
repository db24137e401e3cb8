"""iGPT's objectives (Chen et al. 2020, section 2): the next pixel, or masked pixels as BERT has them; with classes for fine-tuning.

Shapes: b micro-batch, N = P^2 pixels, K colours, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pipeline.models.options import Options
from pipeline.objectives.classify import ClassifyOptions, classification_loss
from pipeline.objectives.objective import Facts, Metrics, Objective
from pipeline.stream.batches import MicroBatch


class PixelOptions(Options):
    """`mask`: the probability of a pixel to be masked."""

    mask: float = Field(0.15, gt=0, lt=1)


class NextPixel(Objective):
    """L_AR (equation 2): each pixel from those before it, in raster order; nats a pixel."""

    families = frozenset({"igpt"})
    needs = frozenset({"palette"})

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        return {"colors": facts.colors}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        tokens = self.inputs.pixels(batch)
        return next_pixel_loss(model(tokens), tokens), {}


class BertPixels(Objective):
    """L_BERT (equation 3): masked pixels from all others; the mean of an image's masked pixels, then of the images.

    An image of which chance masks nothing counts with a loss of 0.
    """

    families = frozenset({"igpt"})
    needs = frozenset({"palette"})
    arguments = PixelOptions
    options: PixelOptions

    @staticmethod
    def model_options(options: PixelOptions, facts: Facts) -> Mapping[str, Any]:
        return {"colors": facts.colors, "masked": True}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        tokens = self.inputs.pixels(batch)
        masked = draw_masked(tokens, self.options.mask)
        return masked_loss(model(tokens, masked=masked), tokens, masked), {}


class JointOptions(Options):
    """`generative`: the loss beside that of the classes; `weight`: what it counts."""

    generative: Literal["next-pixel", "bert-pixels"] = "next-pixel"
    weight: float = Field(1.0, ge=0)
    mask: float = Field(0.15, gt=0, lt=1)
    smoothing: float = Field(0.0, ge=0, lt=1)


class PixelsAndClasses(Objective):
    """Fine-tuning (section 2.3): L_gen + L_clf, which the paper found better than L_clf alone. Unlabelled images count in L_gen.

    With `generative: bert-pixels` both are of the masked image, from one pass.
    """

    families = frozenset({"igpt"})
    needs = frozenset({"palette", "labels"})
    metrics = frozenset({"classes", "generative", "top1"})
    arguments = JointOptions
    options: JointOptions

    @staticmethod
    def model_options(options: JointOptions, facts: Facts) -> Mapping[str, Any]:
        return {"colors": facts.colors, "classes": facts.classes, "masked": options.generative == "bert-pixels"}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        tokens = self.inputs.pixels(batch)
        if self.options.generative == "next-pixel":
            logits, classes = model(tokens, classify=True)
            generative = next_pixel_loss(logits, tokens)
        else:
            masked = draw_masked(tokens, self.options.mask)
            logits, classes = model(tokens, masked=masked, classify=True)
            generative = masked_loss(logits, tokens, masked)
        how = ClassifyOptions(smoothing=self.options.smoothing)
        loss, metrics = classification_loss(classes.float(), batch.labels, None, how)
        return self.options.weight * generative + loss, {"generative": generative, "classes": loss, **metrics}


def next_pixel_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (b, N, K) against tokens (b, N)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def draw_masked(tokens: torch.Tensor, probability: float) -> torch.Tensor:
    """bool (b, N): each place on its own."""
    return torch.rand(tokens.shape, device=tokens.device) < probability


def masked_loss(logits: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Logits (b, N, K) at the `masked` places against tokens (b, N): a mean an image, then of images."""
    loss = torch.zeros(tokens.shape, device=logits.device)
    loss = loss.masked_scatter(masked, F.cross_entropy(logits[masked].float(), tokens[masked], reduction="none"))
    return (loss.sum(dim=1) / masked.sum(dim=1).clamp(min=1)).mean()
