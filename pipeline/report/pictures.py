"""Samples of a dataset as pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.evaluate import Result
from pipeline.stream import Dataset
from pipeline.stream.decode import decode

_LARGEST = 160  # pixels; larger images are shown smaller, so that the page stays light
_MAGIC = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}


@dataclass(frozen=True)
class Picture:
    """`source` is a data URI; `is_tiny` asks for hard pixel edges. `label` is "" where the sample has none."""

    source: str
    label: str
    is_tiny: bool
    predicted: str = ""
    probability: float = 0.0

    @property
    def is_right(self) -> bool:
        return self.label == self.predicted


def picture(dataset: Dataset, number: int, predicted: str = "", probability: float = 0.0) -> Picture:
    """Raises DataError where the sample is damaged."""
    sample = dataset[number]
    try:
        pixels = Image.fromarray(decode(sample.image).numpy())
    except ValueError as e:
        raise DataError(f"data {dataset.directory.url}: sample {sample.key} cannot be decoded ({e})") from e
    kind, data = _MAGIC.get(sample.image[:2], ""), sample.image
    if max(pixels.size) > _LARGEST or not kind:
        pixels.thumbnail((_LARGEST, _LARGEST))
        sink = io.BytesIO()
        pixels.save(sink, "JPEG", quality=85)
        kind, data = "jpeg", sink.getvalue()
    label = dataset.classes[sample.label] if 0 <= sample.label < len(dataset.classes) else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(source, label, max(pixels.size) <= 64, predicted, probability)


def choose_wrong(predictions: dict[str, list[Any]], count: int) -> list[int]:
    """Rows of the wrong predictions, the surest mistakes first."""
    rows = [i for i, (a, b) in enumerate(zip(predictions["label"], predictions["predicted"], strict=True)) if a != b]
    return sorted(rows, key=lambda i: -predictions["probability"][i])[:count]


def choose_right(predictions: dict[str, list[Any]], count: int) -> list[int]:
    """Rows of right predictions, one of each class in turn."""
    by_class: dict[int, list[int]] = {}
    for i, (a, b) in enumerate(zip(predictions["label"], predictions["predicted"], strict=True)):
        if a == b:
            by_class.setdefault(a, []).append(i)
    turns = max(map(len, by_class.values()), default=0)
    return [rows[t] for t in range(turns) for _, rows in sorted(by_class.items()) if t < len(rows)][:count]


def show(result: Result, dataset: Dataset, rows: Sequence[int]) -> list[Picture]:
    """The test samples of `rows` of a supervised result's predictions."""
    kept = result.details["predictions"]
    numbers = np.flatnonzero(dataset.labels() >= 0)
    return [picture(dataset, int(numbers[i]), dataset.classes[kept["predicted"][i]], kept["probability"][i]) for i in rows]
