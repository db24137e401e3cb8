"""What is known of hosts.

Each has manners: how many requests at once (one at first, one more with each answer up to the config's `per_host`, half after an answer
that says "too many"), how far apart, and until when it wants to be left alone.

A host is a name, whatever the port: http and https are one site, other ports one machine, and what may be asked of "one host" is a promise
to whoever runs it. Whether anybody listens is a matter of each port, since an old port 80 that is closed says nothing of 443. (robots.txt
is of an origin, RFC 9309, 2.3.)

A host or port that was given up gets another chance after a minute: one request or a few, and if these fail, it is given up for twice as
long, in the end for ten minutes, until it answers. All of this is remembered from one list of URLs to the next, as long as the process
lives; so what becomes of a host that fails at times depends on when it is asked, and of one that always answers the same it does not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

PAUSE = 1.0  # seconds: the first pause; each further one is twice as long
STRIKES = 8  # pauses in a row after which a host is overloaded still, and is given up
FAILURES = 6  # pauses in a row after which no connection can be made, or a host that never answered does not, and is given up
_FAILURE_PAUSE = 4.0  # seconds, the longest of these pauses
_GIVEN_UP, _GIVEN_UP_MOST = 60.0, 600.0  # seconds, at first and at most
_MANY = 100_000  # hosts that are remembered between two lists of URLs, some 55 MB


def backoff(times: int, most: float) -> float:
    """Seconds to wait after the `times`-th failure in a row (1, 2, ..): doubling, by chance up to a half more or less, at most `most`."""
    return min(most, PAUSE * 2.0 ** min(times - 1, 30) * random.uniform(0.5, 1.5))


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None where it says neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class _Reason(NamedTuple):
    """Why nothing is asked for now."""

    reason: str
    until: float


@dataclass(slots=True)
class _Port:
    """`answered`: in this list of URLs."""

    answered: bool = False
    failures: int = 0
    given_up: _Reason | None = None


class Host:
    """One host's manners. Times are the loop's, in seconds."""

    __slots__ = ("_given_up", "_paused_until", "_ports", "_strikes", "at_once", "not_before")

    def __init__(self) -> None:
        self.at_once = 1  # requests
        self.not_before = 0.0  # the next request
        self._strikes = 0
        self._paused_until = 0.0
        self._given_up: _Reason | None = None
        self._ports: dict[int, _Port] = {}

    def begin(self) -> None:
        """Another list of URLs has some of it."""
        for port in self._ports.values():
            port.answered = False

    def given_up(self, port: int, now: float) -> str | None:
        """The reason why nothing is asked of this port for now."""
        for given_up in (self._given_up, self._port(port).given_up):
            if given_up is not None and now < given_up.until:
                return given_up.reason
        return None

    def answer(self, port: int, per_host: int) -> None:
        """It answered, and was not overloaded."""
        self._heard(port)
        self._given_up, self._strikes = None, 0
        self.at_once = min(per_host, self.at_once + 1)

    def overloaded(self, port: int, reason: str, wait: float | None, patience: float, now: float) -> None:
        """It said so, and asked to `wait`. Answers to what was under way when it first said so change nothing more."""
        self._heard(port)
        if now < self._paused_until or self.given_up(port, now) is not None:
            return
        self._strikes += 1
        if self._strikes >= STRIKES:
            self._given_up = _Reason(reason, now + max(wait or 0.0, _pause_of(self._strikes - STRIKES)))
            self.at_once = 1
        else:
            self._pause(now + (backoff(self._strikes, patience) if wait is None or wait > patience else wait))
            self.at_once = max(1, self.at_once // 2)

    def no_answer(self, port: int, reason: str, connected: bool, now: float) -> None:
        """`connected`: it took the connection at least. If it ever answered, that it does not answer for one URL says nothing of others."""
        silent = self._port(port)
        if (connected and silent.answered) or now < self._paused_until or self.given_up(port, now) is not None:
            return
        silent.failures += 1
        if silent.failures >= FAILURES:
            silent.given_up = _Reason(reason, now + _pause_of(silent.failures - FAILURES))
            self.at_once = 1
        else:
            self._pause(now + backoff(silent.failures, _FAILURE_PAUSE))

    def forget_silence(self) -> None:
        self._ports.clear()

    def is_plain(self, now: float) -> bool:
        """Whether there is nothing to remember of it."""
        return now >= self.not_before and not self._strikes and not any(port.failures for port in self._ports.values())

    def _port(self, number: int) -> _Port:
        port = self._ports.get(number)
        if port is None:
            port = self._ports[number] = _Port()
        return port

    def _heard(self, number: int) -> None:
        port = self._port(number)
        port.answered, port.failures, port.given_up = True, 0, None

    def _pause(self, until: float) -> None:
        self._paused_until = until
        self.not_before = max(self.not_before, until)


def _pause_of(chances: int) -> float:
    """Seconds for which a host is given up that failed when it had `chances` to answer."""
    return min(_GIVEN_UP_MOST, _GIVEN_UP * 2.0 ** min(chances, 30))


class Hosts:
    """All hosts by name, those last that were begun last."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def begin(self, name: str) -> Host:
        """The host, of which a list of URLs has some; for the first of them."""
        host = self._hosts.pop(name, None) or Host()
        host.begin()
        self._hosts[name] = host
        return host

    def forget(self, now: float) -> None:
        """Between two lists, where there are many: those that ask nothing of us, and of the others those that nobody wanted for longest."""
        if len(self._hosts) > _MANY:
            kept = [(name, host) for name, host in self._hosts.items() if not host.is_plain(now)]
            self._hosts = dict(kept[-_MANY:])

    def forget_silence(self) -> None:
        """That hosts did not answer."""
        for host in self._hosts.values():
            host.forget_silence()
