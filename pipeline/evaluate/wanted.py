"""The scores that a config asks for, each with the fingerprint that tells whether it is there already."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.checkpoint import ModelCard
from pipeline.config import fingerprint
from pipeline.config.schema import Config
from pipeline.core.progress import say
from pipeline.evaluate.protocols import Kind, fine_tune_pixels, has_head, tells_apart
from pipeline.evaluate.results import file_name
from pipeline.evaluate.subject import training_view
from pipeline.evaluate.tasks import Task, fine_tune_seeds

_VERSION = 2  # part of every fingerprint; raise it when a protocol's code changes what it measures

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """One score: `name` is the protocol's, or with its shots ("few-shot/5")."""

    task: Task
    protocol: str
    name: str
    fingerprint: str

    @property
    def file(self) -> str:
        return file_name(self.task.name, self.name)


def list_wanted(config: Config, tasks: list[Task], card: ModelCard, weights: str) -> list[Wanted]:
    """Every score of every task; `weights` is their hash. The model's own head is left out, aloud, where it has none, or where a task
    has other classes than it."""
    assert config.evaluate is not None
    wanted = []
    for task in tasks:
        for protocol in dict.fromkeys(config.evaluate.protocols):
            if protocol == "supervised" and not tells_apart(card, task.classes):
                why = "the classes are not those of the model's head" if has_head(card) else "the model has no head of classes"
                say(f"evaluate     {task.name}: supervised is left out, {why}")
                continue
            for name, settings in _settings(config, protocol, task, card).items():
                wanted.append(Wanted(task, protocol, name, _name(task, card, weights, name, settings)))
    return wanted


def pictures_wanted(config: Config, tasks: list[Task], card: ModelCard, weights: str) -> str | None:
    """The fingerprint of the pictures that the model draws; None where none are asked for."""
    assert config.evaluate is not None
    if not config.evaluate.completions:
        return None
    return _name(tasks[0], card, weights, "pictures", {"completions": config.evaluate.completions, "seed": config.seed})


def _name(task: Task, card: ModelCard, weights: str, name: str, settings: dict[str, Any]) -> str:
    values = {
        "version": _VERSION,
        "model": {"run": card.run, "step": card.step, "weights": weights},
        "data": {"hash": task.hash, "train": task.train, "test": task.test},
        "preprocessing": {
            "view": "shorter side resized, centre cropped",
            "pixels": card.pixels,
            "mean": list(card.mean),
            "std": list(card.std),
            "palette": card.palette,
        },
        "name": name,
        "settings": settings,
    }
    return fingerprint(values)


def _settings(config: Config, protocol: str, task: Task, card: ModelCard) -> dict[str, dict[str, Any]]:
    """Score name -> everything beside model and data that decides its value."""
    assert config.evaluate is not None
    ev = config.evaluate
    match protocol:
        case "supervised":
            return {protocol: {}}
        case "zero-shot":
            return {protocol: {"templates": list(task.templates), "names": task.names or task.classes, "tokenizer": card.tokenizer}}
        case "few-shot":
            return {f"few-shot/{k}": {"shots": k, "seed": config.seed, "seeds": ev.seeds} for k in dict.fromkeys(ev.shots)}
        case "fine-tune":
            view, _ = training_view(config, card)
            pixels = fine_tune_pixels(ev.fine_tune, Kind.of(card))
            how = {**ev.fine_tune.model_dump(mode="json"), "pixels": pixels, "seeds": fine_tune_seeds(config)}
            return {protocol: {**how, "seed": config.seed, "image": view.model_dump(mode="json")}}
        case _:
            return {protocol: {"seed": config.seed}}


def hash_weights(weights: Weights) -> str:
    """64 hex digits over names, shapes and values, so that a run begun anew under the same name is another model."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
