"""What the ResNets share: stages of bottlenecks, their options, a linear head.

Shapes: B batch, P input pixels a side, C classes, c channels of a bottleneck (which puts out 4 c), D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from pipeline.models.model import Model
from pipeline.models.options import Count, Options

EXPANSION = 4  # a bottleneck puts out four times the channels it works with

Depths = Annotated[tuple[Count, ...], Field(min_length=1)]


def plan_blocks(depths: tuple[int, ...], width: int) -> list[list[tuple[int, int, int]]]:
    """(channels in, c, stride) of each bottleneck of each stage; the first stage keeps the resolution, each other halves it."""
    channels, stages = width, []
    for i, depth in enumerate(depths):
        c = width * 2**i
        stages.append([(channels if n == 0 else EXPANSION * c, c, 2 if i and n == 0 else 1) for n in range(depth)])
        channels = EXPANSION * c
    return stages


def kept(depths: tuple[int, ...], width: int, pixels: int, *, preactivated: bool = False) -> float:
    """Numbers that a training step keeps of one sample, from the shapes: the image, what each convolution puts out (its norm needs it)
    and its ReLU (the next convolution needs it), and where the largest of each pooling window was.

    With activations in front of the convolutions (`preactivated`) a shortcut's convolution has no norm, and the root's norm comes
    after pooling. Copies that lopsided padding makes are left out.
    """
    side = -(-pixels // 2)
    total = 3 * pixels**2 + width * side**2 * (1 if preactivated else 2)
    side = -(-side // 2)
    total += width * side**2 * (3 if preactivated else 2)
    for channels, c, stride in itertools.chain(*plan_blocks(depths, width)):
        total += 2 * c * side**2
        side = -(-side // stride)
        total += 2 * (c + EXPANSION * c) * side**2
        if not preactivated and (stride > 1 or channels != EXPANSION * c):
            total += EXPANSION * c * side**2
    return float(total)


class ConvNetOptions(Options):
    """`depths` are the bottlenecks of each stage; `classes` 0 leaves the head out. Any number of pixels will do."""

    pixels: Count = 224
    classes: int = Field(1000, ge=0)
    depths: Depths


class ConvNet(Model):
    """What ResNets share."""

    options: ConvNetOptions

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to logits (B, C)."""
        return self.classify(self.features(images))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) to (B, C)."""
        raise NotImplementedError

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        p, weight = self.options.pixels, next(self.parameters())
        return (torch.zeros(batch, 3, p, p, device=weight.device, dtype=weight.dtype),)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Other pixels need nothing."""
        fitted, wanted = dict(state), self.state_dict()
        for name in self.head_names:
            if name not in wanted:
                fitted.pop(name, None)
            elif name not in fitted or fitted[name].shape != wanted[name].shape:
                fitted[name] = torch.zeros_like(wanted[name])
        return fitted
