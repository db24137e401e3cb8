"""What the shard stage has done about copies, to a dataset that is finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.shard import Contamination, Shard
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage
from pipeline.shards.duplicates.contamination import find_contamination
from pipeline.shards.duplicates.find import find_duplicates
from pipeline.shards.manifest import find_manifest


def check_sets(sets: Sequence[Contamination], endpoint: str | None = None, path: str = "shard.contamination.{}") -> None:
    """Preflight: raises ConfigError where an evaluation set is not there, or has no such split."""
    for number, config in enumerate(sets):
        manifest = find_manifest(Storage(config.url, endpoint))
        where = path.format(number)
        if manifest is None:
            raise ConfigError(f"{where}.url: there is no dataset at {config.url} (no manifest.json)")
        if config.split is not None and not manifest.splits.get(config.split):
            raise ConfigError(
                f"{where}.split: {config.split!r} is no split of {config.url} (allowed: {', '.join(sorted(manifest.splits))})"
            )


def treat_copies(directory: Storage, shard: Shard) -> dict[str, float]:
    """Deny what `duplicates` and `contamination` of the config ask for, in the dataset at `directory`, unless that was done. Metrics.

    Raises as `find_duplicates` and `find_contamination`.
    """
    metrics: dict[str, float] = {}
    if shard.duplicates:
        metrics |= _metrics("duplicates", find_duplicates(directory, shard.duplicates, shard.workers))
    if shard.contamination:
        metrics |= _metrics("contamination", find_contamination(directory, shard.contamination, shard.workers))
    return metrics


def _metrics(name: str, audit: dict[str, Any]) -> dict[str, float]:
    return {f"shard/{name}/{kind}": sum(counts[kind] for counts in audit["denied"].values()) for kind in ("exact", "near")}
