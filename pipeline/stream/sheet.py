"""Samples as one picture to look over: a card each, its image above, class and caption below."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from pipeline.core.errors import StorageError
from pipeline.core.progress import Progress
from pipeline.stream.decode import decode_box, size_of
from pipeline.stream.ledger import BadSample
from pipeline.stream.look import class_name
from pipeline.stream.reader import Dataset

_READERS = 4  # a decoded photograph may have 200 MB
_SIDE, _GAP, _MARGIN, _PAD = 192, 16, 40, 12  # pixels: an image's square, between cards, around all, inside a card
_TINY = 0.8  # of the square, which images of less than half of that are enlarged to, with hard edges
_PAPER, _CARD, _BED, _EDGE = "#f4f4f1", "#ffffff", "#ebebe7", "#deded9"
_INK, _GREY, _MARK = "#1f2023", "#6a6c72", "#b5431f"
_TITLE, _SUBTITLE, _HEADING, _TEXT = (True, 26), (False, 15), (True, 13), (False, 12)  # (bold, size)
_LEADING = 1.35  # line height, in sizes
_LINES = 2  # of a caption


@dataclass(frozen=True)
class Card:
    """`mark` is what is remarkable about the sample; there is no image where it cannot be read."""

    image: Image.Image | None
    heading: str
    text: str
    mark: str = ""


def cards(samples: Sequence[tuple[Dataset, int, str]]) -> list[Card]:
    """Of (dataset, number, mark) each, read in threads."""
    with ThreadPoolExecutor(_READERS) as pool, Progress("sheet", len(samples), "samples") as shown:
        made = []
        for card in pool.map(lambda s: _card(*s), samples):
            made.append(card)
            shown.update()
        return made


def _card(dataset: Dataset, number: int, mark: str) -> Card:
    try:
        sample = dataset.read(number)
    except BadSample as e:
        return Card(None, "", e.key, e.reason)
    heading = class_name(dataset.classes, sample.label)
    text = " ".join(sample.text.split()) or ("" if heading else sample.key)
    try:
        height, width = size_of(sample.image)
        # As training decodes it; a large JPEG at a fraction of its size.
        pixels, _ = decode_box(sample.image, (0, 0, height, width), _SIDE)
        return Card(_fitted(Image.fromarray(pixels)), heading, text, mark)
    except ValueError:
        return Card(None, heading, text, "undecodable")


def _fitted(image: Image.Image) -> Image.Image:
    """Into the square; small images grow by whole factors only, so that their pixels can be seen."""
    factor = int(_SIDE * _TINY / max(image.size))
    if factor >= 2:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return image


def draw(of: Sequence[Card], title: str, subtitle: str) -> Image.Image:
    """The sheet."""
    columns = _columns(len(of))
    headed, lines = any(c.heading for c in of), max((len(_wrapped(c.text)) for c in of), default=0)
    below = (headed * _line(_HEADING) + lines * _line(_TEXT) + _PAD + 6) if headed or lines else 0
    inside = max(columns, 4) * (_SIDE + _GAP) - _GAP
    top = _MARGIN + _line(_TITLE) + _line(_SUBTITLE) + 20
    rows = -(-len(of) // columns)
    sheet = Image.new("RGB", (inside + 2 * _MARGIN, top + rows * (_SIDE + below + _GAP) - _GAP + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 8), _cut(title, _TITLE, inside), _INK, _font(*_TITLE))
    pen.text((_MARGIN, _MARGIN - 8 + _line(_TITLE)), _cut(subtitle, _SUBTITLE, inside), _GREY, _font(*_SUBTITLE))
    for n, card in enumerate(of):
        row, column = divmod(n, columns)
        _draw_card(sheet, pen, card, _MARGIN + column * (_SIDE + _GAP), top + row * (_SIDE + below + _GAP), below, headed)
    return sheet


def _columns(count: int) -> int:
    """About as many as rows, so that few places of the last row stay empty."""
    about = max(4, min(16, round(count**0.5)))
    return min(count, min(range(about, about + 3), key=lambda columns: (-count % columns, -columns)))


def _draw_card(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, x: int, y: int, below: int, headed: bool) -> None:
    pen.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE + below), _CARD, _MARK if card.mark else _EDGE)
    pen.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), _BED)
    pen.line((x, y + _SIDE, x + _SIDE - 1, y + _SIDE), _EDGE)
    if card.image:
        sheet.paste(card.image, (x + (_SIDE - card.image.width) // 2, y + (_SIDE - card.image.height) // 2))
    else:
        pen.text((x + _SIDE // 2, y + _SIDE // 2), "no image", _GREY, _font(*_TEXT), anchor="mm")
    if card.mark:
        _draw_mark(pen, card.mark, x, y)
    y += _SIDE + 7
    if headed:
        pen.text((x + _PAD, y), _cut(card.heading, _HEADING, _SIDE - 2 * _PAD), _INK, _font(*_HEADING))
        y += _line(_HEADING)
    for line in _wrapped(card.text):
        pen.text((x + _PAD, y), line, _GREY, _font(*_TEXT))
        y += _line(_TEXT)


def _draw_mark(pen: ImageDraw.ImageDraw, mark: str, x: int, y: int) -> None:
    width = round(_font(*_TEXT).getlength(mark))
    pen.rectangle((x, y, x + width + 13, y + _line(_TEXT) + 4), _MARK)
    pen.text((x + 7, y + 3), mark, "#ffffff", _font(*_TEXT))


@lru_cache(maxsize=8)
def _font(bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"DejaVuSans{'-Bold' * bold}.ttf", size)


def _line(font: tuple[bool, int]) -> int:
    return round(font[1] * _LEADING)


def _cut(text: str, font: tuple[bool, int], width: int) -> str:
    """As much of `text` as fits, with an ellipsis where that is not all."""
    measure = _font(*font).getlength
    text = text[:1000]
    if measure(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low].rstrip() + "…"


def _wrapped(text: str) -> list[str]:
    """At most `_LINES` lines of a card's width, broken between words where these are short enough."""
    width, measure = _SIDE - 2 * _PAD, _font(*_TEXT).getlength
    lines: list[str] = []
    rest = text[:1000]
    while rest and len(lines) < _LINES - 1:
        if measure(rest) <= width:
            break
        part = _cut(rest, _TEXT, width)[:-1]
        at = part.rfind(" ", len(part) // 2)
        end = len(part) if at < 0 or rest[len(part) : len(part) + 1] == " " else at
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return [*lines, _cut(rest, _TEXT, width)] if rest else lines


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Raises StorageError where it cannot be written."""
    try:
        sheet.save(path, "PNG", optimize=True)
    except OSError as e:
        raise StorageError(f"--sheet {path}: cannot be written ({e.strerror or e})") from e
