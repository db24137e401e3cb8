"""The weights in a checkpoint, as evaluation, prediction and other runs use them: fp32 safetensors and a card."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.commit import Checkpoints
from pipeline.config.schema import Pretrain
from pipeline.core.errors import CheckpointError, NoSuchRun
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.models import build_model
from pipeline.models.vit import VisionTransformer, resize_positions

WEIGHTS, CARD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class ModelCard:
    """What it takes to build the model and to feed it; `dataset` is the hash of what it was trained on."""

    model: str
    arguments: dict[str, Any]
    pixels: int
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dataset: str
    run: str
    step: int


def write_model(directory: Path, card: ModelCard, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, directory / WEIGHTS)
    (directory / CARD).write_text(json.dumps(asdict(card), indent=1))


def find_model(run: Storage, step: int | None = None) -> tuple[ModelCard, dict[str, torch.Tensor]]:
    """The card and fp32 weights of a run's checkpoint at `step`, or of its newest sound one.

    Raises:
        NoSuchRun: nothing was committed there. CheckpointError: no such step, or it is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-model-") as local:
        return _fetch_card(run, step, Path(local), {WEIGHTS}), load_file(Path(local) / WEIGHTS)


def find_card(run: Storage, step: int | None = None) -> ModelCard:
    """The card alone; raises as `find_model`."""
    with tempfile.TemporaryDirectory(prefix="tessera-model-") as local:
        return _fetch_card(run, step, Path(local), set())


def _fetch_card(run: Storage, step: int | None, into: Path, others: set[str]) -> ModelCard:
    """Fetch the card, and `others` of the checkpoint's files, below `into`; a damaged one is passed over where no step is asked for."""
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps() if step is None else [step]
    if not steps:
        raise NoSuchRun(f"run {run.url}: there is no committed checkpoint here")
    while steps:
        try:
            checkpoints.fetch(checkpoints.read(steps.pop()), into, {CARD, *others})
            break
        except CheckpointError as e:
            if not steps:
                raise
            say(f"warning: {e}; the checkpoint before it is used")
    values = json.loads((into / CARD).read_text())
    return ModelCard(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def split_url(url: str) -> tuple[str, int | None]:
    """`URL@step` as (URL, step); the step is None where it is not given."""
    base, at, step = url.rpartition("@")
    return (base, int(step)) if at and step.isdigit() else (url, None)


def adapt_weights(card: ModelCard, weights: dict[str, torch.Tensor], model: VisionTransformer, where: str) -> dict[str, torch.Tensor]:
    """Make a checkpoint's weights fit `model`: positions are interpolated to its resolution, and a head for other
    classes is left zero, as fine-tuning in the ViT paper (section 3.2).

    Raises:
        CheckpointError: the weights are of a different model; names the first differing parameter and both shapes.
    """
    wanted = model.state_dict()
    fitted = dict(weights)
    fitted["pos_embed"] = resize_positions(weights["pos_embed"], model.pixels // model.patch) if "pos_embed" in weights else model.pos_embed
    for name in ("head.weight", "head.bias"):
        if name in wanted and (name not in weights or weights[name].shape != wanted[name].shape):
            fitted[name] = torch.zeros_like(wanted[name])
        elif name not in wanted:
            fitted.pop(name, None)
    _check_shapes(card, fitted, wanted, where)
    return fitted


def check_start(pretrain: Pretrain, endpoint: str | None, where: str = "pretrain.start.from") -> None:
    """Preflight: raise what is wrong with the checkpoint that `pretrain.start` names, from its card alone.

    Raises:
        CheckpointError: it is missing or damaged, or it is of a different model.
    """
    assert pretrain.start is not None, "called for a config that starts from a checkpoint"
    url, step = split_url(pretrain.start.from_)
    try:
        card = find_card(Storage(url, endpoint), step)
    except NoSuchRun as e:
        raise CheckpointError(f"{where}: there is no committed checkpoint in {url}") from e
    except CheckpointError as e:
        raise CheckpointError(f"{where}: {e}") from e
    with torch.device("meta"):  # shapes without numbers
        theirs = build_model(card.model, card.arguments, pixels=card.pixels, classes=len(card.classes))
        ours = build_model(pretrain.model.name, pretrain.model.arguments, pixels=pretrain.image.pixels, classes=len(card.classes))
    if pretrain.start.load == "weights":
        adapt_weights(card, theirs.state_dict(), ours, where)
    else:
        _check_shapes(card, theirs.state_dict(), ours.state_dict(), where)


def _check_shapes(card: ModelCard, given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    for name in sorted({*wanted, *given}):
        theirs, ours = (tuple(s[name].shape) if name in s else "none" for s in (given, wanted))
        if theirs != ours:
            raise CheckpointError(
                f"{where}: the checkpoint of run {card.run} at step {card.step} is of a different model, {card.model} {card.arguments}: "
                f"its {name} has shape {theirs}, this model's has {ours}"
            )
