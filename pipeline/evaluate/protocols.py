"""The protocols, and which models each of them is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import ModelCard
from pipeline.config.evaluate import Evaluate, FineTune
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError, choose
from pipeline.models.registry import as_classifier, family_of
from pipeline.train.inputs import options_of

# Protocol -> what it measures, in a short phrase for people; in the order of pages and tables.
PROTOCOLS = {
    "supervised": "the model's own head",
    "zero-shot": "the nearest caption, without an example",
    "linear": "logistic regression on frozen features",
    "layers": "logistic regression on the features of each layer",
    "few-shot": "least squares on a few labelled images a class, frozen features",
    "fine-tune": "all weights trained on, with a new head",
}

_ONLY_FOR = {"zero-shot": "clip", "layers": "igpt"}


@dataclass(frozen=True)
class Kind:
    """What decides how a model can be evaluated; known before it is trained. `options` are all of the model's."""

    model: str
    options: Mapping[str, Any]
    objective: str

    @staticmethod
    def of(card: ModelCard) -> Kind:
        return Kind(card.model, card.options, card.objective)

    @staticmethod
    def planned(p: Pretrain) -> Kind:
        """Of the model that `p` trains. Raises ConfigError where model and objective are wrong."""
        return Kind(p.model.name, options_of(p, classes=2).model_dump(mode="json"), p.objective.name)

    @property
    def family(self) -> str:
        return family_of(self.model)


def check_protocols(evaluate: Evaluate, kind: Kind) -> None:
    """Refuse what the model cannot do.

    Raises:
        ConfigError: an unknown protocol, one that is for other models, completions of a model that draws no pixels, or a resolution
            for fine-tuning that the patches do not divide.
    """
    for i, protocol in enumerate(evaluate.protocols):
        choose(f"evaluate.protocols.{i}", protocol, PROTOCOLS)
        if kind.family != _ONLY_FOR.get(protocol, kind.family):
            allowed = [p for p in PROTOCOLS if _ONLY_FOR.get(p, kind.family) == kind.family]
            raise ConfigError(
                f"evaluate.protocols.{i}: {protocol!r} is for models of {_ONLY_FOR[protocol]}, and this one is of {kind.family} "
                f"(allowed for it: {', '.join(allowed)})"
            )
    if evaluate.completions and kind.family != "igpt":
        raise ConfigError(f"evaluate.completions: is for models of igpt, and this one is of {kind.family}; leave it out")
    if evaluate.completions and kind.options["masked"]:
        raise ConfigError("evaluate.completions: a model trained with the BERT objective has no order to draw pixels in; leave it out")
    if "fine-tune" in evaluate.protocols:
        pixels = fine_tune_pixels(evaluate.fine_tune, kind)
        if kind.options.get("positions") == "relative" and pixels != kind.options["pixels"]:
            raise ConfigError(
                f"evaluate.fine_tune.pixels: {pixels} is not possible with relative positions, which are of one grid "
                f"(allowed: {kind.options['pixels']})"
            )
        try:
            with torch.device("meta"):
                as_classifier(kind.model, kind.options, pixels=pixels, classes=2)
        except ConfigError as e:
            raise ConfigError(str(e).replace("model.pixels", "evaluate.fine_tune.pixels")) from None


def fine_tune_pixels(how: FineTune, kind: Kind) -> int:
    """The input side of fine-tuning, in pixels: as told, or twice that of pre-training; the same for a model of pixels, whose
    sequence would grow by four, and its cost by up to sixteen, and for relative positions, which are of one grid."""
    stays = kind.family == "igpt" or kind.options.get("positions") == "relative"
    return how.pixels or kind.options["pixels"] * (1 if stays else 2)


def has_head(card: ModelCard) -> bool:
    """Whether the model tells the card's classes apart itself; a bag of words has logits too, but of words."""
    return card.objective != "bag-of-words" and card.options.get("classes", 0) > 0


def tells_apart(card: ModelCard, classes: Sequence[str]) -> bool:
    """Whether the model's own head is for `classes`. A published model's is for as many, in their order: what it calls them, if it says,
    is seldom what folders are called."""
    if not card.dataset:
        return has_head(card) and card.options["classes"] == len(classes)
    return has_head(card) and card.classes == list(classes)
