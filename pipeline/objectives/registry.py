"""Objectives by name."""

from __future__ import annotations

import inspect
from typing import Any

from pipeline.core.errors import ConfigError, choose, nearest
from pipeline.objectives.classify import Classify

OBJECTIVES = {"classify": Classify}


def check_objective(name: str, arguments: dict[str, Any], where: str = "pretrain.objective") -> None:
    """Raises ConfigError for an unknown name, an unknown argument or a value out of range."""
    choose(f"{where}.name", name, OBJECTIVES)
    allowed = list(inspect.signature(OBJECTIVES[name]).parameters)
    for key, value in arguments.items():
        if key not in allowed:
            raise ConfigError(f"{where}.{key}: no such key{nearest(key, allowed)} (allowed: {', '.join(['name', *allowed])})")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{where}.{key}: {value!r} should be a number from 0 up to 1")


def build_objective(name: str, arguments: dict[str, Any]) -> Classify:
    check_objective(name, arguments)
    return OBJECTIVES[name](**arguments)
