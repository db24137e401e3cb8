from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.models import create
from pipeline.objectives import Inputs, build_objective, check_objective
from pipeline.stream.batches import MicroBatch, collate
from pipeline.stream.mixing import Mix

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [1.0, 2.0, 0.0], [0.0, 9.0, 0.0]])


class Given(nn.Module):
    """A model that answers `LOGITS`, whatever it sees."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = nn.Parameter(LOGITS.to(dtype))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def batch(labels: list[int], mix: Mix | None = None) -> MicroBatch:
    return replace(collate(0, [], torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8)), labels=torch.tensor(labels), mix=mix)


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
    objective = build_objective("classify", {"smoothing": smoothing} if smoothing else {}, Inputs())
    loss, metrics = objective.loss(Given(), batch(labels))
    assert loss.item() == pytest.approx(by_hand(labels, smoothing), rel=1e-6)
    assert set(metrics) == {"top1"} and metrics["top1"].item() == pytest.approx(top1)


def test_a_batch_without_labels_teaches_nothing() -> None:
    model = Given()
    loss, metrics = build_objective("classify", {}, Inputs()).loss(model, batch([-1] * 4))
    loss.backward()
    assert loss.item() == 0 and metrics["top1"].item() == 0 and not model.logits.grad.any()


def test_gradient_leaves_unlabelled_samples_out() -> None:
    model = Given()
    build_objective("classify", {}, Inputs()).loss(model, batch([0, -1, 2, 1]))[0].backward()
    assert [bool(g.any()) for g in model.logits.grad] == [True, False, True, True]


def test_the_loss_is_in_fp32() -> None:
    loss, _ = build_objective("classify", {}, Inputs()).loss(Given(torch.bfloat16), batch([0, 2, 0, 1]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(by_hand([0, 2, 0, 1], 0), rel=1e-6)


def soft_target_loss(labels: list[int], lam: float, smoothing: float) -> torch.Tensor:
    """Cross-entropy against mixed, smoothed one-hot rows, as DeiT's code has it (timm's `mixup_target`), in fp64."""
    one_hot = F.one_hot(torch.tensor(labels), 3).double() * (1 - smoothing) + smoothing / 3
    return F.cross_entropy(LOGITS.double(), lam * one_hot + (1 - lam) * one_hot.flip(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [Mix(0.7), Mix(0.25, (0, 0, 1, 3)), Mix(1.0), Mix(0.0), Mix(0.5)])
def test_mixed_labels_are_soft_targets(mix: Mix, smoothing: float) -> None:
    labels = [0, 2, 0, 1]
    objective = build_objective("classify", {"smoothing": smoothing}, Inputs())
    loss, _ = objective.loss(Given(), batch(labels, mix))
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
    objective = build_objective("classify", {"smoothing": smoothing}, Inputs())
    loss, _ = objective.loss(Given(), batch(labels, Mix(lam)))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)  # three labels, each of weight 1 in all


def test_a_mixed_batch_without_labels_teaches_nothing() -> None:
    model = Given()
    loss, metrics = build_objective("classify", {}, Inputs()).loss(model, batch([-1] * 4, Mix(0.4)))
    loss.backward()
    assert loss.item() == 0 and metrics["top1"].item() == 0 and not model.logits.grad.any()


@pytest.mark.parametrize(("lam", "top1"), [(0.9, 2 / 3), (0.5, 2 / 3), (0.4, 1 / 3)])
def test_top1_is_of_the_larger_share(lam: float, top1: float) -> None:
    """The model answers 0, 2, 1, 1: right for two of the labels as they stand, for one of them in reversed order (0, 1, -1, 0)."""
    assert LOGITS.argmax(dim=1).tolist() == [0, 2, 1, 1]
    _, metrics = build_objective("classify", {}, Inputs()).loss(Given(), batch([0, -1, 1, 0], Mix(lam)))
    assert metrics["top1"].item() == pytest.approx(top1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [None, Mix(0.7)])
def test_sigmoids_are_summed_over_classes(mix: Mix | None, smoothing: float) -> None:
    """Binary cross-entropy of each class against the mixed, smoothed one-hot row; the mean over images alone."""
    labels, classes = [0, 2, 0, 1], LOGITS.shape[1]
    targets = F.one_hot(torch.tensor(labels), classes).double() * (1 - smoothing) + smoothing / classes
    if mix is not None:
        targets = mix.lam * targets + (1 - mix.lam) * targets.flip(0)
    expected = F.binary_cross_entropy_with_logits(LOGITS.double(), targets, reduction="none").sum(dim=1).mean()
    objective = build_objective("classify", {"loss": "sigmoid", "smoothing": smoothing}, Inputs())
    assert objective.loss(Given(), batch(labels, mix))[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_sigmoids_leave_unlabelled_samples_out() -> None:
    model, objective = Given(), build_objective("classify", {"loss": "sigmoid"}, Inputs())
    some = batch([0, -1, 0, -1])
    loss, _ = objective.loss(model, some)
    expected = sum(math.log1p(math.exp(x if i else -x)) for row in (LOGITS[0], LOGITS[2]) for i, x in enumerate(row.tolist())) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6) and objective.count(some).item() == 2
    loss.backward()
    assert [bool(g.any()) for g in model.logits.grad] == [True, False, True, False]
    assert objective.loss(model, batch([-1] * 4))[0].item() == 0


@pytest.mark.parametrize(("name", "options"), [("vit", {"width": 16, "depth": 1, "heads": 2, "patch": 4}), ("bit", {"depths": [1]})])
@pytest.mark.parametrize(("loss", "expected"), [("softmax", math.log(5)), ("sigmoid", 5 * math.log(2))])
def test_the_first_loss_of_a_fresh_model(name: str, options: dict[str, Any], loss: str, expected: float) -> None:
    """Its head is zero, so each class is as likely as another, or as its absence."""
    model = create(name, seed=0, pixels=8, classes=5, **options)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    objective = build_objective("classify", {"loss": loss, "smoothing": 0.1}, Inputs())
    assert objective.loss(model, replace(batch([0, 4, 2, 1]), images=images))[0].item() == pytest.approx(expected, rel=1e-6)


def test_what_the_model_sees() -> None:
    """Normalised and mixed as the batch says, in the type that the inputs are of."""
    model = create("vit", seed=0, width=16, depth=1, heads=2, patch=4, pixels=8, classes=5).double()
    torch.nn.init.normal_(model.head.weight)  # type: ignore[union-attr,arg-type]
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mix = Mix(0.75, (0, 2, 4, 6))
    objective = build_objective("classify", {}, Inputs((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), torch.float64))
    loss, _ = objective.loss(model, replace(batch([0, 4, 2, 1], mix), images=images))
    x = (images.double() / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.25])
    cut = x.clone()
    cut[:, 0:4, 2:8] = x.flip(0)[:, 0:4, 2:8]
    log_p = F.log_softmax(model(cut.permute(0, 3, 1, 2)), dim=1)
    expected = -sum(0.75 * log_p[b, a].item() + 0.25 * log_p[b, c].item() for b, (a, c) in enumerate([(0, 1), (4, 2), (2, 4), (1, 0)])) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clasify", {}, r"pretrain.objective.name: 'clasify' is not known, did you mean 'classify'\? \(allowed: .*classify"),
        (
            "classify",
            {"smothing": 0.1},
            r"pretrain.objective.smothing: no such key, did you mean 'smoothing'\? \(allowed: name, loss, smoothing\)",
        ),
        ("classify", {"loss": "softmx"}, r"pretrain.objective.loss: 'softmx' should be 'softmax' or 'sigmoid'"),
        ("classify", {"smoothing": 1}, r"pretrain.objective.smoothing: 1 should be less than 1"),
        ("classify", {"smoothing": "much"}, r"'much' should be a number"),
        ("classify", {"smoothing": True}, r"True should be a number"),
        ("classify", {"smoothing": -0.1}, r"-0.1 should be greater than or equal to 0"),
        ("classify", {"smoothing": math.nan}, r"nan should be a finite number"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(name, arguments)
