"""Checkpoints that exist as a whole or not at all, of the newest job alone.

    checkpoints/leases/<generation>.json       a job's right to commit, created conditionally; the newest holds it
    checkpoints/step-<N>/<attempt>/..          what the ranks uploaded, under a prefix nobody used before
    checkpoints/step-<N>/COMMIT.json           created last, conditionally: now the checkpoint exists

Each rank uploads its files and hands rank 0 a receipt for each (name, bytes, sha256); rank 0 commits them. A kill at any moment leaves
either no commit, and a resume takes the one before, or the whole checkpoint. Nothing is decided by time. Listings (never cached) only find
what conditional writes have decided.

A job that takes up a run creates the next lease, in which it names the commits that it found. From then on a commit counts if it is of the
newest generation or named in the newest lease: what an older job, presumed dead, commits late counts for nobody, whatever it believes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pipeline.checkpoint.fragments import Index
from pipeline.checkpoint.lease import Lease, Leases
from pipeline.core.errors import CheckpointError, CredentialsError, StorageError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.upload import Receipt

FORMAT = 3
HISTORY, STATE = "history.jsonl", "state.json"
COMMIT = "COMMIT.json"
_STEP, _ATTEMPT = re.compile(r"step-(\d+)"), re.compile(r"g(\d+)-.*")
_TRIES = 5
_SET_ASIDE = "SET-ASIDE-"  # and the attempt: the commit of a damaged checkpoint
_BAD = (ValueError, LookupError, TypeError, AttributeError)  # of what is no commit
ALL_DAMAGED = "all are damaged and set aside; with --fresh it begins again from where it began"

T = TypeVar("T")


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint after `step` optimiser steps and `samples` samples, written by `world_size` ranks of job `generation`."""

    step: int
    samples: int
    generation: int
    attempt: str
    world_size: int
    zero_stage: int
    view: str  # of the dataset, so that the loader's position means the same
    config: str  # the config's fingerprint
    files: list[Receipt]
    metrics: dict[str, float] = field(default_factory=dict)  # newest validation
    format: int = FORMAT

    @property
    def prefix(self) -> str:
        return f"step-{self.step}/{self.attempt}"


