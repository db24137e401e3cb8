"""The models that are timed, ours and the peers', with the batches and losses that they are timed on.

Batches are random and lie on the device from the beginning: what is timed is the step, not the loader. Ours and theirs take the same
images, captions and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models import Model, create
from tests.bench.mfu.step import Loss


@dataclass(frozen=True)
class Subject:
    """`batch` fits on 139 GiB in any precision here; the sweep looks for more. `small` makes a tiny model of the same family, to try the
    code. `peers`: what each project calls the model."""

    model: str
    kind: str
    batch: int
    peers: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)

    def make(self, device: torch.device, small: bool, seed: int = 0) -> Model:
        return create(self.model, seed=seed, device=device, **{**self.options, **(self.small if small else {})})

    def loss(self, batch: int, options: Any, device: torch.device, seed: int = 0, how: str = "ours") -> Loss:
        """Of `batch` samples; `how` says whose model is given them."""
        generator = torch.Generator(device).manual_seed(seed)
        return LOSSES[self.kind](batch, options, generator, how)


_SMALL_VIT = {"pixels": 28, "patch": 7, "classes": 32, "width": 64, "depth": 2, "heads": 4, "mlp": 128}
_SMALL_CLIP = {
    "pixels": 28, "embed": 32, "vocabulary": 512, "context": 16,
    "vision": {"patch": 7, "width": 64, "depth": 2, "heads": 4, "mlp": 128},
    "text": {"width": 64, "depth": 2, "heads": 4},
}  # fmt: skip
_SMALL_IGPT = {"pixels": 8, "colors": 32, "width": 64, "depth": 2, "heads": 4}

SUBJECTS = {
    "vit_b16": Subject("vit_b16", "classes", 512, {"timm": "vit_base_patch16_224", "transformers": "vit"}, {}, _SMALL_VIT),
    "vit_l16": Subject("vit_l16", "classes", 256, {"timm": "vit_large_patch16_224", "transformers": "vit"}, {}, _SMALL_VIT),
    "vit_h14": Subject("vit_h14", "classes", 128, {"timm": "vit_huge_patch14_224", "transformers": "vit"}, {}, _SMALL_VIT),
    "clip_vit_b32": Subject("clip_vit_b32", "pairs", 1024, {"open_clip": "ViT-B-32", "transformers": "clip"}, {}, _SMALL_CLIP),
    "clip_vit_l14": Subject("clip_vit_l14", "pairs", 256, {"open_clip": "ViT-L-14", "transformers": "clip"}, {}, _SMALL_CLIP),
    "clip_vit_h14": Subject("clip_vit_h14", "pairs", 128, {"open_clip": "ViT-H-14", "transformers": "clip"}, {}, _SMALL_CLIP),
    "igpt_l": Subject("igpt_l", "pixels", 16, {"transformers": "imagegpt"}, {"pixels": 32}, _SMALL_IGPT),
    "igpt_xl": Subject("igpt_xl", "pixels", 1, {"transformers": "imagegpt"}, {"pixels": 64}, _SMALL_IGPT),
}


def _weights(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def classes(batch: int, options: Any, generator: torch.Generator, how: str) -> Loss:
    device = generator.device
    images = torch.randn(batch, 3, options.pixels, options.pixels, generator=generator, device=device)
    labels = torch.randint(0, options.classes, (batch,), generator=generator, device=device)
    read: Callable[[Any], torch.Tensor] = (lambda out: out.logits) if how == "transformers" else (lambda out: out)
    seen = _Typed(images)
    return lambda model: F.cross_entropy(read(model(seen(model))).float(), labels)


def pairs(batch: int, options: Any, generator: torch.Generator, how: str) -> Loss:
    """CLIP's symmetric cross-entropy over the batch's own pairs."""
    device = generator.device
    images = torch.randn(batch, 3, options.pixels, options.pixels, generator=generator, device=device)
    end = options.vocabulary - 1  # the mark after a caption's words, the largest token: all projects find it so
    texts = torch.randint(1, end - 1, (batch, options.context), generator=generator, device=device)
    texts[:, options.context // 4] = end
    own, seen = torch.arange(batch, device=device), _Typed(images)

    def loss(model: nn.Module) -> torch.Tensor:
        if how == "transformers":
            found = model(input_ids=texts, pixel_values=seen(model))
            logits = found.logits_per_image
        else:
            image, text, scale = model(seen(model), texts)
            logits = scale * image @ text.T
        return (F.cross_entropy(logits.float(), own) + F.cross_entropy(logits.T.float(), own)) / 2

    return loss


def pixels(batch: int, options: Any, generator: torch.Generator, how: str) -> Loss:
    """The next pixel's colour; OpenAI's model is given the start mark by ourselves, where ours has it inside."""
    n, colors = options.pixels**2, options.colors
    targets = torch.randint(0, colors, (batch, n), generator=generator, device=generator.device)
    shifted = torch.cat([torch.full_like(targets[:, :1], colors), targets[:, :-1]], dim=1)

    def loss(model: nn.Module) -> torch.Tensor:
        logits = model(shifted).logits if how == "transformers" else model(targets)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


class _Typed:
    """Images in the type of a model's weights, changed once."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __call__(self, model: nn.Module) -> torch.Tensor:
        if self.images.dtype != _weights(model):
            self.images = self.images.to(_weights(model))
        return self.images


LOSSES: dict[str, Callable[[int, Any, torch.Generator, str], Loss]] = {"classes": classes, "pairs": pairs, "pixels": pixels}
