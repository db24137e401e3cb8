"""The plain ResNet with BatchNorm (arXiv 1512.03385), strides on the 3x3 convolutions.

Shapes: B batch, P input pixels a side, C classes, c channels of a bottleneck (which puts out 4 c), D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.convnet import EXPANSION, ConvNet, ConvNetOptions, kept, plan_blocks
from pipeline.models.model import Fp32Buffers
from pipeline.models.options import Count


class ResNetOptions(ConvNetOptions):
    """`width` is that of the root, and of the first stage's bottlenecks. `zero_init_residual`: the last gain of each block begins at
    zero (arXiv 1706.02677, section 5.1)."""

    width: Count = 64
    zero_init_residual: bool = True


class BatchNorm(Fp32Buffers, nn.BatchNorm2d):
    """Keeps its running statistics in fp32 where the model is in 16 bits: there, a tenth of a small change is lost in rounding."""

    fp32 = ("running_mean", "running_var")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None and self.momentum is not None and self.num_batches_tracked is not None
        if self.weight.dtype == self.running_mean.dtype:
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        gain, bias = (p.to(self.running_mean.dtype) for p in (self.weight, self.bias))
        return F.batch_norm(x, self.running_mean, self.running_var, gain, bias, self.training, self.momentum, self.eps)


class Bottleneck(nn.Module):
    """relu(x + BN(conv 1x1) of relu(BN(conv 3x3)) of relu(BN(conv 1x1))), the stride on the 3x3 (arXiv 1512.03385, section 4.1;
    arXiv 1706.02677, section 5.1)."""

    def __init__(self, channels: int, c: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * c
        self.conv1 = nn.Conv2d(channels, c, 1, bias=False)
        self.bn1 = BatchNorm(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm(c)
        self.conv3 = nn.Conv2d(c, out, 1, bias=False)
        self.bn3 = BatchNorm(out)
        project = stride > 1 or channels != out
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), BatchNorm(out)) if project else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class ResNet(ConvNet):
    """ResNet-50 and its kin with BatchNorm, the baseline that CLIP begins from. Parameters are named as torchvision names them.

    In training each micro-batch is normalised by its own statistics: not the batch's, not the other ranks'. Their running means
    are buffers, which evaluation uses. A micro-batch must give each channel more than one number (torch raises ValueError).
    """

    options: ResNetOptions
    head_names = frozenset({"fc.weight", "fc.bias"})

    def __init__(self, options: ResNetOptions) -> None:
        super().__init__()
        self.options = o = options
        self.conv1 = nn.Conv2d(3, o.width, 7, 2, padding=3, bias=False)
        self.bn1 = BatchNorm(o.width)
        self.names = [f"layer{i + 1}" for i in range(len(o.depths))]
        for name, blocks in zip(self.names, plan_blocks(o.depths, o.width), strict=True):
            self.add_module(name, nn.Sequential(*(Bottleneck(*block) for block in blocks)))
        self.fc = nn.Linear(EXPANSION * o.width * 2 ** (len(o.depths) - 1), o.classes) if o.classes else nn.Identity()
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Convolutions as arXiv 1502.01852, section 2.2; the head as arXiv 1706.02677, section 5.1."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Bottleneck) and self.options.zero_init_residual:
            nn.init.zeros_(module.bn3.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to the mean of the last feature map (B, D); D is 2048 at a width of 64 and four stages."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, padding=1)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(features)

    def activations(self) -> float:
        return kept(self.options.depths, self.options.width, self.options.pixels)
