"""CLIP's ResNet (Radford et al. 2021, arXiv 2103.00020, section 2.4): ResNet-D's stem, anti-aliased strides, attention pooling.

Shapes: B batch, P input pixels a side, S = P / 32 places a side of the last map, w width, C = 32 w channels of it, E embedding.
Parameter names are OpenAI's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pipeline.models.options import Count, Options
from pipeline.models.resnet import BatchNorm

STRIDE, EXPANSION = 32, 4


class CLIPResNetOptions(Options):
    """`depths` are the residual blocks of the four stages; `width` channels leave the stem."""

    kind: Literal["resnet"]
    depths: Annotated[tuple[Count, ...], Field(min_length=4, max_length=4)]
    width: Annotated[int, Field(gt=0, multiple_of=2)]

    @property
    def channels(self) -> int:
        """Of the last map."""
        return STRIDE * self.width

    @property
    def heads(self) -> int:
        """Of the attention pool, 64 channels each."""
        return max(1, self.channels // 64)


class Bottleneck(nn.Module):
    """(B, K, h, h) -> (B, 4 planes, h / stride, h / stride). Every convolution has stride 1: an average pool before the last one, and
    before the one of the shortcut, strides without aliasing (Zhang 2019, arXiv 1904.11486; He et al. 2019, arXiv 1812.01187, model D)."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * planes
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = BatchNorm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = BatchNorm(out)
        nn.init.zeros_(self.bn3.weight)  # each block begins as its shortcut (arXiv 1706.02677, section 5.1)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), BatchNorm(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(self.pool(x))), inplace=True)


class AttentionPool2d(nn.Module):
    """One query, the mean of all places, looks at itself and at them: (B, C, S, S) -> (B, E)."""

    def __init__(self, side: int, channels: int, heads: int, embed: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(side * side + 1, channels))
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, embed)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class CLIPResNet(nn.Module):
    """Images (B, 3, P, P) to embeddings (B, E), or with `embed` 0, without the attention pool, to the last map's places (B, S S, C)."""

    def __init__(self, options: CLIPResNetOptions, *, pixels: int, embed: int) -> None:
        super().__init__()
        self.options, self.pixels = options, pixels
        w = options.width
        self.conv1 = nn.Conv2d(3, w // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(w // 2)
        self.conv2 = nn.Conv2d(w // 2, w // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(w // 2)
        self.conv3 = nn.Conv2d(w // 2, w, 3, padding=1, bias=False)
        self.bn3 = BatchNorm(w)
        self.layer1 = _stage(w, w, options.depths[0], stride=1)
        self.layer2 = _stage(w * 4, w * 2, options.depths[1], stride=2)
        self.layer3 = _stage(w * 8, w * 4, options.depths[2], stride=2)
        self.layer4 = _stage(w * 16, w * 8, options.depths[3], stride=2)
        self.attnpool = AttentionPool2d(pixels // STRIDE, options.channels, options.heads, embed) if embed else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x)), inplace=True), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).transpose(1, 2) if self.attnpool is None else self.attnpool(x)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What a linear probe sees: what the attention pool gives, (B, E), or without one the mean of all places, (B, C).

        The paper takes features before the projection from its ViTs alone (section 3.2): here the projection is the pool's own.
        """
        x = self(images)
        return x.mean(dim=1) if self.attnpool is None else x

    def activations(self) -> float:
        """What the convolutions and norms of one image take in, about: twice each convolution's result."""
        w, side = self.options.width, self.pixels // 2
        total = 2.0 * (w // 2 + w // 2 + w) * side**2
        side //= 2
        for stage, depth in enumerate(self.options.depths):
            planes = w << stage
            inner = 2.0 * (planes + planes) + 2.0 * EXPANSION * planes
            total += depth * inner * side**2 + 2.0 * EXPANSION * planes * side**2
            side //= 2
        return total


def _stage(channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, planes, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * planes, planes, 1) for _ in range(depth - 1)))
