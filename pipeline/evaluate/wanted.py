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
from pipeline.evaluate.results import file_name
from pipeline.evaluate.tasks import Task, fine_tune_pixels, fine_tune_seeds

_VERSION = 1  # part of every fingerprint; raise it when a protocol's code changes what it measures

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


def list_wanted(config: Config, tasks: list[Task], card: ModelCard, weights: Weights) -> list[Wanted]:
    """Every score of every task. The model's own head is left out, aloud, where a task has other classes than it."""
    assert config.evaluate is not None
    model = {"run": card.run, "step": card.step, "weights": hash_weights(weights)}
    view = {"view": "shorter side resized, centre cropped", "pixels": card.pixels, "mean": list(card.mean), "std": list(card.std)}
    wanted = []
    for task in tasks:
        data = {"hash": task.hash, "train": task.train, "test": task.test}
        for protocol in dict.fromkeys(config.evaluate.protocols):
            if protocol == "supervised" and task.classes != card.classes:
                say(f"evaluate     {task.name}: supervised is left out, the classes are not those of the model's head")
                continue
            for name, settings in _settings(config, protocol).items():
                values = {"version": _VERSION, "model": model, "data": data, "preprocessing": view, "name": name, "settings": settings}
                wanted.append(Wanted(task, protocol, name, fingerprint(values)))
    return wanted


def _settings(config: Config, protocol: str) -> dict[str, dict[str, Any]]:
    """Score name -> everything in the config that decides its value."""
    assert config.evaluate is not None and config.pretrain is not None
    ev = config.evaluate
    match protocol:
        case "supervised":
            return {protocol: {}}
        case "few-shot":
            return {f"few-shot/{k}": {"shots": k, "seed": config.seed, "seeds": ev.seeds} for k in dict.fromkeys(ev.shots)}
        case "fine-tune":
            how = {**ev.fine_tune.model_dump(mode="json"), "pixels": fine_tune_pixels(config), "seeds": fine_tune_seeds(config)}
            return {protocol: {**how, "seed": config.seed, "image": config.pretrain.image.model_dump(mode="json")}}
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
