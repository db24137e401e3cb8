"""Scores of samples as columns of the index, and deny-lists of those whose score is out of bounds.

A score is a number a sample. Here it is what a function of the user's own gives; `pipeline.evaluate.scoring` scores by a CLIP model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import fingerprint
from pipeline.config.data import Bound
from pipeline.config.shard import Score
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.functions import load_function, source_hash
from pipeline.core.storage import Storage
from pipeline.shards.columns import Columns, find_columns
from pipeline.shards.deny import DenyListWriter, find_about, holds, list_name, name_for
from pipeline.shards.duplicates.phash import PHASH
from pipeline.shards.manifest import INDEX_SCHEMA, ShardRecord, read_manifest
from pipeline.shards.passes import over_shards
from pipeline.shards.rows import MEMBERS, Row, read_index

_REASONS = {"value": pa.float64()}


@dataclass(frozen=True)
class FunctionScore:
    """Calls a user's function with a list of samples, each a dict:

    `key` its key; `image` its pixels as the loader decodes them, uint8 (H, W, 3), RGB; `caption` its text, None where there is none;
    `json` what its json member holds, a dict; `label` its class, -1 for none.

    The function returns a finite number for each, or None (or nan) where a sample has no score. Samples whose image cannot be decoded
    are not shown to it, and have none. How many samples come in one call is not promised: a score may depend on its own sample alone.
    """

    where: str
    name: str

    def __call__(self, rows: list[Row]) -> list[list[float | None]]:
        shown = [(place, sample) for place, row in enumerate(rows) if (sample := _shown(row)) is not None]
        scores: list[float | None] = [None] * len(rows)
        for (place, _), score in zip(shown, self._ask([sample for _, sample in shown]), strict=True):
            scores[place] = score
        return [scores]

    def _ask(self, samples: list[dict[str, Any]]) -> list[float | None]:
        """Raises DataError that names the function, and the sample where it is one's fault."""
        function = load_function(self.where, self.name)
        if not samples:
            return []
        keys = [sample["key"] for sample in samples]
        try:
            given = function(samples)
        except Exception as e:
            raise DataError(f"{self.where}: {self.name} failed at {_culprit(function, samples, keys)} ({type(e).__name__}: {e})") from e
        try:
            values = list(given)
        except TypeError:
            raise DataError(f"{self.where}: {self.name} returned {_told(given)}, not a number for each sample") from None
        if len(values) != len(keys):
            raise DataError(f"{self.where}: {self.name} returned {len(values)} numbers for {len(keys)} samples, the first {keys[0]}")
        return [self._number(value, key) for value, key in zip(values, keys, strict=True)]

    def _number(self, value: Any, key: str) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number) or isinstance(value, str | bytes):
            raise DataError(f"{self.where}: {self.name} gave {_told(value)} for sample {key} (allowed: a finite number, or None)")
        return None if math.isnan(number) else number


def function_columns(score: Score, where: str) -> Columns:
    """The column of a score by a user's function. It is computed anew where the function's module has changed; what that imports is not
    looked at.

    Raises:
        ConfigError: there is no such function.
    """
    assert score.function is not None, "called for a score by function"
    check_function(score, where)
    source = source_hash(f"{where}.function", score.function) or ""
    made = FunctionScore(f"{where}.function", score.function)
    named = fingerprint({"function": score.function, "source": source})
    return Columns({score.column: pa.float64()}, named, made, MEMBERS, score.batch, score.gpus)


def check_function(score: Score, where: str) -> None:
    """Raises ConfigError where the function of a score is not there."""
    load_function(f"{where}.function", str(score.function))


def check_columns(scores: Sequence[Score], where: str = "shard.scores") -> None:
    """Raises ConfigError for a column that an index has already, or two of one name."""
    taken = dict.fromkeys([*INDEX_SCHEMA.names, PHASH], "every index has this column already")
    for n, score in enumerate(scores):
        if score.column in taken:
            raise ConfigError(f"{where}.{n}.column: {score.column!r} cannot be added, {taken[score.column]}")
        taken[score.column] = f"{where}.{n} has it"


def deny_by_score(directory: Storage, column: str, keep: Bound | None, workers: int | None = None, where: str = "shard.scores") -> int:
    """Publish `deny/score-<column>.parquet` (key, value; of version n of the dataset `score-<column>-v<n>`), the samples whose number in
    `column` is outside of `keep`, or missing, as `data.where` does; how many they are. Without `keep`, such a list is removed, or made
    empty where that of an earlier version would hold. Needs a Ray that is initialised.

    Raises:
        ConfigError: the column was not added to all shards. DataError, StorageError: an index cannot be read.
    """
    manifest = read_manifest(directory)
    name = name_for(f"score-{column}", manifest.version)
    if keep is None:
        directory.remove(list_name(name))
        if holds(directory, f"score-{column}", manifest.version):
            with DenyListWriter(directory, name, _REASONS) as out:
                out.publish({"dataset": manifest.hash, "keep": None})
        return 0
    added = find_columns(directory).get(column)
    if added is None:
        raise ConfigError(f"{where}: the shards in {directory.url} have no column {column!r}; score them first")
    about = {"dataset": manifest.hash, "maker": added["fingerprint"], "keep": keep.model_dump()}
    found = find_about(directory, name)
    if found is not None and about.items() <= found.items():
        return found["keys"]
    with DenyListWriter(directory, name, _REASONS) as out:
        shared = (directory, column, keep)
        for rows in over_shards("deny", directory, _outside, shared, lambda: f"{out.rows:,} denied", workers):
            out.add(rows)
        return out.publish(about)


def _outside(record: ShardRecord, directory: Storage, column: str, keep: Bound) -> pa.Table:
    """Of one shard, as a deny-list has them (the body of a Ray task)."""
    index = read_index(directory, record.index_name)
    values = index[column].to_numpy().astype(np.float64)  # a missing value becomes nan, which no bound admits
    low, high = -math.inf if keep.min is None else keep.min, math.inf if keep.max is None else keep.max
    rows = np.flatnonzero(~((values >= low) & (values <= high)))
    return index.select(["key", column]).rename_columns(["key", "value"]).take(pa.array(rows))


def _shown(row: Row) -> dict[str, Any] | None:
    """A sample as functions see it; None where its image cannot be decoded."""
    from pipeline.stream.decode import decode  # as training does; torch comes with it

    try:
        image = decode(row.image or b"").numpy()
    except ValueError:
        return None
    return {"key": row.key, "image": image, "caption": row.text, "json": json.loads(row.json or b"{}"), "label": row.label}


def _culprit(function: Callable[[list[dict[str, Any]]], Any], samples: list[dict[str, Any]], keys: list[str]) -> str:
    """The first sample with which alone the function fails too."""
    for sample in samples:
        try:
            function([sample])
        except Exception:  # noqa: BLE001  somebody else's function, which has been heard already
            return f"sample {sample['key']}"
    return f"{len(keys)} samples together, from {keys[0]} on, and at none of them alone"


def _told(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
