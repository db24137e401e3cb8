"""One shard's index as the reader uses it: where its samples are, and how to take one apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.shards.table import ShardRecord

COLUMNS = ["key", "offset", "length", "cls", "crc32", *(f"{m}_{what}" for m in ("image", "txt", "json") for what in ("offset", "length"))]


@dataclass(frozen=True)
class Sample:
    """One sample as the shard holds it; `label` is -1 and `text` empty where there is none."""

    key: str
    image: bytes
    label: int
    text: str
    json: bytes

    @property
    def meta(self) -> dict[str, Any]:
        """What the sample's json member holds: where it came from, and what its source said of it."""
        return json.loads(self.json or b"{}")


class Index:
    """One shard's index, the rows left out by the view taken away."""

    def __init__(self, record: ShardRecord, table: pa.Table, left_out: np.ndarray | None) -> None:
        self.record, self.rows = record, len(table)
        if left_out is not None and len(left_out):
            table = table.take(np.setdiff1d(np.arange(len(table)), left_out))
        self.keys = table["key"].combine_chunks()
        columns = {name: table[name].to_numpy() for name in COLUMNS[1:]}
        self.offset, self.length, self.crc32, self.cls = (columns[name] for name in ("offset", "length", "crc32", "cls"))
        # Where a sample's members begin within it, and their lengths, -1 for none: (rows, 6).
        self.members = np.stack([columns[name] - (self.offset if name.endswith("offset") else 0) for name in COLUMNS[5:]], axis=1)

    def span(self, block: int, size: int) -> tuple[int, int]:
        """Bytes of the tar, from and up to, that hold block number `block`."""
        last = min((block + 1) * size, len(self.offset)) - 1
        return int(self.offset[block * size]), int(self.offset[last] + self.length[last])

    def sample(self, row: int, data: bytes) -> Sample:
        image, image_length, txt, txt_length, json_, json_length = self.members[row].tolist()
        return Sample(
            self.keys[row].as_py(),
            data[image : image + image_length],
            int(self.cls[row]),
            data[txt : txt + txt_length].decode("utf-8", "replace") if txt_length > 0 else "",
            data[json_ : json_ + json_length] if json_length > 0 else b"",
        )
