"""Big Transfer's ResNet-v2 (arXiv 1912.11370): pre-activated bottlenecks, GroupNorm and weight standardisation for BatchNorm.

Shapes: B batch, P input pixels a side, C classes, c channels of a bottleneck (which puts out 4 c), D features.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.convnet import EXPANSION, ConvNet, ConvNetOptions, kept, plan_blocks
from pipeline.models.hybrid import GROUPS, Authors, Numerics, Stage, StdConv
from pipeline.models.options import Count

NUMERICS: dict[str, Numerics] = {"google": Numerics(1e-10, True, 1e-5), "timm": Numerics(1e-8, True, 1e-5)}


class BiTOptions(ConvNetOptions):
    """`factor` widens every layer, as in R50x3. `numerics`: whose small constants are added to variances, Google's or timm's."""

    factor: Count = 1
    numerics: Authors = "google"


class Projection(nn.Module):
    """Where a block changes the shape, its shortcut is a 1x1 convolution."""

    def __init__(self, channels: int, out: int, stride: int, numerics: Numerics) -> None:
        super().__init__()
        self.conv = StdConv(channels, out, 1, stride, numerics, same=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class PreActivatedBottleneck(nn.Module):
    """x + conv 1x1 of conv 3x3 of conv 1x1, each of relu(GN(.)) (arXiv 1603.05027, figure 4e), the stride on the 3x3. A projection
    sees the activated input too."""

    def __init__(self, channels: int, c: int, stride: int, numerics: Numerics) -> None:
        super().__init__()
        out = EXPANSION * c
        self.downsample = Projection(channels, out, stride, numerics) if stride > 1 or channels != out else None
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=numerics.norm)
        self.conv1 = StdConv(channels, c, 1, 1, numerics, same=False)
        self.norm2 = nn.GroupNorm(GROUPS, c, eps=numerics.norm)
        self.conv2 = StdConv(c, c, 3, stride, numerics, same=False)
        self.norm3 = nn.GroupNorm(GROUPS, c, eps=numerics.norm)
        self.conv3 = StdConv(c, out, 1, 1, numerics, same=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.norm2(y), inplace=True))
        return shortcut + self.conv3(F.relu(self.norm3(y), inplace=True))


class BiT(ConvNet):
    """The network of section 2.1 of the paper, R50x1 to R152x4, with the zero head of its fine-tuning. Names are timm's.

    Padding is symmetric, and the root is pooled with zeros around it, as in the authors' PyTorch code, not TensorFlow's SAME.
    """

    options: BiTOptions
    head_names = frozenset({"head.fc.weight", "head.fc.bias"})

    def __init__(self, options: BiTOptions) -> None:
        super().__init__()
        self.options = o = options
        numerics, width = NUMERICS[o.numerics], 64 * o.factor
        features = EXPANSION * width * 2 ** (len(o.depths) - 1)
        self.stem = nn.Sequential(OrderedDict(conv=StdConv(3, width, 7, 2, numerics, same=False)))
        stages = plan_blocks(o.depths, width)
        self.stages = nn.Sequential(*(Stage([PreActivatedBottleneck(*block, numerics) for block in blocks]) for blocks in stages))
        self.norm = nn.GroupNorm(GROUPS, features, eps=numerics.norm)
        self.head = nn.Sequential(OrderedDict(fc=nn.Conv2d(features, o.classes, 1)) if o.classes else OrderedDict())
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to the mean of the last feature map (B, D); D is 2048 times `factor` with four stages."""
        x = F.max_pool2d(F.pad(self.stem(x), (1, 1, 1, 1)), 3, 2)
        return F.relu(self.norm(self.stages(x)), inplace=True).mean(dim=(2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features[:, :, None, None]).flatten(1)

    def activations(self) -> float:
        return kept(self.options.depths, 64 * self.options.factor, self.options.pixels, preactivated=True)
