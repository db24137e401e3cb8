"""Stage 1 on Ray: one task a shard, a manifest at the end.

Whatever the number of workers, the result is the same to the last byte: what goes into which shard is planned before
anything starts, and nothing of the machine, the time or the order of arrival is written down.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import Config, fingerprint
from pipeline.config.shard import Shard
from pipeline.core import progress
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.images import Dropped
from pipeline.shards.layout import PlannedShard, plan_shards
from pipeline.shards.manifest import NAMED, Manifest, ShardRecord, dataset_hash, find_manifest, publish
from pipeline.shards.samples import Recipe, Sample, printable, read_samples
from pipeline.shards.sources import FolderSource, Listing, open_source
from pipeline.shards.writer import WrittenShard, write_shard


@dataclass(frozen=True)
class ShardResult:
    """What one task sends back; `named` is the first `NAMED` of its drops, by file."""

    written: WrittenShard | None
    dropped: dict[str, int]
    named: list[dict[str, str]]


def make_dataset(config: Config, directory: Storage) -> tuple[Manifest, dict[str, float]]:
    """Make the dataset that `config.shard` describes at `directory`, or find that it is there already.

    Needs a Ray that is initialised. Returns the manifest and metrics (`shard/read`, `shard/images_per_s`, ..), which are
    empty where the dataset was there already. An unfinished or different dataset at `directory` is replaced.

    Raises:
        UserError: the source or the directory cannot be used, a split is empty, or every sample was dropped.
        InfrastructureError: a machine failed more often than tasks are retried.
    """
    shard = config.shard
    assert shard is not None, "called for a config with a shard section"
    found = find_made(shard, directory)
    if found is not None:
        progress.say(f"shard        the dataset is there already: {found.written:,} samples in {directory.url}")
        return found, {}
    start = time.monotonic()
    source = open_source(shard.source)
    listing = source.scan()
    planned = plan_shards(listing.items, shard.splits, shard.size)
    _clear(directory)
    manifest, shards = _summarise(shard, listing, _write_all(shard, source, listing, planned, directory))
    publish(directory, shards, manifest)
    return manifest, _metrics(manifest, time.monotonic() - start)


def find_made(shard: Shard, directory: Storage) -> Manifest | None:
    """The manifest at `directory` if it is that of the dataset which `shard` describes, made from the same URL."""
    found = find_manifest(directory)
    return found if found is not None and (found.config, found.source) == (dataset_fingerprint(shard), shard.source.url) else None


def dataset_fingerprint(shard: Shard) -> str:
    """Of what decides the bytes; where the images come from and how many workers read them does not."""
    decides = shard.model_dump(mode="json", include={"images", "text", "filter", "splits", "size"})
    return fingerprint({**decides, "source": {"format": shard.source.format, "columns": shard.source.columns}})


def write_planned(planned: PlannedShard, source: FolderSource, recipe: Recipe, classes: list[str], directory: Storage) -> ShardResult:
    """Read, check and write the samples of one shard (the body of a Ray task)."""
    drops: list[dict[str, str]] = []

    def good() -> Iterator[Sample]:
        for item, sample in read_samples(source, planned.samples, recipe, classes):
            if isinstance(sample, Dropped):
                drops.append({"file": printable(item.path), "reason": sample.reason, "detail": sample.detail})
            else:
                yield sample

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata; damaged pixels raise
        written = write_shard(directory, planned.name, planned.split, good(), recipe.images.hash)
    drops.sort(key=lambda d: d["file"])
    return ShardResult(written, dict(Counter(d["reason"] for d in drops)), drops[:NAMED])


def _write_all(shard: Shard, source: FolderSource, listing: Listing, planned: list[PlannedShard], directory: Storage) -> list[ShardResult]:
    """Results in no particular order."""
    jobs, shared = [(len(p.samples), (p,)) for p in planned], (source, Recipe.of(shard), listing.classes, directory)
    results, dropped = list[ShardResult](), Counter[str]()
    from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

    for result in run_tasks("shard", "images", write_planned, jobs, shared, shard.workers, lambda: f"{dropped.total():,} dropped"):
        results.append(result)
        dropped.update(result.dropped)
    return results


def _clear(directory: Storage) -> None:
    """Remove what an unfinished or different dataset left, its manifest first, and find out whether we may write here."""
    directory.remove("manifest.json")
    for name in directory.names():
        if name.endswith((".tar", ".index.parquet")) or name in ("shards.parquet", "deny") or name.startswith(".tmp-"):
            directory.remove(name)
    directory.check_writable()


def _summarise(shard: Shard, listing: Listing, results: list[ShardResult]) -> tuple[Manifest, list[ShardRecord]]:
    written = sorted((r.written for r in results if r.written is not None), key=lambda w: w.record.name)
    dropped: Counter[str] = Counter()
    for result in results:
        dropped.update(result.dropped)
    splits = dict.fromkeys(sorted(shard.splits), 0)
    for one in written:
        splits[one.record.split] += one.record.samples
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
    if not written:
        raise DataError(f"shard.source.url: none of the {len(listing.items)} images in {shard.source.url} can be used ({reasons})")
    for split, count in splits.items():
        if count == 0:
            raise DataError(f"shard.splits.{split}: all of its images were dropped (of the whole source: {reasons})")
    shards = [w.record for w in written]
    named = sorted((d for r in results for d in r.named), key=lambda d: d["file"])
    manifest = Manifest(
        hash=dataset_hash(shards),
        config=dataset_fingerprint(shard),
        source=shard.source.url,
        # Labels from side files have no names but their numbers.
        classes=[printable(c) for c in listing.classes] or [str(n) for n in range(max(w.largest_label for w in written) + 1)],
        splits=splits,
        bytes=sum(s.bytes for s in shards),
        read=len(listing.items),
        written=sum(splits.values()),
        decoded=shard.images.check == "decode",
        ignored=listing.ignored,
        dropped=dict(sorted(dropped.items())),
        dropped_samples=named[:NAMED],
        smallest=(min(w.smallest[0] for w in written), min(w.smallest[1] for w in written)),
    )
    assert manifest.read == manifest.written + sum(manifest.dropped.values()), "every image is written or dropped"
    return manifest, shards


def _metrics(manifest: Manifest, seconds: float) -> dict[str, float]:
    return {
        "shard/read": manifest.read,
        "shard/written": manifest.written,
        "shard/dropped": manifest.read - manifest.written,
        "shard/ignored": manifest.ignored,
        "shard/bytes": manifest.bytes,
        "shard/images_per_s": manifest.read / seconds,
        "shard/seconds": seconds,
        "shard/mb_per_s": manifest.bytes / 1e6 / seconds,
        "shard/success_rate": manifest.written / manifest.read,
        **{f"shard/dropped/{reason}": count for reason, count in manifest.dropped.items()},
    }
