"""Between the workers of a group and the process that started it. A file of its own: the process that it runs in imports no engine."""

from __future__ import annotations

from collections import Counter

from pipeline.core.errors import TesseraError
from pipeline.core.progress import Event


class Relay:
    """Carries what the workers say to the process that the person looks at, what it asks of them, and an error that no restart would
    mend."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: TesseraError | None = None
        self._seconds: dict[str, float] = {}
        self._asked: Counter[str] = Counter()
        self._nodes: list[str] = []
        self._is_finished = False

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def fail(self, error: TesseraError) -> None:
        self._error = self._error or error

    def error(self) -> TesseraError | None:
        return self._error

    def finish(self, seconds: dict[str, float], is_finished: bool) -> None:
        self._seconds, self._is_finished = seconds, is_finished

    def is_finished(self) -> bool:
        return self._is_finished

    def seconds(self) -> dict[str, float]:
        return self._seconds

    def ask(self, what: str) -> None:
        """`what` is the name of one of the `Signals`."""
        self._asked[what] += 1

    def asked(self) -> dict[str, int]:
        """How often each was asked for; nothing is forgotten here, since a reply may be lost on its way."""
        return dict(self._asked)

    def join(self, node: str) -> None:
        """A worker runs on the machine of this Ray id."""
        self._nodes.append(node)

    def nodes(self) -> list[str]:
        """One a worker that has begun."""
        return self._nodes
