"""The right to commit to a run, which one job holds at a time: whoever took it last.

    leases/<generation>.json      created conditionally, so that of several jobs one gets each generation; the newest holds

No clock decides anything, and nobody gives a lease back: a job that was presumed dead and wakes up finds a newer one.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from pipeline.core.errors import CheckpointError, Fenced, StorageError
from pipeline.core.storage import Storage

LEASES = "leases"
_NAME = re.compile(r"(\d+)\.json")
_KEPT = 20

Base = list[tuple[int, str]]


@dataclass(frozen=True)
class Lease:
    """`base`: the commits, as (step, attempt), that its holder found and goes on from; `token`: no two are the same."""

    generation: int
    owner: str
    base: Base
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


class Leases:
    """Those below `directory`, where a run's checkpoints are."""

    def __init__(self, directory: Storage) -> None:
        self.directory = directory

    def newest(self) -> Lease | None:
        """None where no job has written here. Raises CheckpointError where it cannot be read."""
        names = self._names()
        return self._read(names[-1]) if names else None

    def _read(self, name: str) -> Lease:
        try:
            values = json.loads(self.directory.read(f"{LEASES}/{name}"))
            return Lease(**{**values, "base": [(step, attempt) for step, attempt in values["base"]]})
        except (ValueError, LookupError, TypeError) as e:
            raise CheckpointError(
                f"run {self.directory.url}: its lease {LEASES}/{name} is damaged ({type(e).__name__}: {e}); remove that file, where no job "
                "is at work on this run"
            ) from e

    def take(self, base_of: Callable[[Lease | None], Base]) -> Lease:
        """Create the next lease. `base_of` looks up what there is to go on from where the given lease is the newest."""
        before = newest = self.newest()
        while True:
            base = base_of(before)
            owner = f"{getpass.getuser()}, process {os.getpid()} on {socket.gethostname()}"
            lease = Lease(newest.generation + 1 if newest else 1, owner, base)
            name = f"{lease.generation:06d}.json"
            is_made = self.directory.create(f"{LEASES}/{name}", json.dumps(asdict(lease)).encode())
            if not is_made or self._read(name) != lease:  # another job was faster, or overwrote it where the store ignores the condition
                before = newest = self.newest()
            elif base == base_of(before):
                return lease
            else:  # the job of before committed or removed something in the meantime; it no longer can: once more
                newest = lease

    def check_holds(self, lease: Lease) -> None:
        """Raises Fenced where another job has taken up the run since."""
        newest = self.newest()
        if newest is None or newest.token == lease.token or newest.generation < lease.generation:
            return
        raise Fenced(
            f"run {self.directory.url}: another job ({newest.owner}) has taken it up since this one began, "
            "so what this one trains is no longer saved; it stops"
        )

    def reap(self) -> None:
        """Remove those that are long past."""
        for name in self._names()[:-_KEPT]:
            self.directory.remove(f"{LEASES}/{name}")

    def _names(self) -> list[str]:
        return sorted((name for name in self.directory.names(LEASES) if _NAME.fullmatch(name)), key=lambda name: int(name.split(".")[0]))


def check_conditional(storage: Storage, is_needed: bool) -> None:
    """Raises StorageError where `is_needed` and the store ignores the condition on which leases and commits rest."""
    if is_needed and not storage.is_conditional():
        raise StorageError(
            f"storage: {storage.url} overwrites what it was told not to overwrite, so two jobs of one run could not be told apart; "
            "use another store, or accept that with storage.conditional: false"
        )
