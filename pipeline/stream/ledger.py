"""Samples that could not be read, and what stood in for them; and global batches that training could not use: kept with the checkpoint,
replayed on resume.

A bad sample at position p is replaced by another sample of its dataset, drawn from (seed, epoch, sample) alone, so any
rank that meets it takes the same. What is in the ledger is replaced without being tried again: a fault that has passed
meanwhile does not change what an unbroken run would have seen.

A global batch is skipped in one of two ways. Its update was left out, since loss or gradient was no finite number: it is part of the run,
and what comes after it stands where it would have stood. Or training went back to a checkpoint and passed it over: then the step that
would have had it takes a later batch, and a step's position is no longer the step times the batch (`Ledger.position`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import DataError
from pipeline.stream.random import Random

REASONS = {
    "missing": "the shard or its index is gone",
    "index": "the shard's index is damaged",
    "truncated": "the shard ends before the sample does",
    "checksum": "the bytes are not those the index names",
    "undecodable": "the bytes are as indexed, and no readable image",
}
_ATTEMPTS = 100  # replacements that are bad too, before giving up
_GRACE = 10_000  # a fraction of fewer samples than these means little: one stripe of a lost shard would be too much
_SALT = 0x7E55E7A


class BadSample(Exception):
    """A sample that stays unreadable after retries; `reason` is one of `REASONS`."""

    def __init__(self, shard: str, key: str, reason: str, detail: str) -> None:
        super().__init__(shard, key, reason, detail)
        self.shard, self.key, self.reason, self.detail = shard, key, reason, detail

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {REASONS[self.reason]} ({self.detail})"


@dataclass(frozen=True)
class Replacement:
    """At `position` of the whole sequence, sample `number` of dataset `dataset` gave way to sample `by`."""

    position: int
    dataset: int
    number: int
    by: int
    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Skip:
    """Of the whole sequence, the positions from `first` up to `last` did not train the model: what step `step` met there is the `reason`.

    `is_passed`: they were passed over, all of them, as training went back and on with what follows; else they are those of `step`, whose
    update was left out. `suspects` are the parts of them, from and up to, whose own loss was no finite number, and `keys` names their
    samples where these are few.
    """

    first: int
    last: int
    step: int
    reason: str
    is_passed: bool = False
    suspects: tuple[tuple[int, int], ...] = ()
    keys: tuple[str, ...] = ()

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Skip:
        suspects = tuple((first, last) for first, last in values["suspects"])
        return Skip(**{**values, "suspects": suspects, "keys": tuple(values["keys"])})


def substitutes(seed: int, epoch: int, number: int, size: int) -> Iterator[int]:
    """Sample numbers to try in place of `number`, the same for everybody."""
    random = Random(seed, epoch, number, _SALT)
    return (random.integer(size) for _ in range(_ATTEMPTS))


class Ledger:
    """The replacements so far, and the batches skipped, in the order of training. `limit` is the largest fraction of samples that may be
    replaced."""

    def __init__(self, entries: Iterable[Replacement] = (), limit: float = 1.0, skips: Iterable[Skip] = ()) -> None:
        self.limit = limit
        self._entries = {e.position: e for e in entries}
        self._unmerged: list[Replacement] = []
        self.skips = sorted(skips, key=lambda skip: (skip.first, not skip.is_passed))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Replacement]:
        return iter(sorted(self._entries.values(), key=lambda e: e.position))

    def at(self, position: int) -> Replacement | None:
        return self._entries.get(position)

    def add(self, replaced: Sequence[Replacement], consumed: int) -> None:
        """Take over what this rank replaced, when all ranks together have consumed `consumed` samples.

        Raises:
            DataError: more were replaced than the limit allows; this rank knows at least its own.
        """
        new = [r for r in replaced if self._entries.get(r.position) != r]
        self._entries |= {r.position: r for r in new}
        self._unmerged += new
        if new:
            self._check(len(self), consumed, new[-1])

    # Skipped batches

    def skip(self, skip: Skip) -> None:
        """All ranks alike. What is passed over takes the place of ranges passed over before that lie within it."""
        kept = [s for s in self.skips if not (skip.is_passed and s.is_passed and skip.first <= s.first and s.last <= skip.last)]
        self.skips = sorted([*kept, skip], key=lambda skip: (skip.first, not skip.is_passed))

    def passed(self, upto: int) -> int:
        """Positions before `upto` that were passed over."""
        return sum(min(s.last, upto) - s.first for s in self.skips if s.is_passed and s.first < upto)

    def position(self, trained: int) -> int:
        """Where the samples go on that a run trains on, after `trained` of them and those passed over among them."""
        at = trained
        for s in self.skips:
            if s.is_passed and s.first <= at:
                at += s.last - s.first
        return at

    def unmerged(self) -> list[Replacement]:
        """What this rank has replaced since the last merge."""
        return self._unmerged

    def merge(self, ranks: Iterable[Sequence[Replacement]], consumed: int) -> list[Replacement]:
        """Take over what all ranks replaced, so that the ledger is the same on each; gives that, in order.

        Raises:
            DataError: of `consumed` samples more were replaced than the limit allows.
        """
        new = sorted((r for rank in ranks for r in rank), key=lambda r: r.position)
        self._entries |= {r.position: r for r in new}
        self._unmerged = []
        if new:
            self._check(len(self), consumed, new[-1])
        return new

    def _check(self, replaced: int, seen: int, last: Replacement) -> None:
        if replaced > self.limit * max(seen, _GRACE):
            raise DataError(
                f"pretrain.loader.bad: {replaced} of {seen} samples could not be read, more than the allowed fraction "
                f"{self.limit:g}; the last is sample {last.key} in {last.shard}: {REASONS[last.reason]} ({last.detail})"
            )

    def as_values(self) -> list[dict[str, Any]]:
        return [asdict(e) for e in self]

    def skips_as_values(self) -> list[dict[str, Any]]:
        return [asdict(s) for s in self.skips]

    @staticmethod
    def from_values(values: Iterable[Mapping[str, Any]], limit: float = 1.0, skips: Iterable[Mapping[str, Any]] = ()) -> Ledger:
        return Ledger((Replacement(**v) for v in values), limit, map(Skip.from_values, skips))
