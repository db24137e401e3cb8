"""Captions: cleaned, and judged by their length.

What `clean` does, in this order; of plain ASCII only the last applies, and ftfy, 150 us a caption, is left out:
1. as CLIP's tokenizer (openai/CLIP, simple_tokenizer.py, basic_clean): ftfy mends what was decoded wrongly ("schÃ¶n"), makes
   curly quotes straight, ligatures and full-width letters plain, and takes out terminal escapes; HTML entities are resolved,
   twice ("&amp;lt;" becomes "<");
2. Unicode NFC, so that one letter is one character, whatever entities were put together;
3. control characters other than white space are taken out (Cc, the byte order mark, halves of surrogate pairs), others
   (joiners, which scripts and emoji need) are left;
4. white space of any kind and length becomes one space, at both ends nothing.
Upper and lower case stay: the tokenizer of whoever reads decides on that.
"""

from __future__ import annotations

import html
import re
import unicodedata

import ftfy

from pipeline.config.shard import ShardText
from pipeline.shards.dropped import Drop

LONGEST = 1 << 28  # bytes of a caption, or of any other side file
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]")  # not \t to \r, FS to US, NEL: white space


def mend(text: str) -> str:
    """Broken Unicode put right and HTML entities resolved twice, as CLIP's basic_clean does."""
    if text.isascii() and text.isprintable() and "&" not in text:  # ftfy changes nothing there
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean(text: str) -> str:
    """See above."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    return " ".join(_CONTROL.sub("", unicodedata.normalize("NFC", mend(text))).split())


def check_text(given: str | None, text: ShardText) -> bytes | None:
    """A caption as UTF-8 for a shard; None where there is none, and an empty one counts as none.

    Raises Drop: no-text, text-too-short, text-too-long, bad-txt (it cannot be written as UTF-8).
    """
    caption = clean(given) if given and text.clean else given
    if not caption:
        if text.required:
            raise Drop("no-text", "it has no caption" if given is None else f"its caption is empty ({given[:40]!r})")
        return None
    if len(caption) < text.min_length:
        raise Drop("text-too-short", f"{len(caption)} characters, the least is {text.min_length}: {caption[:80]!r}")
    if text.max_length is not None and len(caption) > text.max_length:
        raise Drop("text-too-long", f"{len(caption)} characters, the most is {text.max_length}: {caption[:80]!r}..")
    try:
        data = caption.encode()
    except UnicodeEncodeError as e:
        raise Drop("bad-txt", f"its caption has half a surrogate pair at character {e.start}") from e
    if len(data) > LONGEST:
        raise Drop("text-too-long", f"{len(data)} bytes, the most is {LONGEST}")
    return data
