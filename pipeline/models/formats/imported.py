"""From a checkpoint's tensors, and what its format says about them, to a model of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models.formats.keys import SAME_NAMES, Rule, Tensors, read_state
from pipeline.models.model import Model
from pipeline.models.positions import sincos_2d
from pipeline.models.registry import build, check_model, merge

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # [-1, 1], as Google's models see images
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NOTE = "tessera"  # the key of what a config that we wrote says beside what its format can

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Imported:
    """A checkpoint under our names.

    `name` is the family, `options` are those of `create(name, **options)`, `state` is what that model loads, in fp32. `mean` and `std`
    are those of the images, scaled to [0, 1], and `classes` the labels, where the format says them. `format` is a phrase for people,
    `url` where all this came from.
    """

    name: str
    options: dict[str, Any]
    state: Tensors
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: list[str] | None
    format: str
    url: str

    def model(self) -> Model:
        """In eval mode, with the checkpoint's own pixels and classes."""
        return self.load()

    def load(self, pixels: int | None = None, classes: int | None = None, **options: Any) -> Model:
        """The model with other pixels (positions are resized), classes (a head of another size is zero) or options, in eval mode.

        Tensors that stay as they are become the model's own, not copies: whoever trains one model of it makes no second.

        Raises:
            ConfigError: options that do not fit together.
            CheckpointError: the weights do not fit a model of these options.
        """
        changes = {key: value for key, value in {"pixels": pixels, "classes": classes, **options}.items() if value is not None}
        checked = check_model(self.name, merge(self.options, changes), f"{self.url}: options")
        # Without spending time on numbers that are thrown away; if some are not replaced, as those of a new head, in earnest.
        for device in ("meta", "cpu"):
            model = build(self.name, checked, seed=0, device=device)
            own = model.state_dict()
            fits = own.keys() == self.state.keys() and all(own[name].shape == self.state[name].shape for name in own)
            try:
                model.load_state_dict(self.state if fits else model.adapt(self.state), assign=device == "meta")
            except RuntimeError as e:
                raise CheckpointError(f"{self.url}: does not fit these options ({' '.join(str(e).split())})") from e
            if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
                break
        return model.eval()


@dataclass(frozen=True)
class Plan:
    """What a format's module makes of a checkpoint, before tensors are compared with a model.

    `options` are read from the file; `assumed` are what the format leaves open. `tensors` come without what is no weight; `ignored` are
    patterns of names that may be there beside the model's.
    """

    format: str
    family: str
    options: dict[str, Any]
    tensors: Tensors
    assumed: dict[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = SAME_NAMES
    ignored: Sequence[str] = ()
    normalisation: Normalisation | tuple[None, None] = (None, None)
    classes: list[str] | None = None


def finish(plan: Plan, note: Any, given: Mapping[str, Any], url: str) -> Imported:
    """The tensors under our names, after everything was compared. `note` is what an export of ours kept; `given` comes from the person.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape, or the config asks for what is no model.
        ConfigError: what was given is no option of the family.
    """
    kept = note.get("options", {}) if isinstance(note, dict) and note.get("family") == plan.family else {}
    options = _firm({**plan.assumed, **kept}, plan.options)
    try:
        checked = check_model(plan.family, merge(options, given), f"{url}: options")
    except ConfigError as e:
        raise e if given else CheckpointError(str(e)) from None
    model = build(plan.family, checked, device="meta")
    state = read_state(plan.tensors, model.state_dict(), plan.rules, plan.ignored, url)
    mean, std = plan.normalisation
    return Imported(plan.family, checked.model_dump(mode="json"), state, mean, std, plan.classes, plan.format, url)


def side_of(rows: int, url: str, name: str) -> int:
    """The side of a square grid of `rows` places. Raises CheckpointError."""
    side = math.isqrt(max(rows, 0))
    if side * side != rows or rows == 0:
        raise CheckpointError(f"{url}: {name} has {rows} places, which are no square grid")
    return side


def wanted(tensors: Mapping[str, torch.Tensor], name: str, url: str, dimensions: int) -> torch.Tensor:
    """A tensor that sizes are read from. Raises CheckpointError where it is missing, or has other than so many dimensions."""
    if name not in tensors:
        raise CheckpointError(f"{url}: does not fit the model, missing: {name}")
    if tensors[name].ndim != dimensions:
        raise CheckpointError(f"{url}: does not fit the model, {name} {tuple(tensors[name].shape)} should have {dimensions} dimensions")
    return tensors[name]


def fixed_positions(tensors: Tensors, name: str, options: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Positions that an export of ours wrote out, for a format that has learned ones alone, are fixed again unless somebody has changed
    them since. `options` are a ViT's."""
    if config.get(NOTE, {}).get("options", {}).get("positions") != "sincos-2d" or name not in tensors:
        return
    tokens = options["class_token"] + options.get("distilled", False)
    if torch.equal(tensors[name], sincos_2d(options["pixels"] // options["patch"], options["width"], tokens)):
        del tensors[name]
        options["positions"] = "sincos-2d"


def outputs(tensors: Mapping[str, torch.Tensor], name: str, url: str, dimensions: int = 2, axis: int = 0) -> int:
    """Of a layer that a model may have or not, by its weight; 0 where there is none. Raises CheckpointError as `wanted` does."""
    return wanted(tensors, name, url, dimensions).shape[axis] if name in tensors else 0


def normalisation(config: Mapping[str, Any], mean: str = "mean", std: str = "std") -> Normalisation | tuple[None, None]:
    """(mean, std) of a preprocessing config, if it says both."""
    if not all(isinstance(config.get(key), (list, tuple)) for key in (mean, std)):
        return None, None
    return tuple(float(x) for x in config[mean]), tuple(float(x) for x in config[std])


def _firm(kept: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """`kept`, with what was read; a value that means the same stays as it was put (`mlp` None and four times the width)."""
    merged = dict(kept)
    for key, value in read.items():
        if isinstance(value, Mapping) and isinstance(kept.get(key), Mapping) and kept[key].get("kind") == value.get("kind"):
            merged[key] = _firm(kept[key], value)
        elif key not in kept or _resolved(kept, key) != _resolved(read, key):
            merged[key] = value
    return merged


def _resolved(options: Mapping[str, Any], key: str) -> Any:
    value = options[key]
    if value is None and "width" in options:
        match key:
            case "mlp":
                return 4 * options["width"]
            case "heads":
                return max(1, options["width"] // 64)
            case "class_token":
                return options.get("pool", "token") == "token"
    return list(value) if isinstance(value, tuple) else value
