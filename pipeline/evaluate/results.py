"""What an evaluation yields: one `Result` a score, kept as one JSON file each in `<run>/evaluation/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.core.storage import Storage
from pipeline.evaluate.features import Features
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.statistics import accuracy_interval, seeds_interval
from pipeline.evaluate.tasks import Task, slug

DIRECTORY = "evaluation"


@dataclass(frozen=True)
class Result:
    """`value`, `low` and `high` are fractions; `low` to `high` is the 95% interval, `details["interval"]` says which kind.

    `name` is the protocol's, with the number of shots where there is one ("few-shot/5"); `n` counts test images;
    `values` holds the score of each seed; `fingerprint` names weights, data, preprocessing and settings.
    """

    name: str
    suite: str
    protocol: str
    value: float
    low: float
    high: float
    n: int
    values: list[float]
    seconds: float
    fingerprint: str
    metric: str = "top1"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return file_name(self.suite, self.name)


def file_name(suite: str, name: str) -> str:
    return f"{DIRECTORY}/{slug(suite)}-{slug(name)}.json"


def make_result(
    name: str, task: Task, correct: Sequence[int], n: int, *, seconds: float, fingerprint: str, details: dict[str, Any] | None = None
) -> Result:
    """The result of `correct` hits among `n` test images, one count a seed."""
    values = [c / n for c in correct]
    if len(values) == 1:
        kind, value, (low, high) = "Clopper-Pearson over the test images", values[0], accuracy_interval(correct[0], n)
    else:
        kind, (value, low, high) = f"Student t over {len(values)} seeds", seeds_interval(values)
    details = {"classes": len(task.classes), "interval": kind, **(details or {})}
    return Result(name, task.name, name.partition("/")[0], value, low, high, n, values, seconds, fingerprint, details=details)


def predictions(found: Features, probabilities: np.ndarray) -> dict[str, list[Any]]:
    """For a result's details: of each image of `found` its key, label, likeliest class and that one's probability."""
    return {
        "key": found.keys,
        "label": found.labels.tolist(),
        "predicted": probabilities.argmax(axis=1).tolist(),
        "probability": [round(float(p), 4) for p in probabilities.max(axis=1)],
    }


def write_result(run: Storage, result: Result) -> None:
    run.write(result.file, (json.dumps(asdict(result), ensure_ascii=False) + "\n").encode())


def find_result(run: Storage, file: str) -> Result | None:
    """The result kept in `file`, or None where there is none that this version can read."""
    try:
        return Result(**json.loads(run.read(file)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def read_results(run: Storage) -> list[Result]:
    """All results of a run: by suite, then in the order of the protocols."""
    files = [f"{DIRECTORY}/{name}" for name in run.names(DIRECTORY) if name.endswith(".json")]
    return in_order([r for file in files if (r := find_result(run, file))])


def in_order(results: Iterable[Result]) -> list[Result]:
    protocols = list(PROTOCOLS)

    def place(result: Result) -> tuple[str, int, str, int]:
        known = protocols.index(result.protocol) if result.protocol in protocols else len(protocols)
        shots = result.name.partition("/")[2]
        return result.suite, known, result.protocol, int(shots) if shots.isdigit() else 0

    return sorted(results, key=place)


def metric_values(results: Iterable[Result]) -> dict[str, float]:
    """Names and values for tracking: `evaluate/digits/few-shot-5/top1`, and the interval's `../low` and `../high`."""
    values: dict[str, float] = {}
    for r in results:
        prefix = f"evaluate/{slug(r.suite)}/{slug(r.name)}"
        values |= {f"{prefix}/{r.metric}": r.value, f"{prefix}/low": r.low, f"{prefix}/high": r.high}
    return values
