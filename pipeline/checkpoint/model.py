"""The model in a checkpoint, as evaluation, prediction and other runs use it: a card, and fp32 weights, put together from all ranks'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.checkpoint.commit import STATE, Checkpoints, Commit
from pipeline.checkpoint.fragments import OF_MODEL, Fragment
from pipeline.checkpoint.read import read_into
from pipeline.core.errors import CheckpointError, NoSuchRun
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.models import Model, create, formats
from pipeline.stream.palette import Palette
from pipeline.stream.text import Tokenizer

CARD = "model.json"
T = TypeVar("T")


@dataclass(frozen=True)
class ModelCard:
    """What it takes to build the model and to feed it.

    `options` are all of the model's; `classes` are the dataset's, whether or not the model has a head for them; `palette` holds
    the colours of a model of pixels, `tokenizer` the tokenizer.json of a model of captions; `dataset` is the hash of what it was
    trained on, empty where `run` is the URL of a published model.
    """

    model: str
    options: dict[str, Any]
    objective: str
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str
    run: str
    step: int
    palette: list[list[float]] | None = None
    tokenizer: str | None = None

    @property
    def pixels(self) -> int:
        """The model's input, a side."""
        return self.options["pixels"]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def make(self, **changes: Any) -> Model:
        """The model, freshly initialised; `changes` are of its options."""
        return create(self.model, **{**self.options, **changes})

    def open_palette(self) -> Palette | None:
        return Palette(np.array(self.palette, dtype=np.float32)) if self.palette else None

    def open_tokenizer(self) -> Tokenizer | None:
        return Tokenizer.parse(self.tokenizer.encode()) if self.tokenizer else None


def find_model(run: Storage, step: int | None = None) -> tuple[ModelCard, dict[str, torch.Tensor]]:
    """The card and fp32 weights of a run's checkpoint at `step`, or of its newest sound one.

    Raises:
        NoSuchRun: nothing was committed there. CheckpointError: no such step, or it is damaged.
    """
    checkpoints = Checkpoints(run)
    return _newest(checkpoints, step, lambda commit: (_read_card(checkpoints, commit), read_weights(checkpoints, commit)))


def find_card(run: Storage, step: int | None = None) -> ModelCard:
    """The card alone; raises as `find_model`."""
    checkpoints = Checkpoints(run)
    return _newest(checkpoints, step, lambda commit: _read_card(checkpoints, commit))


def _newest(checkpoints: Checkpoints, step: int | None, read: Callable[[Commit], T]) -> T:
    """What `read` makes of the newest checkpoint, or that at `step`; a damaged one is passed over where no step is asked for."""
    commits = checkpoints.commits() if step is None else [checkpoints.read(step)]
    if not commits:
        raise NoSuchRun(f"run {checkpoints.run.url}: there is no committed checkpoint here")
    while True:
        try:
            return read(commits.pop())
        except CheckpointError as e:
            if not commits:
                raise
            say(f"warning: {e}; the checkpoint before it is used")


