"""What hosts ask of robots: robots.txt (RFC 9309) and the header X-Robots-Tag."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from protego import Protego

LONGEST = 500 * 1024  # bytes of a robots.txt that are read; RFC 9309, 2.5
REDIRECTS = 5  # that are followed; RFC 9309, 2.3.1.2
_KEPT = 24 * 3600.0  # seconds; RFC 9309, 2.4
_KEPT_UNREACHABLE = 600.0
_ROOM = 1 << 22  # bytes of robots.txt that are kept parsed (some ten times that in memory)
_GROUP = re.compile(r"\s*user(?:-|\s+)?agent(?:\s*:|\s+)(.*)", re.IGNORECASE)
_NOBODY = "User-agent: ~"
_OWN_COLON = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})  # directives, not names of robots


@dataclass(frozen=True)
class Rules:
    """Of one origin. `reason`: why nothing may be asked of it at all; without one and without `parsed`, everything may."""

    parsed: Protego | None = None
    reason: str | None = None
    size: int = 0

    def refusal(self, url: str, token: str) -> str | None:
        """The reason why `url` may not be asked for, if there is one."""
        if self.reason is not None:
            return self.reason
        return None if self.parsed is None or self.parsed.can_fetch(url, token) else "robots"


def product_token(agent: str) -> str:
    """`tessera` of `tessera/1.0 (+https://..)`: the name that robots.txt knows us by."""
    return re.split(r"[/\s(]", agent, maxsplit=1)[0].lower()


def parse_rules(body: bytes, token: str) -> Rules:
    """Groups of other robots are made one before they are parsed: a file that names thousands of them with thousands of rules takes
    time and memory by the product of both."""
    lines = body[:LONGEST].decode("utf-8-sig", "replace").splitlines()
    if not lines:
        return Rules()
    parsed = Protego.parse("\n".join(_without_others(line, token) for line in lines))
    return Rules(parsed, size=len(body))


def _without_others(line: str, token: str) -> str:
    match = _GROUP.match(line)
    if match is None:
        return line
    name = product_token(match.group(1).partition("#")[0].strip())
    return f"User-agent: {name}" if name in ("*", token) else _NOBODY


class RulesCache:
    """Rules by origin, for a day; those used longest ago give way where their files exceed a few MiB."""

    def __init__(self) -> None:
        self._rules: OrderedDict[str, tuple[Rules, float]] = OrderedDict()
        self._size = 0

    def get(self, origin: str, now: float) -> Rules | None:
        found = self._rules.get(origin)
        if found is None or found[1] <= now:
            return None
        self._rules.move_to_end(origin)
        return found[0]

    def put(self, origin: str, rules: Rules, now: float) -> None:
        self._remove(origin)
        self._rules[origin] = rules, now + (_KEPT if rules.reason is None else _KEPT_UNREACHABLE)
        self._size += _cost(rules)
        while self._size > _ROOM:
            self._remove(next(iter(self._rules)))

    def forget_failures(self) -> None:
        """What could not be read; the next download asks again."""
        for origin in [origin for origin, (rules, _) in self._rules.items() if rules.reason is not None]:
            self._remove(origin)

    def _remove(self, origin: str) -> None:
        found = self._rules.pop(origin, None)
        self._size -= 0 if found is None else _cost(found[0])


def _cost(rules: Rules) -> int:
    return rules.size + 100


def opts_out(headers: Iterable[str], token: str, directives: Collection[str]) -> bool:
    """Whether X-Robots-Tag `headers` hold one of `directives` for everybody, or for the robot `token`.

    A header is a list of directives by commas; `name:` in front of one says whom it and those behind it are meant for.
    """
    for header in headers:
        addressee = "*"
        for part in header.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _OWN_COLON:
                addressee, part = name.strip(), rest
            if part.strip() in directives and addressee in ("*", token):
                return True
    return False
