"""Models by name: `vit_b16` and its kin, or `vit` with a size of one's own."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import ConfigError, choose, nearest
from pipeline.models.sizes import VIT, VIT_MODELS
from pipeline.models.vit import VisionTransformer


class ViTArguments(BaseModel):
    """What a config may say of a ViT beside its name; a named size fixes the first five."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    patch: int = Field(gt=0)
    mlp: int | None = Field(None, gt=0)
    pool: str = Field("token", pattern="^(token|gap)$")
    dropout: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> ViTArguments:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads ({self.heads})")
        return self


def model_names() -> list[str]:
    return sorted(["vit", *VIT_MODELS])


def check_model(name: str, arguments: dict[str, Any], pixels: int, where: str = "pretrain.model") -> ViTArguments:
    """The complete arguments of the model `name` at an input of `pixels` a side.

    Raises:
        ConfigError: an unknown name or argument, or sizes that do not fit together; begins with the config path `where`.
    """
    choose(f"{where}.name", name, model_names())
    if name in VIT_MODELS:
        size, patch = VIT_MODELS[name]
        arguments = {**VIT[size]._asdict(), "patch": patch, **arguments}
    try:
        checked = ViTArguments.model_validate(arguments)
    except ValidationError as e:
        raise ConfigError("; ".join(_explain(error, where) for error in e.errors())) from None
    if pixels % checked.patch:
        raise ConfigError(f"{where.removesuffix('model')}image.pixels: {pixels} is not a multiple of the patch, {checked.patch} pixels")
    return checked


def build_model(name: str, arguments: dict[str, Any], *, pixels: int, classes: int, seed: int = 0) -> VisionTransformer:
    """A freshly initialised model; the same for the same seed, whatever was drawn before."""
    checked = check_model(name, arguments, pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(pixels=pixels, classes=classes, **{**checked.model_dump(), "mlp": checked.mlp or 4 * checked.width})


def _explain(error: Any, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            names = sorted(ViTArguments.model_fields)
            return f"{where}.{key}: no such key{nearest(key, names)} (allowed: {', '.join(['name', *names])})"
        case "missing":
            return f"{where}.{key}: is missing, a model of one's own size needs it"
        case "value_error":
            return f"{where}.{error['ctx']['error']}"
        case _:
            return f"{where}.{key}: {error['input']!r} {error['msg'].replace('Input should', 'should').lower()}"
