"""What is never asked for: forbidden addresses, with a witness that listens there, and what robots.txt forbids."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.shards.fetch import Fetched
from pipeline.shards.images import Dropped
from pipeline.shards.sources import Item, UrlSource
from tests.hostile import Hostile, hostile_server, witness
from tests.unit.shards.fetching import IMAGE, LONGEST, config, fetched, reason

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


def test_what_was_read_of_robots_txt_serves_all_shards(web: Hostile) -> None:
    source = UrlSource("list.csv", {})

    def shard(*names: str) -> list[str]:
        items = [Item(web.url(f"good/{name}"), 0) for name in names]
        return [f.reason if isinstance(f, Dropped) else "ok" for _, f in source.fetch(items, config(agent="reader"), LONGEST, 1)]

    web.robots = 500
    assert shard("a", "b") == ["robots", "robots"]
    web.robots, before = b"User-agent: *\nDisallow: /good/secret\n", len(web.seen)
    assert shard("a") == shard("b") == ["ok"] and shard("secret") == ["robots"]  # what could not be read was asked for again
    assert [s.path for s in web.seen[before:]] == ["/robots.txt", "/good/a", "/good/b"]


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
