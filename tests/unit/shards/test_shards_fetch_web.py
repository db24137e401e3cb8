"""URLs against a server that misbehaves: what comes of each."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.shard import Fetch
from pipeline.shards.fetch import Fetched
from pipeline.shards.images import Dropped
from tests.hostile import Hostile, hostile_server
from tests.unit.shards.fetching import IMAGE, fetched, reason

HANGS = "1 second"  # as a time-out, where one is to happen


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
        ("old/a", "ok", 1),
        ("swollen/a", "ok", 1),
        ("nothing/a", "too-long", 1),
        ("headers/a", "bad-http", 1),
        ("gzip-empty/a", "empty-body", 1),
        ("hops/5/a", "ok", 6),
        ("hops/6/a", "too-many-redirects", 6),
        ("loop/a", "redirect-loop", 2),
        ("to/ftp%3A%2F%2Fa.example%2Fa.jpg", "bad-url", 1),
        ("to/file%3A%2F%2F%2Fetc%2Fpasswd", "bad-url", 1),
        ("to/%2Fgood%2Fb", "ok", 2),
        ("to/%2F%2F127.0.0.2%2Fgood%2Fb", "forbidden-address", 1),
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


def test_a_port_where_nobody_listens(web: Hostile) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for robots in (True, False):
        assert reason(f"http://127.0.0.1:{port}/a.jpg", robots=robots) == "refused"


def test_a_server_that_speaks_no_tls(web: Hostile) -> None:
    for robots in (True, False):
        assert reason(web.url("good/a").replace("http:", "https:"), robots=robots, timeout="10 seconds") == "tls"
    assert web.seen == []


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
    for asked, seen in (
        ("good/ä b.jpg#fragment", ["good/%C3%A4%20b.jpg"]),
        ("good/a%2Fb?sig=x%2By%2f%3D&u=http%3A%2F%2Fa#fragment", ["good/a%2Fb?sig=x%2By%2f%3D&u=http%3A%2F%2Fa"]),
        ("to/%2Fgood%2F%E4%3Fsig%3D%252B%252f", ["to/%2Fgood%2F%E4%3Fsig%3D%252B%252f", "good/%E4?sig=%2B%2f"]),  # a bare byte in a header
    ):
        web.seen.clear()
        assert reason(web.url(asked), robots=False) == "ok" and web.paths() == [f"/{path}" for path in seen]


def test_where_steps_lead_is_what_robots_txt_is_asked_about(web: Hostile) -> None:
    web.robots = b"User-agent: *\nDisallow: /good/secret\n"
    assert [reason(web.url(f"{path}/a")) for path in ("./good/secret", "good/%2e/secret", "x/../good/secret", "good/secret/..")] == [
        *("robots", "robots", "robots"), "ok",
    ]  # fmt: skip
    assert web.paths() == ["/good/a"]


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
