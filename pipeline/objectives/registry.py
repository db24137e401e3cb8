"""Objectives by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.inputs import Image
from pipeline.config.pretrain import Best
from pipeline.core.errors import ConfigError, choose
from pipeline.models import check_model
from pipeline.models.options import Options, parse
from pipeline.models.registry import GIVEN, family_of
from pipeline.objectives.caption import BagOfWords, CaptionPrediction
from pipeline.objectives.classify import Classify
from pipeline.objectives.contrastive import Contrastive, SigmoidContrastive
from pipeline.objectives.distil import Distil
from pipeline.objectives.objective import VALIDATION, Facts, Inputs, Objective
from pipeline.objectives.patches import MaskedAutoencoder, MaskedPatches
from pipeline.objectives.pixels import BertPixels, NextPixel, PixelsAndClasses

OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classify,
    "next-pixel": NextPixel,
    "bert-pixels": BertPixels,
    "pixels-and-classes": PixelsAndClasses,
    "masked-patches": MaskedPatches,
    "mae": MaskedAutoencoder,
    "distil": Distil,
    "contrastive": Contrastive,
    "sigmoid-contrastive": SigmoidContrastive,
    "caption": CaptionPrediction,
    "bag-of-words": BagOfWords,
}

WHERE, MODEL = "pretrain.objective", "pretrain.model"


def check_objective(name: str, arguments: Mapping[str, Any], where: str = WHERE) -> Options:
    """The complete arguments of the objective `name`.

    Raises:
        ConfigError: an unknown name, an unknown argument or a value out of range.
    """
    choose(f"{where}.name", name, OBJECTIVES)
    return parse(OBJECTIVES[name].arguments, dict(arguments), where)


def model_options(
    model: str, options: Mapping[str, Any], objective: str, arguments: Mapping[str, Any], pixels: int, facts: Facts
) -> Options:
    """The complete options of the config's model: as the config says, and as objective and data demand.

    Raises:
        ConfigError: the model and the objective do not fit together, or one of them is wrong in itself.
    """
    checked = check_objective(objective, arguments)
    if taken := sorted(GIVEN & set(options)):
        raise ConfigError(f"{MODEL}.{taken[0]}: is not said here, it follows from the data and from pretrain.image")
    values = {**OBJECTIVES[objective].model_options(checked, facts), **options, "pixels": pixels}
    families = OBJECTIVES[objective].families
    check_name(model, objective, families)
    try:
        return check_model(model, values, MODEL)
    except ConfigError as e:  # what follows from elsewhere is said there
        said = str(e).replace(f"{MODEL}.vision.pixels", f"{MODEL}.pixels")
        raise ConfigError(said.replace(f"{MODEL}.pixels", "pretrain.image.pixels")) from None


def check_mixing(objective: str, image: Image) -> None:
    """Raises ConfigError where images are to be mixed and what `objective` predicts of them would not be."""
    if not OBJECTIVES[objective].mixes and (key := "mixup" if image.mixup else "cutmix" if image.cutmix else None):
        allowed = ", ".join(sorted(name for name, kind in OBJECTIVES.items() if kind.mixes))
        raise ConfigError(f"pretrain.image.{key}: mixes images with their labels, and {objective!r} has none (allowed for: {allowed})")


def check_best(objective: str, best: Best, scores: Sequence[str] = ()) -> None:
    """Raises ConfigError where validation of `objective`, or of the `scores` beside it, does not measure what the best checkpoint is
    chosen by."""
    choose("pretrain.save.best.metric", best.metric, [f"{VALIDATION}{name}" for name in ("loss", *OBJECTIVES[objective].metrics, *scores)])


def check_name(model: str, objective: str, families: frozenset[str]) -> None:
    """Raises ConfigError where `objective` cannot train `model`; an unknown name is left to `check_model`."""
    family = family_of(model)
    if family not in families and _is_known(family):
        others = sorted(name for name, kind in OBJECTIVES.items() if family in kind.families)
        raise ConfigError(
            f"{WHERE}.name: {objective!r} trains models of {' or '.join(sorted(families))}, and {model} is of {family} "
            f"(allowed for it: {', '.join(others)})"
        )


def build_objective(name: str, arguments: Mapping[str, Any], inputs: Inputs) -> Objective:
    return OBJECTIVES[name](check_objective(name, arguments), inputs)


def _is_known(family: str) -> bool:
    return any(family in kind.families for kind in OBJECTIVES.values())
