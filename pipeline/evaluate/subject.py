"""What is evaluated: the newest checkpoint of the run, or the model that `evaluate.model` names."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.checkpoint import ModelCard, find_model
from pipeline.checkpoint.model import find_start_card, open_model
from pipeline.config import Config
from pipeline.config.evaluate import Evaluate
from pipeline.config.inputs import Image
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage
from pipeline.evaluate.protocols import Kind, check_protocols
from pipeline.models.registry import check_model, family_of
from pipeline.stream.palette import Palette
from pipeline.stream.text import Tokenizer
from pipeline.train.inputs import THREE_BIT

_WHERE = "evaluate.model"
_MICRO_BATCH = 64  # images of the model's own resolution in one pass, where no pretrain section says it


def find_subject(config: Config, run: Storage) -> tuple[ModelCard, dict[str, torch.Tensor]]:
    """The card, with palette and tokenizer, and the fp32 weights.

    Raises:
        NoSuchRun, CheckpointError: there is none, or it is damaged. ConfigError, DataError: its palette or tokenizer is missing.
    """
    assert config.evaluate is not None
    if config.evaluate.model is None:
        return find_model(run)
    card, state = open_model(config.evaluate.model, config.storage.endpoint, _WHERE)
    return _equip(card, config.evaluate, config.storage.endpoint), state


def check_subject(config: Config) -> None:
    """Preflight of `evaluate.model`, nothing without it; of a run the card alone is read.

    Raises:
        CheckpointError, DataError: it is missing or damaged. ConfigError: it cannot do what the config asks for.
    """
    ev, endpoint = config.evaluate, config.storage.endpoint
    if ev is None or ev.model is None:
        return
    card = find_start_card(ev.model, endpoint, _WHERE) or open_model(ev.model, endpoint, _WHERE)[0]
    check_protocols(ev, Kind.of(_equip(card, ev, endpoint)))


def training_view(config: Config, card: ModelCard) -> tuple[Image, int]:
    """The view that fine-tuning trains on, before its own resolution, and how many of it make a pass: those of pre-training, or random
    crops where that was elsewhere."""
    if config.pretrain:
        return config.pretrain.image, config.pretrain.micro_batch
    return Image(pixels=card.pixels, mean=card.mean, std=card.std), _MICRO_BATCH


def _equip(card: ModelCard, ev: Evaluate, endpoint: str | None) -> ModelCard:
    """With all options, and the palette and the tokenizer that the config names: published models come without."""
    card = replace(card, options=check_model(card.model, card.options, _WHERE).model_dump(mode="json"))
    family = family_of(card.model)
    if family == "igpt":
        if ev.palette:
            palette = Palette.three_bit() if ev.palette == THREE_BIT else Palette.load(ev.palette, endpoint=endpoint)
            card = replace(card, palette=palette.colors.tolist())
        if card.palette is None:
            raise ConfigError(
                f"evaluate.palette: is missing; {ev.model} is a model of pixels, and comes without its colours "
                f"(allowed: a .npy file of them, or {THREE_BIT})"
            )
        if len(card.palette) != card.options["colors"]:
            raise ConfigError(f"evaluate.palette: has {len(card.palette)} colours, and {ev.model} is of {card.options['colors']}")
    if family == "clip":
        card = with_tokenizer(card, ev.tokenizer, endpoint, "evaluate.tokenizer", str(ev.model), "zero-shot" in ev.protocols)
    return card


def with_tokenizer(card: ModelCard, tokenizer: str | None, endpoint: str | None, where: str, model: str, is_needed: bool) -> ModelCard:
    """The card of a CLIP, with the tokenizer at the URL that the config names at `where`, or its own.

    Raises:
        ConfigError: it has none and one is needed, or it is another model's. DataError: there is none at the URL.
    """
    if tokenizer:
        card = replace(card, tokenizer=Tokenizer.load(tokenizer, endpoint=endpoint).to_json())
    found = card.open_tokenizer()
    if found is None and is_needed:
        raise ConfigError(
            f"{where}: is missing; {model} comes without its tokens (allowed: a tokenizer.json made here, or OpenAI's "
            "bpe_simple_vocab_16e6.txt.gz)"
        )
    if found and found.size != card.options["vocabulary"]:
        raise ConfigError(f"{where}: has {found.size} tokens, and {model} is of {card.options['vocabulary']}")
    return card
