"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.checkpoint.commit import Checkpoints, Commit, Lease
from pipeline.config.pretrain import Pretrain


@dataclass(frozen=True)
class Retention:
    """The newest `keep`; the first at or after each multiple of `permanent` steps, for ever; the best by the validation metric `best`, such
    as `validate/loss`, the smallest or, where `is_higher_better`, the largest."""

    keep: int
    permanent: int | None = None
    best: str | None = None
    is_higher_better: bool = False


def retention_of(p: Pretrain, samples_an_epoch: int) -> Retention:
    """As a config has it."""
    save = p.save
    return Retention(
        save.keep,
        save.permanent.steps(p.batch, samples_an_epoch) if save.permanent else None,
        save.best.metric if save.best else None,
        save.best is not None and save.best.is_higher_better,
    )


def to_keep(commits: Sequence[Commit], retention: Retention) -> set[int]:
    """Steps of those of `commits`, the newest last, that stay."""
    kept = {c.step for c in commits[-retention.keep :]}
    if retention.permanent:
        first: dict[int, int] = {}  # of each multiple: saves go by time, or wait for the one before, and seldom fall on one
        for commit in commits:
            multiple = commit.step // retention.permanent
            first[multiple] = min(first.get(multiple, commit.step), commit.step)
        kept |= {step for multiple, step in first.items() if multiple > 0}
    if retention.best:
        sign = -1 if retention.is_higher_better else 1
        measured = [(sign * c.metrics.get(retention.best, math.nan), c.step) for c in commits]
        if finite := [m for m in measured if math.isfinite(m[0])]:
            kept.add(min(finite)[1])  # of those since a validation the first, which is next to what was measured
    return kept


def retain(checkpoints: Checkpoints, lease: Lease, retention: Retention) -> None:
    """Remove the checkpoints that do not stay, and what attempts that came to nothing left behind. To be called after a commit, by the
    job that holds `lease`: nothing of a newer job is touched.

    Raises:
        Fenced: another job holds the run.
    """
    commits = checkpoints.commits()
    kept = to_keep(commits, retention)
    checkpoints.check_holds(lease)  # what a newer job goes on from is not ours to remove
    for commit in commits:
        if commit.step not in kept and commit.generation <= lease.generation:
            checkpoints.remove(commit)
    checkpoints.reap(lease, since=min((c.step for c in commits[-retention.keep :]), default=0))