class Checkpoints:
    """The checkpoints of the run at `run`."""

    def __init__(self, run: Storage) -> None:
        self.run, self.directory = run, run / "checkpoints"
        self._leases = Leases(self.directory)

    # Finding

    def commits(self) -> list[Commit]:
        """Those that count, the newest last: in the order of generations, then of steps. One that cannot be read is passed over, loudly.

        Raises:
            CheckpointError: one is of another format.
        """
        return self._counting(self.newest_lease())

    def _counting(self, lease: Lease | None) -> list[Commit]:
        """Those that count where `lease` is the newest."""
        there = _at_once(self._read_or_pass, self._steps_there())
        return sorted((c for c in there if c is not None and _counts(c, lease)), key=lambda c: (c.generation, c.step))

    def _read_or_pass(self, step: int) -> Commit | None:
        try:
            return self._read(step)
        except _Unreadable as e:
            say(f"warning: {e}; it is passed over")
            return None

    def steps(self) -> list[int]:
        """Committed steps in the order of `commits`."""
        return [commit.step for commit in self.commits()]

    def read(self, step: int) -> Commit:
        """Raises CheckpointError where `step` is not committed or its commit is of another format."""
        commit = self._read(step)
        if commit is None or not _counts(commit, self.newest_lease()):
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self._where(step)}: there is no such committed checkpoint (committed steps: {known})")
        return commit

    def has(self, commit: Commit) -> bool:
        """Whether this very attempt is committed, be it that it counts or not."""
        there = self._read_or_pass(commit.step)
        return there is not None and there.attempt == commit.attempt

    def _steps_there(self) -> list[int]:
        return [int(m[1]) for name in self.directory.names() if (m := _STEP.fullmatch(name))]

    def _read(self, step: int) -> Commit | None:
        """None where the step has no commit. One that cannot be read is read again: it may have been damaged on its way."""
        try:
            try:
                return self._parse(step)
            except _BAD:
                return self._parse(step)
        except FileNotFoundError:
            return None
        except _BAD as e:
            raise _Unreadable(f"{self._where(step)}: its {COMMIT} is damaged ({type(e).__name__}: {e})") from e

    def _parse(self, step: int) -> Commit:
        values: dict[str, Any] = json.loads(self.directory.read(f"step-{step}/{COMMIT}"))
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{self._where(step)}: its format is {values.get('format')!r}, this version reads format {FORMAT}")
        return Commit(**{**values, "files": [Receipt(**f) for f in values["files"]]})

    def _where(self, step: int) -> str:
        return f"checkpoint {self.directory.url}/step-{step}"

    # Leases

    def newest_lease(self) -> Lease | None:
        """None where no job has written here."""
        return self._leases.newest()

    def acquire(self, upto: int | None = None) -> Lease:
        """The right to commit, taken from whoever had it. The checkpoints there stay, up to step `upto` where that is given; commits that
        cannot be read are set aside.

        Raises:
            CheckpointError: there were checkpoints, and all were damaged and set aside, now or before; to begin anew is for people to say.
        """
        self._set_aside_unreadable()
        lease = self._leases.take(lambda newest: [(c.step, c.attempt) for c in self._counting(newest) if upto is None or c.step <= upto])
        if not lease.base and self._has_set_aside():
            raise CheckpointError(f"checkpoints of {self.run.url}: {ALL_DAMAGED}")
        try:
            self.directory.abort_uploads("step-")  # what jobs before had in flight; this one has nothing yet
        except (StorageError, CredentialsError) as e:  # another permission, on some stores
            say(f"warning: unfinished uploads of earlier jobs may be left ({e})")
        return lease

    def check_holds(self, lease: Lease) -> None:
        """Raises Fenced where another job has taken up the run since."""
        self._leases.check_holds(lease)

    # Committing

    def commit(self, commit: Commit, lease: Lease) -> Commit:
        """Make the checkpoint exist; gives the commit of this step, which is another one of this job where an earlier attempt at it was
        committed and the answer was lost. May be called again after a StorageError.

        Raises:
            Fenced: another job holds the run. CheckpointError: this step was committed by a job before.
        """
        key, data = f"step-{commit.step}/{COMMIT}", json.dumps(asdict(commit), indent=1).encode()
        self.check_holds(lease)
        for _ in range(_TRIES):
            there = commit if self.directory.create(key, data) else self._read_or_pass(commit.step)
            if there is not None and there.generation == lease.generation:
                self.check_holds(lease)  # taken over in this very moment: the newer lease does not name this commit
                return there
            if there is not None and _counts(there, lease):
                break
            self.check_holds(lease)
            self.directory.remove(key)  # of a job that was presumed dead, and committed after this one had begun; or damaged
        raise CheckpointError(f"{self._where(commit.step)}: this step has been committed already; is this run running twice?")

    def fetch(self, commit: Commit, name: str) -> bytes:
        """A small file of a checkpoint, checked against its receipt.

        Raises:
            CheckpointError: it is missing or differs.
        """
        where = f"checkpoint {self.directory.url}/{commit.prefix}/{name}"
        receipt = next((r for r in commit.files if r.name == name), None)
        if receipt is None:
            raise CheckpointError(f"{where}: is no part of this checkpoint")
        try:
            data = self.directory.read(f"{commit.prefix}/{name}")
        except FileNotFoundError:
            raise CheckpointError(f"{where}: is missing") from None
        if len(data) != receipt.bytes or hashlib.sha256(data).hexdigest() != receipt.sha256:
            raise CheckpointError(f"{where}: is damaged, its bytes differ from its receipt")
        return data

    def indices(self, commit: Commit) -> list[Index]:
        """Of all ranks' files; raises as `fetch`."""
        with ThreadPoolExecutor(16) as pool:
            return [Index.parse(data) for data in pool.map(lambda name: self.fetch(commit, name), index_names(commit))]

    # Setting aside, and removing

    def set_aside(self, commit: Commit, reason: str) -> None:
        """Take a damaged checkpoint out of the way: its commit is renamed, so that resumes pass over it."""
        say(f"warning: {reason}; step {commit.step:,} is set aside and the checkpoint before it is used")
        key = f"step-{commit.step}/{COMMIT}"
        self.directory.write(f"step-{commit.step}/{_SET_ASIDE}{commit.attempt}.json", json.dumps(asdict(commit), indent=1).encode())
        self.directory.remove(key)

    def remove(self, commit: Commit) -> None:
        """The commit goes before its data, so that no reader ever finds a commit without them."""
        self.directory.remove(f"step-{commit.step}/{COMMIT}")
        self.directory.remove(f"step-{commit.step}")

    def _set_aside_unreadable(self) -> None:
        """Take commits out of the way that cannot be read; what belongs to them stays, for somebody may want to look at it."""

        def find(step: int) -> tuple[int, _Unreadable | None]:
            try:
                self._read(step)
            except _Unreadable as e:
                return step, e
            return step, None

        for step, error in _at_once(find, self._steps_there()):
            if error is not None:
                say(f"warning: {error}; the step is set aside")
                data = self.directory.read(f"step-{step}/{COMMIT}")
                for name in self.directory.names(f"step-{step}"):
                    if _ATTEMPT.fullmatch(name):
                        self.directory.write(f"step-{step}/{_SET_ASIDE}{name}.json", data)
                self.directory.remove(f"step-{step}/{COMMIT}")

    def _has_set_aside(self) -> bool:
        found = _at_once(lambda step: self.directory.names(f"step-{step}"), self._steps_there())
        return any(name.startswith(_SET_ASIDE) for names in found for name in names)

    def clear(self) -> None:
        """Remove all checkpoints, and have no job of before commit any. Leases stay: such a job must not take its own for the newest."""
        self._leases.take(lambda newest: [])
        for step in self._steps_there():
            self.directory.remove(f"step-{step}/{COMMIT}")
            self.directory.remove(f"step-{step}")

    def reap(self, lease: Lease, since: int) -> None:
        """Remove what attempts of `lease`'s job and of those before it left behind: what is in no commit that counts, and leases long past.
        Nothing of a newer job; nothing that is being written, for a job has one save in flight, and this follows it; and nothing that was
        set aside at step `since` or later, or has a commit that cannot be read, for somebody may want to look at it."""
        committed = {c.step: c.attempt for c in self.commits()}
        steps = self._steps_there()
        for step, names in zip(steps, _at_once(lambda step: self.directory.names(f"step-{step}"), steps), strict=True):
            if COMMIT in names and step not in committed:
                there = self._read_or_pass(step)
                if there is None or there.generation > lease.generation:
                    continue
                self.directory.remove(f"step-{step}/{COMMIT}")
            if step >= since:
                names = [name for name in names if f"{_SET_ASIDE}{name}.json" not in names]
            attempts = [name for name in names if (m := _ATTEMPT.fullmatch(name)) and int(m[1]) <= lease.generation]
            for name in attempts:
                if committed.get(step) != name:
                    self.directory.remove(f"step-{step}/{name}")
                    self.directory.remove(f"step-{step}/{_SET_ASIDE}{name}.json")
            if step not in committed and not self.directory.names(f"step-{step}"):
                self.directory.remove(f"step-{step}")  # an empty directory, where there are such
        self._leases.reap()


def _at_once(look: Callable[[int], T], steps: Sequence[int]) -> list[T]:
    """What `look` finds at each step, in their order: a store is asked about many together."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(look, steps))


class _Unreadable(CheckpointError):
    """A commit that is there and cannot be read."""


def index_names(commit: Commit) -> list[str]:
    return [r.name for r in commit.files if re.fullmatch(r"rank-\d+-of-\d+\.json", r.name)]


def _counts(commit: Commit, newest: Lease | None) -> bool:
    return newest is None or commit.generation >= newest.generation or (commit.step, commit.attempt) in newest.base
