"""Masked images: the ViT paper's patch prediction, and MAE.

Shapes: b micro-batch, P input pixels, N patches of p x p pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from pipeline.models.mae import targets
from pipeline.models.options import Options
from pipeline.objectives.objective import Facts, Metrics, Objective, unwrapped
from pipeline.stream.batches import MicroBatch
from pipeline.stream.decode import normalize

KEEP, MASK = -1, -2  # how VisionTransformer.forward reads a corruption; a number from 0 names another patch


class PatchesOptions(Options):
    """`corrupt`: the part of the patches that is corrupted; of these `masked` become the mask embedding and `swapped` that of
    another patch of the image; the rest stay as they are."""

    corrupt: float = Field(0.5, gt=0, le=1)
    masked: float = Field(0.8, ge=0, le=1)
    swapped: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _leave_no_less_than_none(self) -> PatchesOptions:
        if self.masked + self.swapped > 1 + 1e-9:
            raise ValueError(f"swapped: {self.swapped:g} and masked ({self.masked:g}) are parts of the same patches, together at most 1")
        return self


class MaskedPatches(Objective):
    """Masked patch prediction (arXiv 2010.11929, appendix B.1.2): the mean colour, in 3 bits a channel, of each corrupted patch."""

    families = frozenset({"vit"})
    needs = frozenset()
    metrics = frozenset({"top1"})
    arguments = PatchesOptions
    options: PatchesOptions

    @staticmethod
    def model_options(options: PatchesOptions, facts: Facts) -> Mapping[str, Any]:
        return {"classes": 0, "masked": True}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        images = self.inputs.images(batch)
        colors = mean_colors(batch.images, round(images.shape[-1] / grid_side(model)))
        b, n = colors.shape
        corruption, chosen = draw_corruption(b, n, self.options, images.device)
        logits = model(images, corruption=corruption)[chosen].float()
        wanted = colors[chosen]
        return F.cross_entropy(logits, wanted), {"top1": (logits.argmax(dim=1) == wanted).float().mean()}


def grid_side(model: nn.Module) -> int:
    """Patches along a side of the model's input."""
    options: Any = unwrapped(model).options
    return options.pixels // options.patch


def mean_colors(images: torch.Tensor, patch: int) -> torch.Tensor:
    """uint8 (b, P, P, 3) to int64 (b, N) from 0 to 511: each patch's mean, the three highest bits of each channel, red highest."""
    means = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), patch)  # (b, 3, P / p, P / p)
    red, green, blue = (means / 32).long().flatten(2).unbind(1)
    return 64 * red + 8 * green + blue


def draw_corruption(b: int, n: int, how: PatchesOptions, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 (b, n) for the model, bool (b, n): which patches are to be predicted). The same number is chosen in each image."""
    chosen = torch.zeros(b, n, dtype=torch.bool, device=device)
    count = max(1, round(how.corrupt * n))
    chosen.scatter_(1, torch.rand(b, n, device=device).argsort(dim=1)[:, :count], value=True)
    fate = torch.rand(b, n, device=device)
    other = (torch.arange(n, device=device) + torch.randint(1, max(2, n), (b, n), device=device)) % n
    corruption = torch.where(fate < how.masked, MASK, torch.where(fate < how.masked + how.swapped, other, KEEP))
    return torch.where(chosen, corruption, KEEP), chosen


class MAEOptions(Options):
    """`normalise`: predict pixels normalised within their patch, which the paper found better."""

    normalise: bool = True


class MaskedAutoencoder(Objective):
    """arXiv 2111.06377, section 3: the mean squared error of masked patches."""

    families = frozenset({"mae"})
    needs = frozenset()
    arguments = MAEOptions
    options: MAEOptions

    @staticmethod
    def model_options(options: MAEOptions, facts: Facts) -> Mapping[str, Any]:
        return {}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        images = self.inputs.images(batch)
        side = grid_side(model)
        noise = torch.rand(len(images), side * side, device=images.device)
        predicted, mask = model(images, noise)
        exact = normalize(batch.images, self.inputs.mean, self.inputs.std)  # targets are not of pixels rounded to 16 bits
        wanted = targets(exact, images.shape[-1] // side, self.options.normalise)
        error = (predicted.float() - wanted).square().mean(dim=2)  # (b, N)
        return (error * mask).sum() / mask.sum(), {}
