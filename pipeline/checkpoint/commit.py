"""Checkpoints that exist as a whole or not at all.

    checkpoints/step-<N>/<attempt>/..      what the ranks wrote, under a prefix nobody used before
    checkpoints/step-<N>/COMMIT.json       created last, by one conditional write: now the checkpoint exists

Each rank uploads its files and hands rank 0 a receipt for each (key, bytes, sha256); rank 0 commits them. A kill at any
moment leaves either no commit, and a resume takes the one before, or the whole checkpoint. Nothing is decided by
listing files or by time. A commit whose bytes do not match its receipts is set aside, and the one before is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.core.progress import say
from pipeline.core.storage import Storage

FORMAT = 2
HISTORY = "history.jsonl"
LOADER = "loader.json"


@dataclass(frozen=True)
class Receipt:
    """One uploaded file: `name` below the attempt's prefix."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint after `step` optimiser steps and `samples` samples, written by `world_size` ranks."""

    step: int
    samples: int
    attempt: str
    world_size: int
    zero_stage: int
    view: str  # of the dataset, so that the loader's position means the same
    files: list[Receipt]
    format: int = FORMAT


class Checkpoints:
    """The checkpoints of the run at `run`."""

    def __init__(self, run: Storage) -> None:
        self.directory = run / "checkpoints"

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        steps = sorted(int(m[1]) for name in self.directory.names() if (m := re.fullmatch(r"step-(\d+)", name)))
        return [s for s in steps if self.directory.exists(f"step-{s}/COMMIT.json")]

    def read(self, step: int) -> Commit:
        """Raises CheckpointError where `step` is not committed or its commit is of another format."""
        where = f"checkpoint {self.directory.url}/step-{step}"
        try:
            values: dict[str, Any] = json.loads(self.directory.read(f"step-{step}/COMMIT.json"))
        except FileNotFoundError:
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{where}: there is no such committed checkpoint (committed steps: {known})") from None
        except ValueError as e:
            raise CheckpointError(f"{where}: its COMMIT.json is not JSON ({e})") from e
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{where}: its format is {values.get('format')!r}, this version reads format {FORMAT}")
        return Commit(**{**values, "files": [Receipt(**f) for f in values["files"]]})

    def upload(self, step: int, attempt: str, name: str, local: Path) -> Receipt:
        self.directory.put(local, f"step-{step}/{attempt}/{name}")
        return Receipt(name, local.stat().st_size, _sha256(local))

    def commit(self, commit: Commit) -> None:
        """Make the checkpoint exist. Raises CheckpointError where another writer committed this step."""
        data = json.dumps(asdict(commit), indent=1).encode()
        if not self.directory.create(f"step-{commit.step}/COMMIT.json", data):
            raise CheckpointError(
                f"checkpoint {self.directory.url}/step-{commit.step}: another job has committed this step; is this run running twice?"
            )

    def fetch(self, commit: Commit, into: Path, names: set[str] | None = None) -> None:
        """Copy a checkpoint's files (or those named) below `into`, checking each against its receipt.

        Raises:
            CheckpointError: a file is missing or differs.
        """
        for receipt in commit.files:
            if names is not None and receipt.name not in names:
                continue
            where = f"checkpoint {self.directory.url}/step-{commit.step}/{commit.attempt}/{receipt.name}"
            local = into / receipt.name
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.directory.get(f"step-{commit.step}/{commit.attempt}/{receipt.name}", local)
            except FileNotFoundError:
                raise CheckpointError(f"{where}: is missing") from None
            if local.stat().st_size != receipt.bytes or _sha256(local) != receipt.sha256:
                raise CheckpointError(f"{where}: is damaged, its bytes differ from its receipt")

    def newest_sound(self) -> Commit | None:
        """The newest checkpoint, all of whose bytes are those of its receipts; damaged ones are set aside on the way."""
        for step in reversed(self.steps()):
            commit = self.read(step)
            with tempfile.TemporaryDirectory(prefix="tessera-verify-") as local:
                try:
                    self.fetch(commit, Path(local))
                    return commit
                except CheckpointError as e:
                    self.set_aside(commit, str(e))
        return None

    def set_aside(self, commit: Commit, reason: str) -> None:
        """Take a damaged checkpoint out of the way: its commit is renamed, so that resumes pass over it; nothing is lost."""
        say(f"warning: {reason}; step {commit.step} is set aside and the checkpoint before it is used")
        self.directory.write(f"step-{commit.step}/SET-ASIDE-{commit.attempt}.json", self.directory.read(f"step-{commit.step}/COMMIT.json"))
        self.directory.remove(f"step-{commit.step}/COMMIT.json")

    def retain(self, keep: int) -> None:
        """Remove all but the newest `keep` committed checkpoints, and what dead attempts left behind them.

        A commit goes before its data, so that no reader ever finds a commit without them.
        """
        committed = self.steps()
        if not committed:
            return
        for step in committed[:-keep]:
            self.directory.remove(f"step-{step}/COMMIT.json")
        for name in self.directory.names():
            match = re.fullmatch(r"step-(\d+)", name)
            if match and int(match[1]) < committed[-1] and int(match[1]) not in committed[-keep:] and not self._is_set_aside(name):
                self.directory.remove(name)

    def _is_set_aside(self, name: str) -> bool:
        return any(n.startswith("SET-ASIDE-") for n in self.directory.names(name))


def read_history(run: Storage) -> list[dict[str, float]]:
    """The recorded metrics of a run up to its newest checkpoint, a row a record; empty where there is no checkpoint.

    They are part of the checkpoint, so a row of a step that a resume repeats is never there twice.
    """
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    if not steps:
        return []
    commit = checkpoints.read(steps[-1])
    text = checkpoints.directory.read(f"step-{commit.step}/{commit.attempt}/{HISTORY}")
    return [json.loads(line) for line in text.splitlines()]


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
