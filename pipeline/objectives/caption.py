"""The two predictive baselines of CLIP's efficiency figure (arXiv 2103.00020, section 2.3 and figure 2).

Shapes: b micro-batch, L tokens a caption, V tokens there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.options import Options
from pipeline.objectives.classify import CLASSIFIERS
from pipeline.objectives.objective import Facts, Metrics, Objective
from pipeline.stream.batches import MicroBatch


class CaptionPrediction(Objective):
    """The exact words in their order, each from the image and the words before it; nats a token, [EOT] included."""

    families = frozenset({"caption"})
    needs = frozenset({"captions"})
    metrics = frozenset({"top1"})

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        return {"vocabulary": facts.vocabulary, "context": facts.context}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        assert batch.tokens is not None, "an objective of captions is given tokens"
        logits = model(self.inputs.images(batch), batch.tokens)[:, :-1].float()
        wanted = batch.tokens[:, 1:].masked_fill(~_words(batch.tokens)[:, 1:], -1)
        known = (wanted >= 0).sum().clamp(min=1)  # a filler has none
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum") / known
        return loss, {"top1": (logits.argmax(dim=2) == wanted).sum() / known}

    def count(self, batch: MicroBatch) -> torch.Tensor:
        """Tokens, for of these the loss is a mean."""
        assert batch.tokens is not None, "an objective of captions is given tokens"
        return _words(batch.tokens)[:, 1:].sum()


class BagOfWords(Objective):
    """The words in any order: a classifier over V tokens, whose targets share 1 among a caption's different words
    (Joulin et al. 2016, arXiv 1511.02251, section 3.2, which found this softmax better than a sigmoid a word).

    A caption without words is left out.
    """

    families = CLASSIFIERS
    needs = frozenset({"captions"})
    metrics = frozenset({"top1"})

    @staticmethod
    def model_options(options: Options, facts: Facts) -> Mapping[str, Any]:
        return {"classes": facts.vocabulary}

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """`top1`: how often the likeliest word is in the caption."""
        logits = model(self.inputs.images(batch)).float()
        bag = self._bag(batch, logits.shape[1])
        words = bag.sum(dim=1)
        has_any = (words > 0).sum().clamp(min=1)
        loss = -(F.log_softmax(logits, dim=1) * bag).sum(dim=1) / words.clamp(min=1)
        return loss.sum() / has_any, {"top1": bag.gather(1, logits.argmax(dim=1, keepdim=True)).sum() / has_any}

    def count(self, batch: MicroBatch) -> torch.Tensor:
        assert batch.tokens is not None, "an objective of captions is given tokens"
        return (batch.tokens.argmax(dim=1) > 1).sum()

    @staticmethod
    def _bag(batch: MicroBatch, vocabulary: int) -> torch.Tensor:
        """(b, V): 1 for each word that occurs, without [SOT] and [EOT]."""
        assert batch.tokens is not None, "an objective of captions is given tokens"
        inside = _words(batch.tokens)
        inside[:, 0] = False
        inside &= batch.tokens != batch.tokens.max(dim=1, keepdim=True).values
        bag = torch.zeros(len(batch.tokens), vocabulary, device=batch.tokens.device)
        return bag.scatter_add_(1, batch.tokens, inside.float()).clamp_(max=1)


def _words(tokens: torch.Tensor) -> torch.Tensor:
    """bool (b, L): [SOT] to [EOT], which is the largest number; what follows only fills up."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(dim=1, keepdim=True)
