"""What tests have computed by Ray's workers: those import it by this module's name."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

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
