"""What tests of downloads share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.shard import Fetch
from pipeline.shards.fetch import Fetched, Fetcher
from pipeline.shards.fetch.answers import REASONS
from pipeline.shards.images import Dropped

IMAGE = bytes(range(256)) * 40
LONGEST = 1 << 20


def config(**changes: Any) -> Fetch:
    return Fetch(**{"allow": ["127.0.0.1"], "timeout": "30 seconds", **changes})


def fetched(urls: Sequence[str], max_bytes: int = LONGEST, **changes: Any) -> list[Fetched | Dropped]:
    with Fetcher(config(**changes), max_bytes) as fetcher:
        results = list(fetcher.fetch(urls))
    assert sorted(index for index, _ in results) == list(range(len(urls))), "each URL comes back once"
    return [result for _, result in sorted(results, key=lambda r: r[0])]


def reason(url: str, **changes: Any) -> str:
    [result] = fetched([url], **changes)
    if isinstance(result, Fetched):
        assert result.data == IMAGE
        return "ok"
    assert result.detail == REASONS.get(result.reason, f"the host answered {result.reason.removeprefix('http-')}")
    return result.reason
