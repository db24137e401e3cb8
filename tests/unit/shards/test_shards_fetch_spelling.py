from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from pipeline.shards.fetch.spelling import parse_url

BASE = URL("https://a.example/x%2Fy/z%3a?q=%2f", encoded=True)
NONE = ["", "a.jpg", "//a.example/a", "ftp://a.example/a", "http:a.example", "http:///a", "http://a.example\\@b.example/", "http://[::1/a",
        "http://a.example:0/", "http://a.example:99999/", "http://a.example/\ud800", "mailto:a@a.example"]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("http://a.example", "http://a.example/"),
        (" HTTP://A.Example:80/x%3a \n", "http://a.example/x%3a"),
        ("http://a_b.example/%2f?s=%2B%3d+&&=", "http://a_b.example/%2f?s=%2B%3d+&&="),
        ("http://a.example/x%2Fy?sig=a%2Bb&u=http%3A%2F%2Fb#f?g", "http://a.example/x%2Fy?sig=a%2Bb&u=http%3A%2F%2Fb"),
        ("https://user:secret@a.example:444/x%3a", "https://a.example:444/x%3a"),
        ("http://münchen.example/ä b?c d|e", "http://xn--mnchen-3ya.example/%C3%A4%20b?c%20d%7Ce"),
        ("http://a.example/100%/%zz/a\n\tb", "http://a.example/100%25/%25zz/ab"),
        ("http://a.example/./x/../y%3a//z", "http://a.example/y%3a//z"),
        ("http://a.example/%2E%2e/x?y=/../z", "http://a.example/x?y=/../z"),
        ("http://a.example/.well-known/a..b/..c%3a", "http://a.example/.well-known/a..b/..c%3a"),
        ("http://[::1]:81/a", "http://[::1]:81/a"),
        *((url, None) for url in NONE),
    ],
)
def test_what_lists_hold(written: str, expected: str | None) -> None:
    assert (url := parse_url(written)) == expected or str(url) == expected


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("w%3a?s=%2f", "https://a.example/x%2Fy/w%3a?s=%2f"),
        ("/w%2fx", "https://a.example/w%2fx"),
        ("?n=%2f", "https://a.example/x%2Fy/z%3a?n=%2f"),
        ("../v", "https://a.example/v"),
        ("//u:p@b.example/z%3a#f", "https://b.example/z%3a"),
        ("http://b.example", "http://b.example/"),
        ("/\udce4\udcff?\udce4", "https://a.example/%E4%FF?%E4"),  # bytes of a header that are no UTF-8
        ("#f", str(BASE)),
        ("javascript:x", None),
        ("//[::1", None),
    ],
)
def test_where_redirects_lead(location: str, expected: str | None) -> None:
    assert (url := parse_url(location, BASE)) == expected or str(url) == expected


@given(st.text() | st.text().map(lambda rest: f"http://a.example/{rest}") | st.text().map(lambda host: f"https://{host}/a"))
def test_what_comes_of_any_text_is_spelt_well_and_stays_as_it_is(text: str) -> None:
    url = parse_url(text)
    if url is not None:
        assert str(url).isascii() and parse_url(str(url)) == url and str(parse_url(str(url))) == str(url)
