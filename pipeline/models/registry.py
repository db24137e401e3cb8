"""Models by name: `create("vit_b16")`, or a family with a size of one's own, `create("vit", width=64, depth=4, ..)`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pipeline.core.errors import ConfigError
from pipeline.models.bit import BiT, BiTOptions
from pipeline.models.caption import Captioner, CaptionOptions
from pipeline.models.clip import CLIP, CLIPOptions
from pipeline.models.igpt import IGPT, IGPTOptions
from pipeline.models.mae import MAE, MAEOptions
from pipeline.models.model import Model
from pipeline.models.options import Options, parse
from pipeline.models.resnet import ResNet, ResNetOptions
from pipeline.models.sizes import LISTED, published
from pipeline.models.vit import VisionTransformer, ViTOptions


class Family(NamedTuple):
    options: type[Options]
    model: type[Model]


FAMILIES: dict[str, Family] = {
    "vit": Family(ViTOptions, VisionTransformer),
    "mae": Family(MAEOptions, MAE),
    "igpt": Family(IGPTOptions, IGPT),
    "clip": Family(CLIPOptions, CLIP),
    "caption": Family(CaptionOptions, Captioner),
    "bit": Family(BiTOptions, BiT),
    "resnet": Family(ResNetOptions, ResNet),
}

# What a config says elsewhere, and the pipeline passes on: resolution, palette and tokenizer, classes of the dataset.
GIVEN = frozenset({"pixels", "classes", "colors", "vocabulary", "context", "masked"})


def model_names() -> list[str]:
    """Families and published models; other patches of published sizes work too (`vit_l8`)."""
    return [*FAMILIES, *LISTED]


def check_model(name: str, options: Mapping[str, Any], where: str = "model") -> Options:
    """The complete options of the model `name`.

    Raises:
        ConfigError: an unknown name or option, or values that do not fit together; begins with the config path `where`.
    """
    if name in FAMILIES:
        family, base = name, dict[str, Any]()
    elif (found := published(name)) is not None and found[0] in FAMILIES:
        family, base = found
    else:
        spelt = name.lower().replace("-", "_").replace("/", "")
        close = difflib.get_close_matches(spelt, model_names(), n=4, cutoff=0.5) or sorted(FAMILIES)
        raise ConfigError(
            f"{where}.name: {name!r} is not known; the nearest are {', '.join(close)} (`python -m pipeline.models` lists all there are)"
        )
    return parse(FAMILIES[family].options, merge(base, options), where, GIVEN)


def create(name: str, *, seed: int | None = None, device: str | torch.device | None = None, **options: Any) -> Model:
    """The model `name`, freshly initialised, in fp32.

    Without options as published: 224 pixels (a CLIP's own), a class token and 1,000 classes; 32 pixels for iGPT. With `seed` the
    weights are the same whatever was drawn before, and the global generator is left alone. `device="meta"` makes shapes without
    numbers, in no time.

    Raises:
        ConfigError: an unknown name (the nearest are named) or option.
    """
    return build(name, check_model(name, options), seed=seed, device=device)


def build(name: str, options: Options, *, seed: int | None = None, device: str | torch.device | None = None) -> Model:
    """The model of options that `check_model(name, ..)` gave."""
    model = FAMILIES[family_of(name)].model
    with torch.device(device if device is not None else torch.get_default_device()):
        if seed is None:
            return model(options)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model(options)


def as_classifier(name: str, options: Mapping[str, Any], *, pixels: int, classes: int) -> Model:
    """What is fine-tuned of a model: itself with one linear layer as its head (arXiv 2010.11929, section 3.2); of a CLIP its image
    tower, of an MAE its encoder, with the mean of the patches and a fresh norm in front of the head, as MAE's own fine-tuning has it.

    Raises:
        ConfigError: it has no such part.
    """
    family, changes = family_of(name), dict[str, Any](pixels=pixels, classes=classes)
    match family:
        case "mae":
            shared = {key: options[key] for key in ("patch", "width", "depth", "heads", "mlp", "eps")}
            return create("vit", **shared, pool="gap", class_token=True, fc_norm=True, **changes)
        case "clip" if options["vision"]["kind"] == "vit":
            tower = {key: value for key, value in options["vision"].items() if key != "kind"}
            return create("vit", **{**tower, "activation": options["activation"], "head_bias": True, **changes})
        case "clip" | "caption":
            raise ConfigError(
                f"evaluate.protocols: fine-tune is not for {name} (allowed for: classifiers, iGPT, MAE, and CLIP with a ViT tower)"
            )
        case "vit":
            return create(name, **{**options, "masked": False, "representation": None, **changes})
        case _:
            return create(name, **{**options, **changes})


def family_of(name: str) -> str:
    """The family of a name that `check_model` accepts."""
    found = published(name)
    return name if found is None else found[0]


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
