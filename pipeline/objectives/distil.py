"""Distillation (DeiT, arXiv 2012.12877, section 3): from any classifier of ours, by its label (hard) or its logits (soft).

Shapes: b micro-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pipeline.objectives.classify import CLASSIFIERS, ClassifyOptions, classification_loss
from pipeline.objectives.objective import Facts, Metrics, Objective, unwrapped
from pipeline.stream.batches import MicroBatch
from pipeline.stream.decode import normalize
from pipeline.stream.mixing import mixed


class DistilOptions(ClassifyOptions):
    """`teacher`: URL of a run or of a published model. `alpha`: what the teacher counts, by default half where it gives labels
    (equation 3), and 0.1 where it gives logits, at the temperature `tau` (equation 2, section 5.3)."""

    teacher: str
    kind: Literal["hard", "soft"] = "hard"
    alpha: float | None = Field(None, ge=0, le=1)
    tau: float = Field(3.0, gt=0)

    @property
    def share(self) -> float:
        return self.alpha if self.alpha is not None else 0.5 if self.kind == "hard" else 0.1


class Distil(Objective):
    """A student with a distillation token shows its second head to the teacher; another has one for both.

    The teacher sees the same mixed images, normalised its own way. The soft loss is tau^2 KL(teacher || student), a mean over
    images, as equation 2 has it; DeiT's code divides it by the number of classes as well.
    """

    families = CLASSIFIERS
    needs = frozenset({"labels", "teacher"})
    metrics = frozenset({"agree", "lesson", "top1"})
    mixes = True
    arguments = DistilOptions
    options: DistilOptions

    @staticmethod
    def model_options(options: DistilOptions, facts: Facts) -> Mapping[str, Any]:
        return {"classes": facts.classes}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """Means over labelled samples; `agree`: how often student and teacher say the same."""
        own, second = _logits(model, self.inputs.images(batch))
        teacher = self._teach(batch)
        loss, metrics = classification_loss(own, batch.labels, batch.mix, self.options)
        known = (batch.labels >= 0).float()
        if self.options.kind == "hard":
            lesson = F.cross_entropy(second, teacher.argmax(dim=1), reduction="none")
        else:
            tau = self.options.tau
            inner = F.kl_div(F.log_softmax(second / tau, dim=1), F.log_softmax(teacher / tau, dim=1), reduction="none", log_target=True)
            lesson = tau**2 * inner.sum(dim=1)
        labelled = known.sum().clamp(min=1)
        lesson = (lesson * known).sum() / labelled
        agree = ((second.argmax(dim=1) == teacher.argmax(dim=1)) * known).sum() / labelled
        return (1 - self.options.share) * loss + self.options.share * lesson, {**metrics, "lesson": lesson, "agree": agree}

    def count(self, batch: MicroBatch) -> torch.Tensor:
        return (batch.labels >= 0).sum()

    def _teach(self, batch: MicroBatch) -> torch.Tensor:
        """The teacher's logits (b, C), in fp32."""
        teacher = self.inputs.teacher
        assert teacher is not None, "distillation is given a teacher"
        with torch.no_grad():
            return teacher.model(mixed(normalize(batch.images, teacher.mean, teacher.std, self.inputs.dtype), batch.mix)).float()


def _logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the class head and of the distillation head, (b, C) each; the same where there is one."""
    if getattr(unwrapped(model).options, "distilled", False):
        own, second = model(images, heads=True)
        return own.float(), second.float()
    logits = model(images).float()
    return logits, logits
