"""Losses over all pairs, tile by tile: against autograd through all logits at once, and what memory they take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pipeline.core.world import World
from pipeline.objectives.pairs import Pairs, sigmoid_pairs, softmax_pairs

ALONE = World()


def pairs(count: int = 13, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    images, captions = F.normalize(both, dim=-1).unbind()
    return images.clone().requires_grad_(), captions.clone().requires_grad_()


@pytest.mark.parametrize("tile", [1, 4, 13, 4096])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_loss_and_gradients_are_autograds(name: str, tile: int) -> None:
    images, captions = pairs()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -2.0))
    own = torch.arange(13)
    if name == "softmax":
        logits = scale * images @ captions.T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        found = softmax_pairs(Pairs(images.detach(), captions.detach()), scale.detach(), [13], ALONE, tile)
        by_bias = torch.zeros(())
    else:
        logits = scale * images @ captions.T + bias
        loss = -F.logsigmoid((2 * torch.eye(13) - 1) * logits).sum() / 13
        found = sigmoid_pairs(Pairs(images.detach(), captions.detach()), scale.detach(), bias.detach(), [13], ALONE, tile)
        by_bias = torch.autograd.grad(loss, bias, retain_graph=True)[0]
    expected = torch.autograd.grad(loss, [images, captions, scale])
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip((found.images, found.captions, found.scale, found.bias), (*expected, by_bias), strict=True):
        assert torch.allclose(ours, theirs.to(ours.dtype), atol=1e-12)
    assert found.hits == (logits.argmax(dim=1) == own).sum()


MEASURE = """
import sys, torch
from pipeline.core.world import World
from pipeline.objectives import pairs
from pipeline.train.device import host_peak
torch.set_num_threads(2)

class Share(World):
    # One rank of many, alone: what the others would send is its own, over and over.
    def concatenate(self, rows, sizes):
        return rows.repeat(len(sizes), *[1] * (rows.ndim - 1))[: sum(sizes)]

n, ranks, width = 128, int(sys.argv[1]) // 128, 64
own = pairs.Pairs(*torch.nn.functional.normalize(torch.randn(2, n, width), dim=-1).unbind())
pairs.softmax_pairs(own, torch.tensor(10.0), [n] * 2, Share(0, 2))  # what torch loads for it
before = host_peak()
found = pairs.softmax_pairs(own, torch.tensor(10.0), [n] * ranks, Share(0, ranks))
assert torch.isfinite(found.images).all()
print(host_peak() - before)
"""


@pytest.mark.parametrize("total", [32_768, 131_072])
def test_memory_grows_with_the_features_alone(total: int) -> None:
    """N x N logits in fp32 would be 4 GiB and 64 GiB."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(total)], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    features, tiles = 2 * total * 64 * 4, 6 * 128 * 4096 * 4
    assert 0 < int(done.stdout) < 2 * features + tiles, "bytes"
