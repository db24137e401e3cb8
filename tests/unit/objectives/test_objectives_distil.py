from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.objectives import Inputs, Teacher, build_objective, check_objective
from pipeline.stream.batches import MicroBatch
from pipeline.stream.mixing import Mix
from tests.unit.objectives.small import CLASSES, MEAN, STD, a_batch, a_teacher, as_input, gradients, log_softmax, set_up

TEACHER = (0.1, 0.2, 0.3), (0.5, 0.4, 0.6)


def lesson(kind: str, logits: torch.Tensor, teacher: torch.Tensor, tau: float) -> float:
    """Of one image, in fp64: tau^2 KL(teacher || student) at tau, or the cross-entropy with what the teacher says."""
    if kind == "hard":
        return -log_softmax(logits)[int(teacher.argmax())].item()
    said, meant = log_softmax(logits / tau), log_softmax(teacher / tau)
    return tau**2 * sum((m.exp() * (m - s)).item() for s, m in zip(said, meant, strict=True))


def of_labels(logits: torch.Tensor, labels: list[int], mix: Mix | None, smoothing: float) -> float:
    """Cross-entropy with smoothed and mixed labels, the mean over images."""
    total = 0.0
    for b, row in enumerate(logits):
        log_p = log_softmax(row)
        for label, share in ((labels[b], mix.lam if mix else 1.0), (labels[len(labels) - 1 - b], 1 - mix.lam if mix else 0.0)):
            total -= share * ((1 - smoothing) * log_p[label] + smoothing * log_p.mean()).item()
    return total / len(logits)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("mix", [None, Mix(0.7)])
@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ({}, 0.5),
        ({"kind": "soft"}, 0.1),
        ({"kind": "soft", "alpha": 0.3, "tau": 1.5, "smoothing": 0.1}, 0.3),
        ({"alpha": 0.8, "smoothing": 0.1}, 0.8),
    ],
)
def test_equations_2_and_3(arguments: dict[str, Any], share: float, mix: Mix | None, distilled: bool) -> None:
    """(1 - share) L_CE of the class head + share of the teacher's on the distillation head, or on the only one there is."""
    model, objective = set_up("distil", arguments, distilled=distilled)
    labels = [0, 3, 1, 4]
    batch = a_batch(labels, mix=mix)
    heads = model(as_input(batch), heads=True) if distilled else (model(as_input(batch)),) * 2
    taught = a_teacher().model(as_input(batch, *TEACHER))
    kind, tau = arguments.get("kind", "hard"), arguments.get("tau", 3.0)
    lessons = [lesson(kind, row, told, tau) for row, told in zip(heads[1].detach(), taught, strict=True)]
    own = of_labels(heads[0], labels, mix, arguments.get("smoothing", 0.0))
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx((1 - share) * own + share * sum(lessons) / 4, rel=1e-5)
    assert metrics["lesson"].item() == pytest.approx(sum(lessons) / 4, rel=1e-5)
    assert metrics["agree"].item() == (heads[1].argmax(dim=1) == taught.argmax(dim=1)).double().mean().item()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_teacher_learns_nothing(kind: str) -> None:
    model, objective = set_up("distil", {"kind": kind})
    teacher = objective.inputs.teacher
    assert teacher is not None
    teacher.model.requires_grad_(True)
    objective.loss(model, a_batch())[0].backward()
    assert all(gradients(model).values()), "both tokens and both heads"
    assert all(p.grad is None for p in teacher.model.parameters())


def test_unlabelled_samples_are_left_out() -> None:
    model, objective = set_up("distil")
    batch, same = a_batch((0, -1, 2, -1)), a_batch((0, 4, 2, 3))
    [own, second], taught = model(as_input(batch), heads=True), a_teacher().model(as_input(batch, *TEACHER))
    rows = [0, 2]
    expected = 0.5 * of_labels(own[rows], [0, 2], None, 0) + 0.25 * sum(lesson("hard", second[b], taught[b], 1) for b in rows)
    assert objective.loss(model, batch)[0].item() == pytest.approx(expected, rel=1e-5)
    assert (objective.count(batch).item(), objective.count(same).item()) == (2, 4)
    assert objective.loss(model, a_batch((-1, -1)))[0].item() == 0


@pytest.mark.parametrize(("arguments", "share"), [({}, 1.0), ({"alpha": 0.2}, 1.0), ({"kind": "soft"}, 0.9)])
def test_the_first_loss(arguments: dict[str, Any], share: float) -> None:
    """Both heads begin at zero: ln C of labels, ln C of the teacher's. A teacher that knows nothing has no soft lesson."""
    model, objective = set_up("distil", arguments, fresh=True)
    teacher = a_teacher()
    torch.nn.init.zeros_(teacher.model.head.weight)  # type: ignore[union-attr,arg-type]
    torch.nn.init.zeros_(teacher.model.head.bias)  # type: ignore[union-attr,arg-type]
    objective = build_objective("distil", {"teacher": "t", **arguments}, Inputs(MEAN, STD, torch.float64, None, teacher))
    assert objective.loss(model, a_batch())[0].item() == pytest.approx(share * math.log(CLASSES), rel=1e-6)


def test_a_student_that_agrees_has_learnt_its_soft_lesson() -> None:
    model, _ = set_up("distil", distilled=False)
    itself = Inputs(MEAN, STD, torch.float64, None, Teacher(model, MEAN, STD))
    objective = build_objective("distil", {"teacher": "t", "kind": "soft", "alpha": 1.0}, itself)
    loss, metrics = objective.loss(model, a_batch())
    assert loss.item() == pytest.approx(0, abs=1e-6) and metrics["agree"].item() == 1


def test_the_teacher_sees_the_mixed_images() -> None:
    seen: list[MicroBatch | torch.Tensor] = []
    model, objective = set_up("distil")
    teacher = objective.inputs.teacher
    assert teacher is not None
    teacher.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batch = a_batch(mix=Mix(0.6))
    objective.loss(model, batch)
    torch.testing.assert_close(seen[0], as_input(batch, *TEACHER), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrain.objective.teacher: is missing"),
        ({"teacher": "t", "kind": "firm"}, "pretrain.objective.kind: 'firm' should be 'hard' or 'soft'"),
        ({"teacher": "t", "tau": 0}, "pretrain.objective.tau: 0 should be greater than 0"),
        ({"teacher": "t", "alpha": True}, "pretrain.objective.alpha: True should be a number"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective("distil", arguments)
