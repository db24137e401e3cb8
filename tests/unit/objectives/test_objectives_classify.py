from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.objectives import build_objective, check_objective
from pipeline.stream.mixing import Mix

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


def soft_target_loss(labels: list[int], lam: float, smoothing: float) -> torch.Tensor:
    """Cross-entropy against mixed, smoothed one-hot rows, as DeiT's code has it (timm's `mixup_target`), in fp64."""
    one_hot = F.one_hot(torch.tensor(labels), 3).double() * (1 - smoothing) + smoothing / 3
    return F.cross_entropy(LOGITS.double(), lam * one_hot + (1 - lam) * one_hot.flip(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [Mix(0.7), Mix(0.25, (0, 0, 1, 3)), Mix(1.0), Mix(0.0), Mix(0.5)])
def test_mixed_labels_are_soft_targets(mix: Mix, smoothing: float) -> None:
    labels = [0, 2, 0, 1]
    objective = build_objective("classify", {"smoothing": smoothing})
    loss, _ = objective.loss(Given(), torch.zeros(4, 3, 2, 2), torch.tensor(labels), mix)
    assert loss.item() == pytest.approx(soft_target_loss(labels, mix.lam, smoothing).item(), rel=1e-6)
    whole = {1.0: labels, 0.0: labels[::-1]}.get(mix.lam)
    assert whole is None or loss.item() == pytest.approx(by_hand(whole, smoothing), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_missing_label_leaves_its_share_out(smoothing: float) -> None:
    """Samples 0 and 3 are partners, 1 and 2 too. Sample 1 keeps 0.7 of its own label; its partner 2, unlabelled, the 0.3 of it."""
    labels, lam = [0, 2, -1, 1], 0.7
    terms = [(0, 0, lam), (0, 1, 1 - lam), (1, 2, lam), (2, 2, 1 - lam), (3, 1, lam), (3, 0, 1 - lam)]
    log_p = F.log_softmax(LOGITS.double(), dim=1)
    expected = 0.0
    for row, label, weight in terms:
        expected -= weight * ((1 - smoothing) * log_p[row, label] + smoothing * log_p[row].mean()).item()
    objective = build_objective("classify", {"smoothing": smoothing})
    loss, _ = objective.loss(Given(), torch.zeros(4, 3, 2, 2), torch.tensor(labels), Mix(lam))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)  # three labels, each of weight 1 in all


def test_a_mixed_batch_without_labels_teaches_nothing() -> None:
    model = Given()
    loss, metrics = build_objective("classify", {}).loss(model, torch.zeros(4, 3, 2, 2), torch.full((4,), -1), Mix(0.4))
    loss.backward()
    assert loss.item() == 0 and metrics["top1"].item() == 0 and not model.logits.grad.any()


@pytest.mark.parametrize(("lam", "top1"), [(0.9, 2 / 3), (0.5, 2 / 3), (0.4, 1 / 3)])
def test_top1_is_of_the_larger_share(lam: float, top1: float) -> None:
    """The model answers 0, 2, 1, 1: right for two of the labels as they stand, for one of them in reversed order (0, 1, -1, 0)."""
    assert LOGITS.argmax(dim=1).tolist() == [0, 2, 1, 1]
    _, metrics = build_objective("classify", {}).loss(Given(), torch.zeros(4, 3, 2, 2), torch.tensor([0, -1, 1, 0]), Mix(lam))
    assert metrics["top1"].item() == pytest.approx(top1)


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
