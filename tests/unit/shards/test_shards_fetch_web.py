"""The fetcher against real servers on loopback that misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import ValidationError

from pipeline.config.shard import Fetch
from pipeline.shards.fetch import Fetched, Fetcher, hosts
from pipeline.shards.fetch.answers import REASONS
from pipeline.shards.images import Dropped
from tests.hostile import Hostile, hostile_server, witness

IMAGE = bytes(range(256)) * 40
LONGEST = 1 << 20
HANGS = "1 second"  # as a time-out, where one is to happen


@pytest.fixture
def web() -> Iterator[Hostile]:
    with hostile_server(IMAGE) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PAUSE", 0.02)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes names resolve to given addresses, one after another where there are several; returns the names that were asked for."""
    real = socket.getaddrinfo

    def install(**names: list[str]) -> list[str]:
        asked: list[str] = []

        def lie(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
            name = str(host).split(".")[0]
            if name in names:
                asked.append(name)
                address = names[name].pop(0) if len(names[name]) > 1 else names[name][0]
                return real(address, port, *rest, **options)
            return real(host, port, *rest, **options)

        monkeypatch.setattr(socket, "getaddrinfo", lie)
        return asked

    return install


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


def test_images_come_back_with_their_urls(web: Hostile) -> None:
    web.files = {f"n{n}": bytes([n]) * (n + 1) for n in range(200)}
    results = fetched([web.url(f"files/n{n}") for n in range(200)])
    assert [r.data for r in results if isinstance(r, Fetched)] == list(web.files.values())
    assert [r.url for r in results if isinstance(r, Fetched)] == [web.url(f"files/n{n}") for n in range(200)]


@pytest.mark.parametrize(
    ("path", "expected", "requests"),
    [
        ("good/a", "ok", 1),
        ("chunks/a", "ok", 1),
        ("gzip/a", "ok", 1),
        ("cookie/a", "ok", 1),
        ("hops/5/a", "ok", 6),
        ("hops/6/a", "too-many-redirects", 6),
        ("loop/a", "redirect-loop", 2),
        ("to/ftp%3A%2F%2Fa.example%2Fa.jpg", "bad-url", 1),
        ("to/file%3A%2F%2F%2Fetc%2Fpasswd", "bad-url", 1),
        ("to/%2Fgood%2Fb", "ok", 2),
        ("to/", "redirect-loop", 1),
        ("empty/a", "empty-body", 1),
        ("truncated/a", "truncated", 3),
        ("reset/a", "reset", 3),
        ("garbage/a", "bad-http", 1),
        ("bad-gzip/a", "bad-encoding", 1),
        ("bomb/a", "too-long", 1),
        ("endless/a", "too-long", 1),
        ("status/404/a", "http-404", 1),
        ("status/403/a", "http-403", 1),
        ("status/410/a", "http-410", 1),
        ("status/418/a", "http-4xx", 1),
        ("status/204/a", "http-other", 1),
        ("status/304/a", "http-other", 1),
        ("status/500/a", "http-500", 3),
        ("status/503/a", "http-503", 3),
        ("status/599/a", "http-5xx", 3),
        ("flaky/500/2/a", "ok", 3),
        ("flaky/503/2/a", "ok", 3),
        ("flaky/500/3/a", "http-500", 3),
        ("busy/2/0/a", "ok", 3),
        ("busy/9/0/a", "http-429", 3),
        ("busy/9/3600/a", "http-429", 1),
        ("opt-out/noai/a", "opted-out", 1),
        ("opt-out/noindex%0Anoimageai/a", "opted-out", 1),
        ("opt-out/tessera%3A%20noai/a", "opted-out", 1),
        ("opt-out/otherbot%3A%20noai/a", "ok", 1),
    ],
)
def test_answers(web: Hostile, path: str, expected: str, requests: int) -> None:
    assert reason(web.url(path)) == expected
    if path != "reset/a":  # one of a connection that was used before is asked once more at once
        assert len(web.paths()) == requests


def test_a_body_that_stops_being_http(web: Hostile) -> None:
    """Which of both depends on whether the damage came in one packet with the headers."""
    assert reason(web.url("bad-chunks/a")) in ("truncated", "bad-http")


@pytest.mark.parametrize("kind", ["hang", "drip", "drip-body"])
def test_slow_answers_end(web: Hostile, kind: str) -> None:
    """The whole image would take 500 seconds, the headers for ever."""
    start = time.monotonic()
    assert reason(web.url(f"{kind}/a"), timeout=HANGS, retries=1, robots=False) == "timeout"
    assert len(web.paths()) == 2 and time.monotonic() - start < 60


def test_a_page_called_an_image_is_left_to_the_image_check(web: Hostile) -> None:
    [page] = fetched([web.url("page/a")])
    assert isinstance(page, Fetched) and page.data.startswith(b"<!DOCTYPE") and page.content_type == "image/jpeg"


@pytest.mark.parametrize(
    "url",
    ["", "a.jpg", "//a.example/a.jpg", "ftp://a.example/a", "file:///etc/passwd", "data:image/png;base64,aa", "http://", "http:///a", "http://[::1/a",
     "http://a.example:99999/", "http://a b/", "javascript:alert(1)", "http://\x00/", "http://" + "a" * 300 + ".example/"],
)  # fmt: skip
def test_what_is_no_url(url: str) -> None:
    assert reason(url) in ("bad-url", "dns")


def test_names_that_do_not_exist_are_asked_for_once(resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()

    def nowhere(host: Any, *rest: Any, **options: Any) -> Any:
        asked[host] += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    results = fetched([f"http://gone{n % 3}.example/{n}.jpg" for n in range(60)], robots=False)
    assert {r.reason for r in results if isinstance(r, Dropped)} == {"dns"} and len(results) == 60
    assert asked == dict.fromkeys((f"gone{n}.example" for n in range(3)), 1)


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for robots in (True, False):
        assert reason(f"http://127.0.0.1:{port}/a.jpg", robots=robots) == "refused"


def test_a_server_that_speaks_no_tls(web: Hostile) -> None:
    for robots in (True, False):
        assert reason(web.url("good/a").replace("http:", "https:"), robots=robots, timeout="10 seconds") == "tls"
    assert web.seen == []


SPELLINGS = ["127.0.0.2", "0x7f000002", "2130706434", "127.2", "0177.0.0.2", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]"]


@pytest.mark.parametrize("host", SPELLINGS)
def test_nothing_is_sent_to_a_forbidden_address(host: str) -> None:
    """Its neighbour is allowed, and a witness listens at the address itself."""
    with witness("127.0.0.2") as (port, came):
        for robots in (True, False):
            assert reason(f"http://{host}:{port}/a.jpg", robots=robots) == "forbidden-address"
            assert reason(f"https://{host}:{port}/a.jpg", robots=robots) == "forbidden-address"
        assert came == []
        allowed = reason(f"http://{host}:{port}/a.jpg", robots=False, allow=["127.0.0.2"], retries=0)
    assert (allowed, bool(came)) in (("reset", True), ("bad-url", False)), "the witness sees what is allowed"  # some spellings never are


@pytest.mark.parametrize("host", ["127.0.0.2", "2130706434", "[::ffff:127.0.0.2]", "inside.example"])
def test_nothing_is_sent_to_a_forbidden_address_by_a_redirect(web: Hostile, host: str, resolve: Callable[..., list[str]]) -> None:
    resolve(inside=["127.0.0.2"])
    with witness("127.0.0.2") as (port, came):
        target = quote(f"http://{host}:{port}/latest/meta-data/", safe="")
        for robots in (True, False):
            assert reason(web.url(f"to/{target}"), robots=robots) == "forbidden-address"
    assert came == [] and web.paths() == ["/to/" + target] * 2


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.1", "100.100.100.200", "192.168.1.1"])
def test_names_that_lead_to_metadata_and_private_addresses(address: str, web: Hostile, resolve: Callable[..., list[str]]) -> None:
    resolve(inside=[address])
    assert reason("http://inside.example/latest/meta-data/") == "forbidden-address"
    assert reason(web.url("to/http%3A%2F%2Finside.example%2F")) == "forbidden-address"


def test_a_name_that_changes_its_address_after_the_look(
    web: Hostile, resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding, with the cache off: the first query says what is allowed, all later ones do not."""
    monkeypatch.setattr("pipeline.shards.fetch.names._KEPT", 0.0)
    with witness("127.0.0.2", web.port) as (_, came):
        asked = resolve(inside=["127.0.0.1", "127.0.0.2"])
        assert reason(web.url("good/a", "inside.example"), robots=False) == "forbidden-address"
        assert len(asked) >= 2
    assert came == []


def test_the_socket_refuses_though_the_resolver_was_fooled(
    web: Hostile, resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.shards.fetch.names.Names.look_up", _nothing)
    monkeypatch.setattr("aiohttp.TCPConnector._resolve_host", _fooled)
    with witness("127.0.0.2", web.port) as (_, came):
        assert reason(web.url("good/a", "inside.example"), robots=False) == "forbidden-address"
    assert came == []


async def _nothing(self: object, host: str) -> None: ...


async def _fooled(self: object, host: str, port: int, traces: object = None) -> list[dict[str, Any]]:
    return [{"hostname": host, "host": "127.0.0.2", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]


def test_a_host_that_is_allowed_by_name(web: Hostile, resolve: Callable[..., list[str]]) -> None:
    resolve(inside=["127.0.0.1"], other=["127.0.0.1"])
    url, other = web.url("good/a", "inside.lab"), web.url("good/a", "other.lab")
    assert reason(url, allow=["inside.lab"]) == "ok" and reason(other, allow=["inside.lab"]) == "forbidden-address"
    assert reason(url, allow=["127.0.0.0/8"]) == "ok" and reason(url, allow=["127.0.0.2"]) == "forbidden-address"


def test_robots_txt_is_asked_for_once_and_obeyed(web: Hostile) -> None:
    web.robots = b"User-agent: tessera\nDisallow: /good/secret\n"
    results = fetched([web.url(f"good/{'secret' if n % 2 else 'open'}/{n}") for n in range(40)])
    assert [isinstance(r, Fetched) for r in results] == [n % 2 == 0 for n in range(40)]
    assert {r.reason for r in results if isinstance(r, Dropped)} == {"robots"}
    assert Counter(s.path for s in web.seen)["/robots.txt"] == 1 and len(web.paths()) == 20
    assert web.seen[0].path == "/robots.txt" and not any("secret" in path for path in web.paths())
    web.seen.clear()
    assert reason(web.url("good/secret/x"), robots=False) == "ok" and len(web.seen) == 1


@pytest.mark.parametrize(("status", "expected"), [(404, "ok"), (403, "ok"), (401, "ok"), (500, "robots"), (503, "robots"), (429, "robots")])
def test_a_robots_txt_that_is_not_there_allows_all_and_one_in_trouble_nothing(web: Hostile, status: int, expected: str) -> None:
    web.robots = status
    assert reason(web.url("good/a")) == expected
    assert len(web.paths()) == (1 if expected == "ok" else 0)
    assert len(web.seen) - len(web.paths()) == (1 if expected == "ok" else 3)


def test_robots_txt_of_where_a_redirect_leads(web: Hostile) -> None:
    with hostile_server(IMAGE, robots=b"User-agent: *\nDisallow: /good/b") as other:
        urls = [web.url("to/" + quote(other.url(f"good/{name}"), safe="")) for name in "ab"]
        a, b = fetched(urls)
        assert isinstance(a, Fetched) and a.url == other.url("good/a")
        assert isinstance(b, Dropped) and b.reason == "robots" and other.paths() == ["/good/a"]


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


@pytest.mark.parametrize(
    "changes",
    [
        {"allow": ["10.0.0.1/8"]},
        {"allow": ["a/b"]},
        {"allow": [""]},
        {"allow": ["user@host"]},
        {"agent": "tessera\r\nHost: a"},
        {"agent": "1/x"},
        {"agent": ""},
        {"agent": "tesséra"},
    ],
)
def test_what_no_config_may_say(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Fetch(**changes)


def test_spelling_stays_where_it_is_right(web: Hostile) -> None:
    """A signature in a URL is of its very letters."""
    paths = ["good/a%2Fb%3a?sig=x%2By%2f%3D&u=http%3A%2F%2Fa", "good/~a;b=1,2/(x)?a=b+c&&="]
    assert all(isinstance(r, Fetched) for r in fetched([web.url(path) for path in paths]))
    assert sorted(web.paths()) == sorted(f"/{path}" for path in paths)
    web.seen.clear()
    assert reason(web.url("good/ä b.jpg#fragment")) == "ok" and web.paths() == ["/good/%C3%A4%20b.jpg"]


def test_what_comes_depends_on_the_answers_alone(web: Hostile) -> None:
    paths = [
        f"{kind}/{n}"
        for n in range(6)
        for kind in ("good", "flaky/500/1", "status/404", "truncated", "empty", "opt-out/noai", "loop", "busy/1/0")
    ]
    with hostile_server(IMAGE) as other:
        runs = []
        for server, connections, per_host in ((web, 1, 1), (other, 64, 16)):
            results = fetched([server.url(path) for path in paths], connections=connections, per_host=per_host)
            runs.append([r if isinstance(r, Dropped) else r.data for r in results])
        assert runs[0] == runs[1]
