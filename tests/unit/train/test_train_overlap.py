"""Gradients that are summed while the backward pass goes on; with a group of this process alone, so that each sum is what it was. That the
sums of several ranks are right is in the tests of the same mathematics and of ranks alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.train import overlap
from pipeline.train.overlap import OverlappedSum


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of each tensor that was given to an all-reduce, as they go out."""
    sizes: list[int] = []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, **how: bool) -> object:
        sizes.append(tensor.numel())
        return real(tensor, **how)

    monkeypatch.setattr(dist, "all_reduce", counting)
    monkeypatch.setattr(overlap, "SUM_BUCKET", 20)
    return sizes


class Tied(nn.Module):
    """Four layers of 4 x 4, of which the second and third are one; and a parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Parameter(torch.ones(3))
        self.first, self.middle, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.middle(self.first(x)).relu())) * self.frozen


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    return model(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).square().mean()


@pytest.mark.parametrize("is_early", [True, False])
def test_gradients_are_those_of_all_micro_batches(sent: list[int], is_early: bool) -> None:
    ours, plain = Tied(), Tied()
    total = OverlappedSum(ours.parameters(), is_early)
    for step in range(3):
        for turn in range(2):
            if turn == 1:
                total.begin()
            loss(ours, 2 * step + turn).backward()
            loss(plain, 2 * step + turn).backward()
            assert turn or not sent, "the first micro-batch is not the last"
        total.finish()
        for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if name == "unused":
                assert one.grad is not None and torch.equal(one.grad, torch.zeros(3))
            elif name != "frozen":
                assert other.grad is not None and torch.equal(one.grad, other.grad), (step, name)
        assert ours.frozen.grad is None and sent == [16, 16, 19], "the last parameters first, none of the frozen"
        for model in (ours, plain):
            model.zero_grad()
        sent.clear()


def test_what_is_full_goes_out_before_the_backward_pass_is_over(sent: list[int]) -> None:
    model = Tied()
    total = OverlappedSum(model.parameters())
    seen: list[int] = []
    model.first.weight.register_hook(lambda gradient: seen.append(len(sent)))
    total.begin()
    loss(model, 0).backward()
    assert seen == [2] and len(sent) == 2, "the third waits for what the loss never sees"
    total.finish()
    assert len(sent) == 3


def test_a_gradient_that_comes_after_its_bucket_has_gone_is_no_sum(sent: list[int]) -> None:
    model = Tied()
    total = OverlappedSum(model.parameters())
    total.begin()
    loss(model, 0).backward()
    with pytest.raises(AssertionError, match="after its bucket had been sent"):
        loss(model, 1).backward()
    total.finish()
