"""What a page tells of the dataset: what was read and why some was dropped, how it is distributed, what it looks like."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL import Image

from pipeline.core.units import format_bytes
from pipeline.report.distribution import draw_distribution, ratio_text
from pipeline.report.plots import Plot
from pipeline.shards.denied import Contaminated, Denied, list_denied
from pipeline.shards.manifest import Manifest
from pipeline.shards.statistics import Quantity, Statistics, find_statistics, spread
from pipeline.stream import open_dataset
from pipeline.stream.sheet import Card, cards
from pipeline.stream.tell import shortened

SAMPLES = 24
NAMED = 12  # dropped images
_TEXT = 160  # letters of a caption


@dataclass(frozen=True)
class Sampled:
    """A card of the contact sheet. `source` is a data URI, empty where there is no picture; `mark` says what is wrong with the sample."""

    source: str
    label: str
    text: str
    mark: str


@dataclass(frozen=True)
class Measured:
    """A row of the table of quantities, spelt out; `missing` samples have none."""

    name: str
    least: str
    low: str
    median: str
    mean: str
    high: str
    most: str
    missing: int


@dataclass(frozen=True)
class Described:
    """A dataset for the page. `dropped` is (reason, images), the most first; `named` are some of them, of each reason."""

    manifest: Manifest
    dropped: list[tuple[str, int]]
    named: list[dict[str, str]]
    statistics: Statistics | None
    plots: list[Plot]
    measured: list[Measured]
    denied: list[Denied]
    contaminated: list[Contaminated]
    samples: list[Sampled]
    split: str


def describe_dataset(url: str, split: str, endpoint: str | None, salt: str = "") -> Described:
    """The dataset at `url`, with samples of `split`; parts that are not there are empty.

    Raises:
        DataError: it is damaged.
    """
    dataset = open_dataset(url, split, endpoint)
    manifest, directory = dataset.manifest, dataset.directory
    statistics = find_statistics(directory, manifest)
    dropped = sorted(manifest.dropped.items(), key=lambda d: (-d[1], d[0]))
    denied, contaminated = list_denied(directory, manifest.version)
    chosen = spread(len(dataset), SAMPLES)
    return Described(
        manifest=manifest,
        dropped=dropped,
        named=_in_turn(manifest.dropped_samples, [reason for reason, _ in dropped]),
        statistics=statistics,
        plots=draw_distribution(statistics, manifest.classes, salt) if statistics else [],
        measured=_measured(statistics) if statistics else [],
        denied=denied,
        contaminated=contaminated,
        samples=[_sampled(card) for card in cards([(dataset, n, "") for n in chosen])],
        split=split,
    )


def _in_turn(samples: list[dict[str, str]], reasons: list[str]) -> list[dict[str, str]]:
    """The first of each reason, then the second ones, up to `NAMED`; in the order of `reasons`."""
    of = {reason: [s for s in samples if s["reason"] == reason][:NAMED] for reason in reasons}
    turns = [(turn, place) for turn in range(NAMED) for place, reason in enumerate(reasons) if turn < len(of[reason])][:NAMED]
    return [of[reasons[place]][turn] for place, turn in sorted((place, turn) for turn, place in turns)]


def _measured(statistics: Statistics) -> list[Measured]:
    pixels: Callable[[float], str] = "{:,.0f}".format
    spelt: dict[str, tuple[str, Callable[[float], str]]] = {
        "width": ("width, pixels", pixels),
        "height": ("height, pixels", pixels),
        "aspect_ratio": ("width : height", ratio_text),
        "image_bytes": ("image file", format_bytes),
        "caption_bytes": ("caption, bytes", pixels),
    }
    rows = [(name, statistics.measures[measure], spell) for measure, (name, spell) in spelt.items()]
    rows += [(name, column, "{:.4g}".format) for name, column in statistics.columns.items()]
    return [_row(name, quantity, spell) for name, quantity, spell in rows if quantity.counts]


def _row(name: str, quantity: Quantity, spell: Callable[[float], str]) -> Measured:
    assert quantity.least is not None and quantity.mean is not None and quantity.most is not None, "some samples have it"
    low, median, high = (spell(quantity.quantile(share)) for share in (0.05, 0.5, 0.95))
    mean = spell(quantity.mean) if spell is not ratio_text else ""  # 2 : 1 and 1 : 2 are 1 : 1 in the middle, their mean says 1.25
    return Measured(name, spell(quantity.least), low, median, mean, high, spell(quantity.most), quantity.missing)


def _sampled(card: Card) -> Sampled:
    return Sampled(_encode(card.image) if card.image else "", card.heading, shortened(card.text, _TEXT), card.mark)


def _encode(image: Image.Image) -> str:
    """PNG for drawings and for small images that were enlarged, JPEG for photographs."""
    sink = io.BytesIO()
    kind, save = ("png", partial(image.save, optimize=True)) if image.getcolors(4096) else ("jpeg", partial(image.save, quality=85))
    save(sink, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"
