"""How hosts are asked, and how downloads wait for their user."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import quote

import pytest

from pipeline.shards.fetch import Fetched, Fetcher, hosts
from pipeline.shards.images import Dropped
from tests.hostile import Hostile, hostile_server
from tests.unit.shards.fetching import IMAGE, LONGEST, config, fetched, reason


def test_every_request_says_who_we_are_and_carries_nothing_else(web: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.2:9")
    urls = [web.url("cookie/a"), web.url("cookie/b"), web.url("good/c", "user:secret@127.0.0.1")]
    assert all(isinstance(r, Fetched) for r in fetched(urls, agent="tessera/1.0 (+https://lab.example)"))
    assert {s.headers["user-agent"] for s in web.seen} == {"tessera/1.0 (+https://lab.example)"}
    assert not any({"cookie", "authorization", "referer"} & set(s.headers) for s in web.seen)


def test_connections_are_used_again_and_few_at_once(web: Hostile) -> None:
    web.delay = 0.01
    fetched([web.url(f"{'good' if n % 4 else 'status/404'}/{n}") for n in range(120)], per_host=3)
    assert len({s.connection for s in web.seen}) <= 2 * 3 + 1 and web.most_at_once == 3


def test_requests_to_one_host_keep_the_rate_of_all_workers(web: Hostile) -> None:
    with Fetcher(config(rate=40), LONGEST, share=2) as fetcher:
        list(fetcher.fetch([web.url(f"good/{n}") for n in range(20)]))
    times = sorted(s.when for s in web.seen)
    assert len(times) == 21 and times[-1] - times[0] >= 20 * 2 / 40 - 0.1


def test_a_host_is_left_alone_as_long_as_it_asks(web: Hostile) -> None:
    assert reason(web.url("busy/1/1/a"), robots=False) == "ok"
    first, second = web.seen
    assert second.when - first.when >= 0.99
    later = quote(format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True), safe="")
    web.seen.clear()
    [result] = fetched([web.url(f"busy/1/{later}/b")], robots=False)
    assert isinstance(result, Fetched) and len(web.seen) == 2 and web.seen[1].when - web.seen[0].when > 0.5


def test_a_host_that_hangs_does_not_starve_others(web: Hostile) -> None:
    """All the images of the other come while the first still hangs."""
    with hostile_server(IMAGE, address="127.0.0.2") as other:
        urls = [web.url(f"hang/{n}") for n in range(40)] + [other.url(f"good/{n}", "127.0.0.2") for n in range(200)]
        with Fetcher(config(allow=["127.0.0.0/8"], connections=8, timeout="10 minutes", robots=False), LONGEST) as fetcher:
            results = fetcher.fetch(urls)
            first = [next(results) for _ in range(200)]
            assert all(index >= 40 and isinstance(result, Fetched) for index, result in first)
            results.close()  # type: ignore[attr-defined]


def test_a_dead_host_costs_a_few_attempts_and_not_one_for_each_url(web: Hostile) -> None:
    results = fetched([web.url(f"hang/{n}") for n in range(100)], robots=False, timeout="0.5 seconds", retries=0)
    assert {r.reason for r in results if isinstance(r, Dropped)} == {"timeout"}
    assert len(web.paths()) <= 2 * hosts.FAILURES


def test_an_overloaded_host_is_given_up(web: Hostile) -> None:
    results = fetched([web.url(f"busy/99/0/{n}") for n in range(400)], robots=False, retries=0)
    assert {r.reason for r in results if isinstance(r, Dropped)} == {"http-429"}
    assert len(web.paths()) < 100


def test_whoever_takes_slowly_makes_it_ask_slowly(web: Hostile) -> None:
    web.files = {"big": bytes(1 << 17)}
    with Fetcher(config(robots=False), LONGEST, room=1 << 20) as fetcher:
        results = fetcher.fetch([web.url("files/big")] * 100)
        next(results)
        _settle(web)
        assert 8 <= len(web.paths()) <= 8 + 2 * 8 + 2
        assert sum(1 for _ in results) == 99


def _settle(web: Hostile) -> None:
    """Until no request has come for a while."""
    count = -1
    while count != len(web.seen):
        count = len(web.seen)
        time.sleep(0.5)


def test_answers_longer_than_the_room_come_all_the_same(web: Hostile) -> None:
    web.files = {"huge": bytes(1 << 20)}
    results = fetched_with_room(web, 1 << 16)
    assert [len(r.data) for r in results if isinstance(r, Fetched)] == [1 << 20] * 12


def fetched_with_room(web: Hostile, room: int) -> list[Fetched | Dropped]:
    with Fetcher(config(robots=False), LONGEST, room=room) as fetcher:
        return [result for _, result in fetcher.fetch([web.url("files/huge")] * 12)]


def test_leaving_early_ends_what_is_under_way_and_the_next_list_goes_on(web: Hostile) -> None:
    with Fetcher(config(robots=False, per_host=4), LONGEST) as fetcher:
        results = fetcher.fetch([web.url(f"good/{n}") for n in range(2000)])
        next(results)
        results.close()  # type: ignore[attr-defined]
        asked = len(web.seen)
        assert asked < 2000
        assert all(isinstance(r, Fetched) for _, r in fetcher.fetch([web.url(f"good/{n}") for n in range(50)]))
        assert not any(path.startswith("/good/1999") for path in web.paths())
    assert threading.active_count() < 60


def test_few_connections_are_open_whatever_the_number_of_hosts(web: Hostile, resolve: Callable[..., list[str]]) -> None:
    resolve(**{f"host{n}": ["127.0.0.1"] for n in range(200)})
    urls = [web.url(f"good/{n}", f"host{n % 200}.example") for n in range(600)]
    assert all(isinstance(r, Fetched) for r in fetched(urls, connections=8, robots=False))
    assert web.most_open <= 5 * 8
