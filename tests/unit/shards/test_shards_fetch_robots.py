from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.fetch.robots import LONGEST, Rules, RulesCache, opts_out, parse_rules, product_token


def _refusal(text: str, path: str, token: str = "tessera") -> str | None:
    return parse_rules(text.encode(), token).refusal(f"http://a.example{path}", token)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("", "/a.jpg", None),
        ("User-agent: *\nDisallow: /private/", "/private/a.jpg", "robots"),
        ("User-agent: *\nDisallow: /private/", "/a.jpg", None),
        ("User-agent: *\nDisallow: /\n\nUser-agent: Tessera\nDisallow: /x", "/a.jpg", None),  # our own group alone counts
        ("User-agent: *\nAllow: /\n\nuser-agent: TESSERA # us\nDisallow: /", "/a.jpg", "robots"),
        ("User-agent: tessera/2.0\nDisallow: /", "/a.jpg", "robots"),
        ("User-agent: tess\nDisallow: /", "/a.jpg", None),  # another robot's name, though ours begins with it
        ("User-agent: other\nUser-agent: tessera\nDisallow: /", "/a.jpg", "robots"),
        ("User-agent: other\nDisallow: /", "/a.jpg", None),
        ("User-agent: *\nDisallow: /\nAllow: /open/", "/open/a.jpg", None),  # the longest match counts
        ("User-agent: *\nDisallow: /*.jpg$", "/a.jpg", "robots"),
        ("User-agent: *\nDisallow: /*.jpg$", "/a.jpg?x=1", None),
        ("User-agent: *\nDisallow: /a%20b", "/a%20b.jpg", "robots"),
        ("\ufeffUser-agent: *\nDisallow: /", "/a.jpg", "robots"),
        ("User-agent *\nDisallow /", "/a.jpg", "robots"),
        ("<html>not found</html>", "/a.jpg", None),
    ],
)
def test_robots_txt(text: str, path: str, expected: str | None) -> None:
    assert _refusal(text, path) == expected


def test_rules_beyond_500_kib_are_not_read() -> None:
    assert _refusal("User-agent: *\n" + "#" * LONGEST + "\nDisallow: /", "/a.jpg") is None


def test_a_file_made_to_take_long_is_read_as_fast_as_another() -> None:
    """Each of 9,000 groups with each of 9,000 rules would be 81 million; a plain file of that size is the measure."""
    hostile = "".join(f"User-agent: b{i}\n" for i in range(9000)) + "".join(f"Disallow: /{i}\n" for i in range(9000))
    plain = "User-agent: *\n" + "".join(f"Disallow: /{i}\n" for i in range(18000))
    times = []
    for text in (hostile, plain):
        start = time.process_time()
        parse_rules(text.encode(), "tessera")
        times.append(time.process_time() - start)
    assert times[0] < 20 * times[1]


def test_a_rule_of_many_stars_is_compared_at_once() -> None:
    """By a regular expression it would take longer than the universe will last."""
    assert _refusal("User-agent: *\nDisallow: /" + "*a" * 100 + "*b", "/" + "a" * 4000) is None


@given(st.binary(max_size=400))
def test_any_bytes_are_read(body: bytes) -> None:
    assert parse_rules(body, "tessera").refusal("http://a.example/a.jpg", "tessera") in (None, "robots")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], False),
        (["noai"], True),
        (["noindex, NoAI"], True),
        (["noindex", "noimageai"], True),
        (["tessera: noai"], True),
        (["otherbot: noai"], False),
        (["otherbot: noindex, noai"], False),  # the name is of all that follow it
        (["otherbot: noindex, tessera: noai"], True),
        (["*: noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),  # a directive with a colon of its own
        (["max-snippet: 50, noai"], True),
        (["noaircraft"], False),
    ],
)
def test_x_robots_tag(headers: list[str], expected: bool) -> None:
    assert opts_out(headers, "tessera", ["noai", "noimageai"]) is expected


@pytest.mark.parametrize("agent", ["tessera", "Tessera/1.0 (+https://lab.example/bot)", "tessera (us)"])
def test_our_name_for_robots_txt(agent: str) -> None:
    assert product_token(agent) == "tessera"


def test_rules_are_kept_for_a_day_and_failures_for_minutes() -> None:
    cache = RulesCache()
    cache.put("http://a", parse_rules(b"User-agent: *\nDisallow: /", "tessera"), 0)
    cache.put("http://b", Rules(reason="timeout"), 0)
    assert cache.get("http://a", 86399) and not cache.get("http://a", 86401)
    assert cache.get("http://b", 599) and not cache.get("http://b", 601)


def test_rules_of_many_large_files_give_way_to_newer_ones() -> None:
    cache, rules = RulesCache(), Rules(size=LONGEST)
    for n in range(20):
        cache.put(f"http://{n}", rules, 0)
        assert cache.get("http://0", 1) is rules  # in use all the time
    kept = [n for n in range(20) if cache.get(f"http://{n}", 1)]
    assert 0 in kept and 19 in kept and len(kept) < 10
