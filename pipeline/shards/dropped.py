"""Why a sample is left out."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Dropped:
    """`reason` is counted in the manifest, `detail` is for people.

    Reasons of images: empty, too-short, too-long (bytes), not-an-image, too-large, too-small, bad-aspect (pixels), corrupt,
    unsupported. Of the rest of a sample: bad-cls, bad-json, bad-txt, no-text, text-too-short, text-too-long, filtered.
    Sources add their own.
    """

    reason: str
    detail: str


DENIED = "denied"  # a reason of rows: a deny-list of the dataset that they are in names them
UNANSWERED = frozenset({"dns", "refused", "reset", "timeout", "unreachable"})  # reasons of downloads of which nothing came back


class Drop(Exception):
    """Raised where it is found; carries what is then returned."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.dropped = Dropped(reason, detail)


def describe_error(error: BaseException) -> str:
    """The error's own words, without memory addresses, which would differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip()[:200] or type(error).__name__
