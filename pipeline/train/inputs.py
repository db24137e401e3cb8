"""What stands between samples and the model: a palette or a tokenizer, loaded or learned from the run's own data, and a teacher.

Palette and tokenizer are kept in the run directory, so that they are learned once and the run goes on without what it began with,
and are in each checkpoint's card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.checkpoint import ModelCard, Run
from pipeline.checkpoint.model import find_start_card, open_model
from pipeline.config import Config
from pipeline.config.inputs import Palette as PaletteSection
from pipeline.config.inputs import Text
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import CheckpointError, ConfigError, DataError, TesseraError, UserError
from pipeline.core.progress import Progress, say
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.models import Model
from pipeline.models.options import Options
from pipeline.models.registry import family_of
from pipeline.objectives import OBJECTIVES, Facts, Inputs, Teacher, check_objective, model_options
from pipeline.objectives.classify import CLASSIFIERS
from pipeline.objectives.distil import DistilOptions
from pipeline.objectives.objective import Need
from pipeline.stream import Collection
from pipeline.stream.palette import Palette, views
from pipeline.stream.text import Tokenizer

PALETTE, TOKENIZER = "palette.npy", "tokenizer.json"
THREE_BIT = "three-bit"
TEACHER = "pretrain.objective.teacher"
_IMAGES, _CAPTIONS = 10_000, 200_000  # to learn from, at most
_LOOKS = 16  # samples that are looked at for a caption, spread evenly


@dataclass(frozen=True)
class Prepared:
    """What the config's objective needs beside samples; None where it does not."""

    palette: Palette | None
    tokenizer: Tokenizer | None
    context: int

    def facts(self, classes: int, otherwise: Facts | None = None) -> Facts:
        """`otherwise`: what is planned for that which is to be learned."""
        planned = otherwise or Facts()
        colors = self.palette.size if self.palette else planned.colors
        return Facts(classes, colors, self.tokenizer.size if self.tokenizer else planned.vocabulary, self.context)


def needs(p: Pretrain) -> frozenset[Need]:
    return OBJECTIVES[p.objective.name].needs


def planned_facts(p: Pretrain, classes: int) -> Facts:
    """As they will be, at most, before anything is learned or loaded."""
    palette, text = p.palette or PaletteSection(), p.text or Text()
    wanted = needs(p)
    colors = 512 if palette.url == THREE_BIT else palette.colors
    return Facts(classes, colors if "palette" in wanted else 0, text.size if "captions" in wanted else 0, text.length)


def options_of(p: Pretrain, classes: int, named: Prepared | None = None) -> Options:
    """Of the config's model, for so many classes, with what is `named` and what is planned else; raises as `model_options`."""
    check_objective(p.objective.name, p.objective.arguments)
    planned = planned_facts(p, classes)
    facts = named.facts(classes, planned) if named else planned
    return model_options(p.model.name, p.model.arguments, p.objective.name, p.objective.arguments, p.image.pixels, facts)


def named_inputs(p: Pretrain, endpoint: str | None, own: Storage | None) -> Prepared:
    """What the run in the directory `own` keeps, if there is one; else what the config names, or what the run that it starts from was
    trained with; None for what is to be learned.

    Raises:
        DataError: a file that is named cannot be read. CheckpointError: the run to start from cannot. ConfigError: nothing is named,
            and what it starts from comes without; numbers of other colours or words would mean nothing to it.
    """
    wanted, palette, tokenizer = needs(p), None, None
    kept: dict[str, str] = {}
    if own is not None and wanted & {"palette", "captions"}:
        kept = {name: f"{own.url}/{name}" for name in (PALETTE, TOKENIZER) if own.exists(name)}
    wants_more = ("palette" in wanted and PALETTE not in kept) or ("captions" in wanted and TOKENIZER not in kept)
    card = find_start_card(p.start.from_, endpoint) if p.start and wants_more else None
    if "palette" in wanted:
        section = p.palette or PaletteSection()
        if PALETTE in kept:
            palette = Palette.load(kept[PALETTE], endpoint=endpoint)
        elif section.url == THREE_BIT:
            palette = Palette.three_bit()
        elif section.url:
            palette = Palette.load(section.url, section.sha256, endpoint)
        elif p.start:
            palette = card.open_palette() if card else None
            if palette is None:
                raise ConfigError(f"pretrain.palette.url: is missing; {p.start.from_} comes without the colours that it was trained with")
    if "captions" in wanted:
        text = p.text or Text()
        if TOKENIZER in kept:
            tokenizer = Tokenizer.load(kept[TOKENIZER], endpoint=endpoint)
        elif text.tokenizer:
            tokenizer = Tokenizer.load(text.tokenizer, text.sha256, endpoint)
        elif p.start:
            tokenizer = card.open_tokenizer() if card else None
            if tokenizer is None:
                raise ConfigError(f"pretrain.text.tokenizer: is missing; {p.start.from_} comes without the tokens that it was trained with")
    return Prepared(palette, tokenizer, (p.text or Text()).length)


def prepare_inputs(run: Run, data: Collection, world: World) -> Prepared:
    """`named_inputs`, and what is left learned from the data, unless an earlier start of the run did it; kept in the run's directory.
    All ranks call this together, the first one learns.

    Raises:
        DataError: also where there is too little to learn from.
    """
    p = run.config.pretrain
    assert p is not None, "called for a config that pre-trains"
    error: TesseraError | None = None
    if world.is_main:
        try:
            _keep_inputs(run, p, data)
        except TesseraError as e:
            error = e  # the others wait for this rank: tell them
    if (error := world.broadcast(error)) is not None:
        raise error
    return named_inputs(p, run.config.storage.endpoint, run.directory)


