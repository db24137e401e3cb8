"""The stem of the hybrid Vision Transformers (arXiv 2010.11929, section 3.1): a ResNet with GroupNorm and weight standardisation.

Shapes: B batch, P input pixels a side, c channels of a bottleneck (which puts out 4 c), N patches, D width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.convnet import EXPANSION, kept, plan_blocks

GROUPS = 32
Authors = Literal["google", "timm"]


class Numerics(NamedTuple):
    """The small constants: `conv` is added to the deviation of a filter's weights, or to their variance where `on_variance`;
    `norm` to the variance in GroupNorm. Authors of checkpoints differ in them."""

    conv: float
    on_variance: bool
    norm: float


HYBRID_NUMERICS: dict[str, Numerics] = {"google": Numerics(1e-5, False, 1e-6), "timm": Numerics(1e-8, True, 1e-5)}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `size` pixels, so that ceil(size / stride) come out; an odd one goes after, as in TensorFlow."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def lecun_normal_(weight: torch.Tensor) -> None:
    """Normal of variance 1 / fan-in, truncated at two standard deviations (Flax's default); .8796 is what is left of one."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class StdConv(nn.Conv2d):
    """A convolution whose filters have mean zero and variance one (weight standardisation, arXiv 1903.10520).

    `same` pads as TensorFlow's SAME, which is lopsided at a stride of 2; otherwise by half a kernel on each side.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, numerics: Numerics, *, same: bool) -> None:
        super().__init__(channels, out, kernel, stride, padding=0 if same else kernel // 2, bias=False)
        self.same, self.numerics = same, numerics
        lecun_normal_(self.weight)

    def standardised(self) -> torch.Tensor:
        """The filters that are used, in the weight's type; statistics in at least fp32."""
        if self.numerics.on_variance:
            return F.layer_norm(self.weight, self.weight.shape[1:], eps=self.numerics.conv)
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return ((weight - mean) / (std + self.numerics.conv)).to(self.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, padding = self.standardised(), self.padding
        if self.same:
            (top, bottom), (left, right) = (same_padding(size, self.kernel_size[0], self.stride[0]) for size in x.shape[2:])
            padding = top, left
            if (top, left) != (bottom, right):  # torch's convolutions cannot pad one side alone
                x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, weight, None, self.stride, padding)


class Shortcut(nn.Module):
    """Where a block changes the shape, its shortcut is a 1x1 convolution and a norm."""

    def __init__(self, channels: int, out: int, stride: int, numerics: Numerics) -> None:
        super().__init__()
        self.conv = StdConv(channels, out, 1, stride, numerics, same=True)
        self.norm = nn.GroupNorm(GROUPS, out, eps=numerics.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class StdBottleneck(nn.Module):
    """relu(x + GN(conv 1x1) of relu(GN(conv 3x3)) of relu(GN(conv 1x1))); the last gain begins at zero, so the branch is shut."""

    def __init__(self, channels: int, c: int, stride: int, numerics: Numerics) -> None:
        super().__init__()
        out = EXPANSION * c
        self.downsample = Shortcut(channels, out, stride, numerics) if stride > 1 or channels != out else nn.Identity()
        self.conv1 = StdConv(channels, c, 1, 1, numerics, same=True)
        self.norm1 = nn.GroupNorm(GROUPS, c, eps=numerics.norm)
        self.conv2 = StdConv(c, c, 3, stride, numerics, same=True)
        self.norm2 = nn.GroupNorm(GROUPS, c, eps=numerics.norm)
        self.conv3 = StdConv(c, out, 1, 1, numerics, same=True)
        self.norm3 = nn.GroupNorm(GROUPS, out, eps=numerics.norm)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(self.norm3(self.conv3(y)) + self.downsample(x), inplace=True)


class Stage(nn.Module):
    """Blocks of one resolution; named as timm names them."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class HybridStem(nn.Module):
    """The first stages of a ResNet with GroupNorm: (B, 3, P, P) -> (B, 256 * 2^(stages - 1), P / stride, P / stride)."""

    def __init__(self, depths: tuple[int, ...], numerics: Numerics) -> None:
        super().__init__()
        norm = nn.GroupNorm(GROUPS, 64, eps=numerics.norm)
        self.stem = nn.Sequential(OrderedDict(conv=StdConv(3, 64, 7, 2, numerics, same=True), norm=norm))
        self.stages = nn.Sequential(*(Stage([StdBottleneck(*block, numerics) for block in blocks]) for blocks in plan_blocks(depths, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x), inplace=True)
        before = [same_padding(size, 3, 2)[0] for size in x.shape[2:]]
        return self.stages(F.max_pool2d(x, 3, 2, padding=before, ceil_mode=True))  # windows that end outside are what SAME pads after


def stem_stride(stem: tuple[int, ...]) -> int:
    """Pixels between neighbours in what a stem of these depths puts out: 4 of the root, and 2 of each stage but the first."""
    return 4 * 2 ** (len(stem) - 1)


class HybridEmbed(nn.Module):
    """Patches from the feature map of a ResNet, (B, 3, P, P) -> (B, N, D) (arXiv 2010.11929, section 3.1, "Hybrid Architecture").

    `stem` is the depths of the stages, (3, 4, 9) of R50+ViT-B/16; `patch` is in pixels of the image, so that 16 are one feature of that
    stem. N = `side`(P)^2. Names are timm's; `numerics` says whose constants are used, those of Google's JAX code or timm's.

    Raises:
        ValueError: `patch` is not a multiple of the stem's stride.
    """

    def __init__(self, stem: tuple[int, ...], patch: int, width: int, numerics: Authors = "google") -> None:
        super().__init__()
        self.stride = stem_stride(stem)
        if patch % self.stride:
            raise ValueError(f"patch: {patch} is not a multiple of {self.stride}, the stride of a stem of {len(stem)} stages")
        self.depths, self.kernel = stem, patch // self.stride
        self.backbone = HybridStem(stem, HYBRID_NUMERICS[numerics])
        self.proj = nn.Conv2d(EXPANSION * 64 * 2 ** (len(stem) - 1), width, self.kernel, stride=self.kernel)
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.backbone(x)).flatten(2).transpose(1, 2)

    def side(self, pixels: int) -> int:
        """Patches along a side of `pixels`: the stem rounds up, the embedding down."""
        return -(-pixels // self.stride) // self.kernel

    def activations(self, pixels: int) -> float:
        """Numbers kept of one sample (`kept`)."""
        return kept(self.depths, 64, pixels)
