"""What somebody asks of a running job through its run directory, wherever the job runs.

requests/save, requests/stop      an object each, made by whoever asks and removed by the job as it hears of it
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType

from pipeline.core.errors import CredentialsError, StorageError
from pipeline.core.storage import Storage

KINDS = ("save", "stop")
_LOOK_EVERY = 5.0  # seconds


def ask(run: Storage, kind: str) -> None:
    """Ask the job that trains `run` to save ("save"), or to save and end ("stop")."""
    run.write(f"requests/{kind}", b"")


def is_heard(run: Storage, kind: str) -> bool:
    """Whether a job has taken up what was asked."""
    return not run.exists(f"requests/{kind}")


def withdraw(run: Storage, kind: str) -> None:
    """Take back what was asked, so that the next job of the run does not begin with it."""
    run.remove(f"requests/{kind}")


class Requests:
    """Looks for requests beside whatever else goes on, and sets the event of each; a context manager."""

    def __init__(self, run: Storage, events: Mapping[str, threading.Event]) -> None:
        self._directory, self._events = run / "requests", events
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="requests", daemon=True)

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_EVERY):
            try:
                for kind in set(self._directory.names()) & set(self._events):
                    self._events[kind].set()  # first: whoever finds it removed believes that it was heard
                    self._directory.remove(kind)
            except (StorageError, CredentialsError):
                continue  # asked again soon; the saves tell of a store that fails