def _keep_inputs(run: Run, p: Pretrain, data: Collection) -> None:
    """Put what the objective needs into the run's directory, where it is not there."""
    wanted, endpoint = needs(p), run.config.storage.endpoint
    named = named_inputs(p, endpoint, run.directory)
    if "palette" in wanted and not run.directory.exists(PALETTE):
        palette = named.palette or learn_palette(data, p.image.pixels, (p.palette or PaletteSection()).colors)
        palette.save(f"{run.directory.url}/{PALETTE}", endpoint)
    if "captions" in wanted and not run.directory.exists(TOKENIZER):
        tokenizer = named.tokenizer or learn_tokenizer(data, (p.text or Text()).size)
        run.directory.write(TOKENIZER, tokenizer.to_json().encode())


def open_inputs(config: Config, prepared: Prepared, classes: Sequence[str], dtype: torch.dtype, device: torch.device) -> Inputs:
    """What the objective is built with.

    Raises:
        CheckpointError: there is no teacher where the config names one. ConfigError: it has other classes.
    """
    p = config.pretrain
    assert p is not None, "called for a config that pre-trains"
    teacher = None
    if "teacher" in needs(p):
        teacher = open_teacher(_teacher_url(p), p.image.pixels, classes, config.storage.endpoint)
        teacher.model.to(device, dtype)
    return Inputs(p.image.mean, p.image.std, dtype, prepared.palette, teacher)


def check_teacher(p: Pretrain, classes: Sequence[str] | None, endpoint: str | None) -> None:
    """Preflight: raise what is wrong with the teacher that the objective names, if it has one. Of a run the card alone is read."""
    if "teacher" not in needs(p):
        return
    url = _teacher_url(p)
    card = find_start_card(url, endpoint, TEACHER) or open_model(url, endpoint, TEACHER)[0]
    _check_teaches(card, url, p.image.pixels, classes)


def _teacher_url(p: Pretrain) -> str:
    options = check_objective(p.objective.name, p.objective.arguments)
    assert isinstance(options, DistilOptions), "only distillation has a teacher"
    return options.teacher


def _check_teaches(card: ModelCard, url: str, pixels: int, classes: Sequence[str] | None) -> Model:
    """The teacher without numbers, at the student's resolution; `classes` are the data's where they are known.

    Raises:
        ConfigError: it is no classifier, or one of other classes; or its patches do not divide the resolution.
    """
    if family_of(card.model) not in CLASSIFIERS or card.objective == "bag-of-words" or not card.options.get("classes"):
        raise ConfigError(
            f"{TEACHER}: {url} is no classifier of images, but {card.model} (allowed: models of {', '.join(sorted(CLASSIFIERS))})"
        )
    if classes is not None:
        if card.options["classes"] != len(classes):
            raise ConfigError(
                f"{TEACHER}: {url} tells {card.options['classes']} classes apart, and the data has {len(classes)}; "
                "it must be a classifier of the same"
            )
        if card.dataset and card.classes != list(classes):
            raise ConfigError(f"{TEACHER}: {url} was trained on other classes than the data has, or in another order")
    try:
        return card.make(pixels=pixels, device="meta")
    except ConfigError as e:
        raise ConfigError(f"{TEACHER}: {url} cannot see images of pretrain.image.pixels {pixels} ({e})") from e


def open_teacher(url: str, pixels: int, classes: Sequence[str], endpoint: str | None) -> Teacher:
    """The classifier at `url`, a run or a published model, at the student's resolution."""
    card, weights = open_model(url, endpoint, TEACHER)
    _check_teaches(card, url, pixels, classes)
    model = card.make(pixels=pixels)
    try:
        model.load_state_dict(model.adapt(weights))
    except RuntimeError as e:
        raise CheckpointError(f"{TEACHER}: the weights in {url} do not fit the model {card.model!r} ({e})") from e
    return Teacher(model.eval().requires_grad_(False), card.mean, card.std)


def check_captions(p: Pretrain, data: Collection) -> None:
    """Raises ConfigError where the objective needs captions, and none of some samples of a dataset has one."""
    if "captions" not in needs(p):
        return
    for dataset in data.datasets:
        numbers = np.unique(np.linspace(0, len(dataset) - 1, _LOOKS).astype(int))
        if not any(dataset[int(n)].text.strip() for n in numbers):
            few = f"none of {len(numbers)} samples of {dataset.directory.url} has one"
            raise ConfigError(f"pretrain.objective: {p.objective.name!r} needs captions, and {few}")


def learn_palette(data: Collection, pixels: int, colors: int) -> Palette:
    """From views of `pixels` a side, as many of each dataset."""
    share = max(1, _IMAGES // len(data.datasets))
    say(f"pretrain     learning a palette of {colors} colours")
    try:
        return Palette.train((views(dataset, pixels, share).numpy() for dataset in data.datasets), colors)
    except DataError as e:
        raise DataError(f"pretrain.palette.{e}" if str(e).startswith("colors:") else str(e)) from e


def learn_tokenizer(data: Collection, size: int) -> Tokenizer:
    """From captions, as many of each dataset."""
    share = max(1, _CAPTIONS // len(data.datasets))

    def captions() -> Iterator[str]:
        for dataset in data.datasets:
            numbers = np.sort(np.random.default_rng(0).choice(len(dataset), min(share, len(dataset)), replace=False))
            with Progress("captions", len(numbers), "captions") as progress:
                for number in numbers:
                    yield dataset[int(number)].text
                    progress.update()

    say("pretrain     learning a tokenizer")
    try:
        return Tokenizer.train(captions(), size)
    except UserError as e:
        raise DataError(f"pretrain.text: no tokenizer can be learned from {data.datasets[0].directory.url} ({e})") from e
