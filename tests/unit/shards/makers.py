"""What tests have computed by Ray's workers: those import it by this module's name."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.errors import StorageError
from pipeline.shards.columns import Columns
from pipeline.shards.rows import Row


@dataclass(frozen=True)
class Lengths:
    """Two columns: the width by the image itself, and the length of the caption; `log` gets a line a call."""

    log: str = ""
    pause: float = 0

    def __call__(self, samples: list[Row]) -> list[list[float | None]]:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{len(samples)}\n")
        time.sleep(self.pause)
        widths = [Image.open(io.BytesIO(s.image)).width if s.image else None for s in samples]
        return [widths, [len(s.text) if s.text is not None else None for s in samples]]


def lengths(log: str = "", pause: float = 0, fingerprint: str = "one", batch: int = 7) -> Columns:
    types = {"wide": pa.int32(), "long": pa.float64()}
    return Columns(types, fingerprint, Lengths(log, pause), frozenset({"image", "txt"}), batch)


@dataclass(frozen=True)
class Stutters:
    """The store fails in a call for a shard that has not left a mark yet."""

    marks: str

    def __call__(self, samples: list[Row]) -> list[list[float]]:
        mark = Path(self.marks, samples[0].key)
        if not mark.exists():
            mark.touch()
            raise StorageError("storage: nobody answers")
        return [[1.0] * len(samples)]


def brightness(samples: list[dict[str, Any]]) -> list[float]:
    return [float(sample["image"].mean()) for sample in samples]


def caption_number(samples: list[dict[str, Any]]) -> np.ndarray:
    """The number in `train 17`; nan where there is no caption."""
    return np.array([float(s["caption"].split()[1]) if s["caption"] else np.nan for s in samples])


def described(samples: list[dict[str, Any]]) -> list[float | None]:
    """A number made of all that a sample has; raises where anything is not as it is promised."""
    for sample in samples:
        assert sorted(sample) == ["caption", "image", "json", "key", "label"]
        assert sample["image"].dtype == np.uint8 and sample["image"].ndim == 3 and sample["image"].shape[2] == 3
        assert sample["caption"].split()[1] == str(sample["json"]["n"]) and len(sample["key"]) == 20
    return [None if s["label"] < 0 else s["label"] + s["json"]["n"] / 1000 + 10 * s["image"].shape[1] for s in samples]


def fails_at_thirteen(samples: list[dict[str, Any]]) -> list[float]:
    if any(sample["json"]["n"] == 13 for sample in samples):
        raise RuntimeError("unlucky")
    return [0.0] * len(samples)


def fails_at_many(samples: list[dict[str, Any]]) -> list[float]:
    if len(samples) > 1:
        raise RuntimeError("too many")
    return [0.0]


def too_few(samples: list[dict[str, Any]]) -> list[float]:
    return [0.0] * (len(samples) - 1)


def one_number(samples: list[dict[str, Any]]) -> float:
    return 0.0


def words(samples: list[dict[str, Any]]) -> list[str]:
    return ["1.5"] * len(samples)


def endless(samples: list[dict[str, Any]]) -> list[float]:
    return [float("inf")] * len(samples)
