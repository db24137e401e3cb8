from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.objectives import build_objective, check_objective

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [1.0, 2.0, 0.0], [0.0, 9.0, 0.0]])


class Given(nn.Module):
    """A model that answers `LOGITS`, whatever it sees."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = nn.Parameter(LOGITS.to(dtype))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def by_hand(labels: list[int], smoothing: float) -> float:
    losses = []
    for row, label in zip(LOGITS.tolist(), labels, strict=True):
        if label < 0:
            continue
        log_sum = math.log(sum(math.exp(x) for x in row))
        target = [smoothing / 3 + (1 - smoothing) * (i == label) for i in range(3)]
        losses.append(-sum(t * (x - log_sum) for t, x in zip(target, row, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("labels", "top1"), [([0, 2, 0, 1], 3 / 4), ([0, 2, -1, 2], 2 / 3)])
def test_loss(labels: list[int], top1: float, smoothing: float) -> None:
    objective = build_objective("classify", {"smoothing": smoothing} if smoothing else {})
    loss, metrics = objective.loss(Given(), torch.zeros(4, 3, 2, 2), torch.tensor(labels))
    assert loss.item() == pytest.approx(by_hand(labels, smoothing), rel=1e-6)
    assert set(metrics) == {"top1"} and metrics["top1"].item() == pytest.approx(top1)


def test_a_batch_without_labels_teaches_nothing() -> None:
    model = Given()
    loss, metrics = build_objective("classify", {}).loss(model, torch.zeros(4, 3, 2, 2), torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0 and metrics["top1"].item() == 0 and not model.logits.grad.any()


def test_gradient_leaves_unlabelled_samples_out() -> None:
    model = Given()
    build_objective("classify", {}).loss(model, torch.zeros(4, 3, 2, 2), torch.tensor([0, -1, 2, 1]))[0].backward()
    assert [bool(g.any()) for g in model.logits.grad] == [True, False, True, True]


def test_the_loss_is_in_fp32() -> None:
    loss, _ = build_objective("classify", {}).loss(Given(torch.bfloat16), torch.zeros(4, 3, 2, 2), torch.tensor([0, 2, 0, 1]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(by_hand([0, 2, 0, 1], 0), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clasify", {}, r"pretrain.objective.name: 'clasify' is not known, did you mean 'classify'\? \(allowed: classify\)"),
        (
            "classify",
            {"smothing": 0.1},
            r"pretrain.objective.smothing: no such key, did you mean 'smoothing'\? \(allowed: name, smoothing\)",
        ),
        ("classify", {"smoothing": 1}, r"pretrain.objective.smoothing: 1 should be a number from 0 up to 1"),
        ("classify", {"smoothing": "much"}, r"'much' should be a number"),
        ("classify", {"smoothing": True}, r"True should be a number"),
        ("classify", {"smoothing": -0.1}, r"-0.1 should be a number"),
        ("classify", {"smoothing": math.nan}, r"nan should be a number"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(name, arguments)
