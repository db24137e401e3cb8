from __future__ import annotations

import html

import ftfy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.config.shard import ShardText
from pipeline.shards.dropped import Drop
from pipeline.shards.text import check_text, clean, mend
from pipeline.stream.text import clean as of_clip


@pytest.mark.parametrize(
    ("given_", "cleaned"),
    [
        ("a plain caption, untouched: <b> 50% #1", "a plain caption, untouched: <b> 50% #1"),
        ("  two\tand \r\n three\u00a0\u3000four\u2028five  ", "two and three four five"),
        ("schÃ¶n", "schön"),
        ("\u201cquotes\u201d and it\u2019s", '"quotes" and it\'s'),
        ("fish &amp; chips &lt;3", "fish & chips <3"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("e\u0301te\u0301", "été"),
        ("e&#769;te", "éte"),
        ("bell\x07 null\0 escape\x1b[31mred\x1b[0m", "bell null escapered"),
        ("&#7;from an entity&#0;", "from an entity\ufffd"),
        ("\ufeffwith a byte order mark", "with a byte order mark"),
        ("\ufb01ne \uff21\uff22\uff23", "fine ABC"),
        ("👩\u200d🚀 at work", "👩\u200d🚀 at work"),
        ("ein Hündchen, 小狗, щенок", "ein Hündchen, 小狗, щенок"),
        ("Case STAYS", "Case STAYS"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_cleaning(given_: str, cleaned: str) -> None:
    assert clean(given_) == cleaned


TEXT = st.text(st.characters(codec="utf-8"))


@given(TEXT)
@example("a & b")
@example("&lt;&amp;gt;")
def test_what_is_left_out_for_plain_ascii_changes_nothing(text: str) -> None:
    assert mend(text) == html.unescape(html.unescape(ftfy.fix_text(text)))


@given(st.text(st.characters(codec="ascii")))
def test_ascii_captions_have_the_tokens_of_the_raw_ones(text: str) -> None:
    if "&" not in text and text.isprintable():
        assert of_clip(clean(text)) == of_clip(text)


@given(TEXT)
def test_a_cleaned_caption_is_one_line_that_utf8_can_hold(text: str) -> None:
    found = clean(text)
    assert found == " ".join(found.split()) and found.encode().decode() == found
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in found)


def reason(text: str | None, **config: object) -> str:
    with pytest.raises(Drop) as raised:
        check_text(text, ShardText.model_validate(config))
    assert raised.value.dropped.detail
    return raised.value.dropped.reason


def test_lengths_are_of_the_cleaned_caption_in_characters() -> None:
    limits = {"min_length": 3, "max_length": 5}
    assert reason("  ab  ", **limits) == "text-too-short"
    assert reason("abcdef", **limits) == "text-too-long"
    assert check_text("  ÄÖÜßé ", ShardText.model_validate(limits)) == "ÄÖÜßé".encode()
    assert check_text(None, ShardText.model_validate(limits)) is None


def test_an_empty_caption_is_none() -> None:
    for text in (None, "", " \n"):
        assert check_text(text, ShardText()) is None
        assert reason(text, required=True) == "no-text"
    assert check_text("", ShardText(clean=False)) is None


def test_uncleaned_captions_stay_as_they_are() -> None:
    text = " schÃ¶n &amp; \x07"
    assert check_text(text, ShardText(clean=False)) == text.encode()
    assert reason("half \ud800", clean=False) == "bad-txt"
    assert check_text("half \ud800", ShardText()) == "half \ufffd".encode()


def test_no_caption_is_longer_than_an_index_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.text.LONGEST", 5)
    assert check_text("12345", ShardText()) == b"12345"
    assert reason("12345ä") == "text-too-long"
