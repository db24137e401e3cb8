"""What comes of a URL: an image's bytes, or one of a few reasons. A reason has always the same words, so that what is written down about a
URL depends on what its host answered, and not on when or how often it was asked."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.shards.images import Dropped

# Beside these, `http-404` and its like: `http_reason`.
REASONS = {
    "bad-url": "this is no http or https URL",
    "forbidden-address": "the host's address is private, loopback, link-local or otherwise not of the public internet",
    "dns": "the host's name could not be resolved",
    "refused": "the host refuses connections",
    "unreachable": "there is no way to the host",
    "tls": "the host's certificate or encryption is not to be trusted",
    "reset": "the connection ended before there was an answer",
    "truncated": "the connection ended in the middle of the answer",
    "timeout": "the host did not answer in time",
    "bad-http": "the answer is not HTTP",
    "bad-encoding": "the answer's compression is damaged",
    "robots": "the host's robots.txt forbids it, or cannot be read",
    "opted-out": "the host's X-Robots-Tag forbids this use",
    "redirect-loop": "the URL redirects to itself",
    "too-many-redirects": "the URL redirects more often than fetch.redirects allows",
    "too-long": "the answer is longer than images.max_bytes",
    "empty-body": "the answer is empty",
}
_TOLD = frozenset({400, 401, 403, 404, 410, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Fetched:
    """`url` is the one that gave the bytes, after redirects; `content_type` what the host says they are ("" where it says nothing), which
    nothing here relies on: a page in place of an image is found by its bytes."""

    data: bytes
    url: str
    content_type: str


def dropped(reason: str) -> Dropped:
    return Dropped(reason, REASONS.get(reason) or f"the host answered {reason.removeprefix('http-')}")


def http_reason(status: int) -> str:
    """`http-404`; rarer ones together as `http-4xx`, `http-5xx`, `http-other`."""
    if status in _TOLD:
        return f"http-{status}"
    return f"http-{status // 100}xx" if status // 100 in (4, 5) else "http-other"


class Failed(Exception):
    """A request that brought nothing usable; `again`: another attempt may. `connected` is false where the host was not even reached."""

    def __init__(self, reason: str, again: bool = False, connected: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.again, self.connected = reason, again, connected
