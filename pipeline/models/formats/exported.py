"""What all exports share: what is written, what a format can express, and the ViT inside an MAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.models.formats.imported import NOTE
from pipeline.models.formats.lazy import Lazy
from pipeline.models.mae import MAEOptions
from pipeline.models.model import Model
from pipeline.models.options import Options
from pipeline.models.positions import sincos_2d
from pipeline.models.registry import FAMILIES
from pipeline.models.vit import ViTOptions


@dataclass(frozen=True)
class Seen:
    """How a model sees images, and what its classes are called, where this is known."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: list[str] | None = None


@dataclass(frozen=True)
class Exported:
    """`tensors` go to the safetensors file `weights`, or to several where readers of the format know that (`has_parts`); `configs` to JSON
    files by name, the last of which says what all this is."""

    weights: str
    tensors: dict[str, Lazy]
    configs: dict[str, dict[str, Any]]
    has_parts: bool = False


def family(model: Model) -> str:
    return next(name for name, kind in FAMILIES.items() if type(model) is kind.model)


def require(target: str, options: Options, where: str = "", /, **expected: Any) -> None:
    """Raises ConfigError for the first of `options` that differs from what the format has alone."""
    for key, value in expected.items():
        if (given := getattr(options, key)) != value:
            raise ConfigError(
                f"{target}: cannot express {where}{key}: {given} (it has {value} alone), export to another format or keep our own"
            )


def refuse(target: str, what: str, has: str) -> ConfigError:
    return ConfigError(f"{target}: has no {what} (it has {has})")


def note(name: str, options: Options) -> dict[str, Any]:
    """For the config: what is no part of the format, such as dropout, so that importing gives the same model."""
    return {NOTE: {"family": name, "options": options.model_dump(mode="json")}}


def vit_state(options: ViTOptions, state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A ViT's state, fixed positions written out as if they were learned."""
    if options.positions != "sincos-2d":
        return dict(state)
    return {**state, "pos_embed": Lazy.of(sincos_2d(options.side, options.width, options.tokens))}


def encoder(options: MAEOptions, state: Mapping[str, Lazy]) -> tuple[ViTOptions, dict[str, Lazy]]:
    """An MAE's encoder as a ViT without a head, for formats without the decoder."""
    kept = {key: getattr(options, key) for key in ("pixels", "patch", "width", "depth", "heads", "mlp", "eps")}
    return ViTOptions(classes=0, **kept), {name: t for name, t in state.items() if not name.startswith(("decoder_", "mask_token"))}