def _read_card(checkpoints: Checkpoints, commit: Commit) -> ModelCard:
    values = json.loads(checkpoints.fetch(commit, CARD))
    return ModelCard(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def read_weights(checkpoints: Checkpoints, commit: Commit, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The fp32 parameters and the buffers of a checkpoint, put together from all ranks' parts: all, or those of `names`. Where the run
    keeps an average of the parameters, that is what its model is.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    shapes = {name: s for name, s in read_shapes(checkpoints, commit).items() if names is None or name in names}
    indices = checkpoints.indices(commit)
    dtypes = {(p.key, p.name): p.torch_dtype for index in indices for p in index.pieces}
    wanted = []
    for name, shape in shapes.items():
        key = next((key for key in OF_MODEL if (key, name) in dtypes), None)
        if key is None:
            raise CheckpointError(f"checkpoint {checkpoints.directory.url}/{commit.prefix}: holds no {name}")
        wanted.append(Fragment(key, name, 0, torch.empty(math.prod(shape), dtype=dtypes[key, name])))
    read_into(checkpoints, commit, indices, wanted)
    full = {f.name: f.tensor.view(shapes[f.name]) for f in wanted}
    return {name: t.float() if t.is_floating_point() else t for name, t in full.items()}


def read_shapes(checkpoints: Checkpoints, commit: Commit) -> dict[str, list[int]]:
    """Of each parameter and buffer; raises as `read_weights`."""
    return json.loads(checkpoints.fetch(commit, STATE))["engine"]["shapes"]


def split_url(url: str) -> tuple[str, int | None]:
    """`URL@step` as (URL, step); the step is None where it is not given."""
    base, at, step = url.rpartition("@")
    return (base, int(step)) if at and step.isdigit() else (url, None)


def open_model(url: str, endpoint: str | None, where: str) -> tuple[ModelCard, dict[str, torch.Tensor]]:
    """The card and fp32 weights of a run's checkpoint (`URL` or `URL@step`), or of a published model in any form that
    `pipeline.models.formats` reads; begins errors with the config path `where`.

    Raises:
        CheckpointError: there is neither; or it is damaged.
    """
    base, step = split_url(url)
    try:
        if is_run(base, endpoint):
            return find_model(Storage(base, endpoint), step)
        found = formats.read(url, endpoint=endpoint)
    except NoSuchRun as e:
        raise CheckpointError(f"{where}: there is no committed checkpoint in {base}") from e
    except CheckpointError as e:
        raise CheckpointError(f"{where}: {e}") from e
    half = (0.5, 0.5, 0.5)
    card = ModelCard(
        model=found.name,
        options=dict(found.options),
        objective="",
        classes=found.classes or [],
        mean=found.mean or half,
        std=found.std or half,
        dataset="",
        run=url,
        step=0,
    )
    return card, found.state


def is_run(url: str, endpoint: str | None) -> bool:
    """Whether a run's directory is what `url` names."""
    directory = Storage(url, endpoint)
    return directory.exists("run.yaml") or bool(Checkpoints(directory).steps())


def adapt_weights(card: ModelCard, weights: Mapping[str, torch.Tensor], model: Model, where: str) -> dict[str, torch.Tensor]:
    """Make a checkpoint's weights fit `model`: positions are interpolated to its resolution, and a head for other classes is left
    zero, as fine-tuning in the ViT paper (section 3.2).

    Raises:
        CheckpointError: the weights are of a different model; names the first differing parameter and both shapes.
    """
    fitted = model.adapt(weights)
    _check_shapes(card, fitted, model.state_dict(), where)
    return fitted


def find_start_card(url: str, endpoint: str | None, where: str = "pretrain.start.from") -> ModelCard | None:
    """The card of the run's checkpoint that `url` names; None where it names no run.

    Raises:
        CheckpointError: nothing was committed there, or it is damaged.
    """
    base, step = split_url(url)
    if not is_run(base, endpoint):
        return None
    try:
        return find_card(Storage(base, endpoint), step)
    except NoSuchRun as e:
        raise CheckpointError(f"{where}: there is no committed checkpoint in {base}") from e
    except CheckpointError as e:
        raise CheckpointError(f"{where}: {e}") from e


def check_start(url: str, load: str, make: Callable[[int], Model], endpoint: str | None, where: str = "pretrain.start.from") -> None:
    """Preflight: raise what is wrong with the checkpoint that `pretrain.start` names. Of a run the card alone is read; `make` gives
    the config's model for a number of classes, on the meta device.

    Raises:
        CheckpointError: it is missing or damaged, or it is of a different model.
    """
    card = find_start_card(url, endpoint, where)
    if card is not None:
        with torch.device("meta"):  # shapes without numbers
            weights: Mapping[str, torch.Tensor] = card.make().state_dict()
    else:
        card, state = open_model(url, endpoint, where)
        weights = {name: tensor.to("meta") for name, tensor in state.items()}
    ours = make(len(card.classes))
    if load == "weights":
        adapt_weights(card, weights, ours, where)
    else:
        _check_shapes(card, weights, ours.state_dict(), where)


def _check_shapes(card: ModelCard, given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str) -> None:
    for name in sorted({*wanted, *given}):
        theirs, ours = (tuple(s[name].shape) if name in s else "none" for s in (given, wanted))
        if theirs != ours:
            whose = f"of run {card.run} at step {card.step}" if card.dataset else card.run
            raise CheckpointError(
                f"{where}: the checkpoint {whose} is of a different model, {card.model} {_told(card.options)}: "
                f"its {name} has shape {theirs}, this model's has {ours}"
            )


def _told(options: Mapping[str, Any]) -> str:
    """Options in a few words."""
    told = {name: value for name, value in options.items() if name in ("pixels", "patch", "width", "depth", "classes", "colors")}
    return ", ".join(f"{name} {value}" for name, value in told.items())
