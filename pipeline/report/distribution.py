"""Pictures of how a dataset is distributed, from its `Statistics`: sizes, shapes, captions, classes, scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.core.units import format_bytes, format_count
from pipeline.report.plots import ACCENT, INK, MUTED, SECOND, Plot, canvas, style, tidy, to_svg
from pipeline.shards.statistics import Quantity, Statistics

_FEW_CLASSES = 30  # that are named, a bar each
_NAME = 24  # letters of a class
_BARS = 48  # of a column
OUTSIDE = 0.005  # of the samples, at each end, may lie beyond a picture
_TICKS = 7
_RATIOS = [(1, 1), (1, 2), (2, 1), (3, 4), (4, 3), (9, 16), (16, 9), (2, 3), (3, 2)]  # the first ones are named where room is scarce
_ROOM = 0.085  # of an axis, between the middles of two names

Bar = tuple[float, float, int]  # from, up to, images
Ticks = Callable[[float, float], list[tuple[float, str]]]  # (from, to) of an axis -> places on it, and what stands there


def draw_distribution(statistics: Statistics, classes: Sequence[str], salt: str = "") -> list[Plot]:
    """What there is to draw. `classes`: their names, in the order of their numbers; `salt` tells figures of several runs apart."""
    measures = statistics.measures
    plots = [
        _draw_sizes(measures["width"], measures["height"], salt),
        _draw_octaves("Shape", "width : height", measures["aspect_ratio"], _ratio_ticks, ratio_text, salt),
        _draw_octaves("Size of an image file", "bytes", measures["image_bytes"], _byte_ticks, format_bytes, salt),
    ]
    if measures["caption_bytes"].counts:
        plots.append(_draw_octaves("Length of a caption", "bytes", measures["caption_bytes"], _number_ticks, _whole, salt))
    if statistics.labels:
        plots.append(_draw_classes(statistics.labels, classes, salt))
    plots += [_draw_column(name, column, salt) for name, column in statistics.columns.items() if column.counts]
    return plots


def ratio_text(ratio: float) -> str:
    """`1.78 : 1`, `1 : 1.5`."""
    larger = max(ratio, 1 / ratio)
    spelt = f"{larger:.3g}" if larger < 100 else f"{larger:,.0f}"
    return f"{spelt} : 1" if ratio >= 1 else f"1 : {spelt}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _draw_sizes(width: Quantity, height: Quantity, salt: str) -> Plot:
    with mpl.rc_context(style(f"sizes {salt}")):
        figure, axes = canvas()
        lines = [("height", height, SECOND), ("width", width, ACCENT)]
        if width == height:
            lines = [("width and height", width, ACCENT)]
        for label, quantity, colour in lines:
            axes.stairs(quantity.counts, np.log2(quantity.edges), color=colour, linewidth=1.8, label=label)
        view, beyond = _view([width, height])
        _set_limits(axes, view)
        _finish(axes, "side, pixels", _number_ticks)
        axes.legend(frameon=False, labelcolor=INK, handlelength=1.4, loc="best")
        told = [f"{name} {_told(quantity, _whole)}" for name, quantity in (("Width", width), ("height", height))]
        caption = f"Images by width and by height, in pixels. {'; '.join(told)}.{beyond}"
        return Plot("Width and height", caption, to_svg(figure, caption))


def _draw_octaves(title: str, unit: str, quantity: Quantity, ticks: Ticks, spell: Callable[[float], str], salt: str) -> Plot:
    """Bars on a logarithmic axis; the bins of `quantity` are all of the same width there."""
    with mpl.rc_context(style(f"{title} {salt}")):
        figure, axes = canvas()
        view, beyond = _view([quantity])
        _bars(axes, [(math.log2(left), math.log2(right), count) for left, right, count in _inside(quantity, view)])
        _set_limits(axes, view)
        _finish(axes, unit, ticks)
        caption = f"Images by {title[0].lower()}{title[1:]}: {_told(quantity, spell)}.{beyond}"
        return Plot(title, caption, to_svg(figure, caption))


def _draw_column(name: str, column: Quantity, salt: str) -> Plot:
    with mpl.rc_context(style(f"column {name} {salt}")):
        figure, axes = canvas()
        view, beyond = _view([column])
        bars = _rebinned(_inside(column, view))
        _bars(axes, bars)
        room = 0.03 * (bars[-1][1] - bars[0][0])
        axes.set_xlim(bars[0][0] - room, bars[-1][1] + room)
        tidy(axes, "images", "from zero", "")
        axes.set_xlabel(_plain(name), color=MUTED, parse_math=False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}" if abs(value) < 10_000 else format_count(value))
        caption = f"Images by {name}: {_told(column, '{:.3g}'.format)}.{beyond}"
        return Plot(name, caption, to_svg(figure, caption))


def _draw_classes(labels: Sequence[int], classes: Sequence[str], salt: str) -> Plot:
    names = [classes[n] if n < len(classes) else str(n) for n in range(len(labels))]
    order = sorted(range(len(labels)), key=lambda n: (-labels[n], n))
    most, least = order[0], order[-1]
    told = f"{labels[most]:,} ({names[most]}) to {labels[least]:,} ({names[least]}), median {np.median(labels):,.0f}"
    with mpl.rc_context(style(f"classes {salt}")):
        if len(labels) <= _FEW_CLASSES:
            figure = Figure(figsize=(5.4, max(1.6, 0.9 + 0.24 * len(labels))), layout="constrained")
            axes = figure.add_subplot()
            axes.barh(range(len(order)), [labels[n] for n in order], height=0.72, color=ACCENT)
            tidy(axes, "", "linear", "images")
            axes.grid(visible=False, axis="y")
            axes.invert_yaxis()
            axes.set_yticks(range(len(order)), [_plain(names[n]) for n in order], parse_math=False)
        else:
            figure, axes = canvas()
            axes.stairs([labels[n] for n in order], color=ACCENT, fill=True)
            axes.set_xlim(0, len(order))
            axes.set_ylim(0.5 * max(1, labels[least]), 1.1 * labels[most])
            tidy(axes, "images", "log" if labels[most] > 20 * max(1, labels[least]) else "from zero", "classes, the largest first")
        caption = f"Images of each of {len(labels):,} classes: {told}."
        return Plot("Images of a class", caption, to_svg(figure, caption))


def _plain(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= _NAME else line[: _NAME - 2].rstrip() + ".."


def _told(quantity: Quantity, spell: Callable[[float], str]) -> str:
    assert quantity.least is not None and quantity.most is not None, "somebody has one"
    return f"{spell(quantity.least)} to {spell(quantity.most)}, median about {spell(quantity.quantile(0.5))}"


def _bars(axes: Axes, bars: Sequence[Bar]) -> None:
    lefts, widths, heights = zip(*((left + 0.04 * (right - left), 0.92 * (right - left), n) for left, right, n in bars), strict=True)
    axes.bar(lefts, heights, widths, align="edge", color=ACCENT)


def _view(quantities: Sequence[Quantity]) -> tuple[tuple[float, float], str]:
    """From where to where a picture goes, so that a few far ones do not press all others together; and a sentence on these."""
    low, high = math.inf, -math.inf
    for q in quantities:
        reach, few = np.cumsum(q.counts), OUTSIDE * q.total
        first, last = int(np.searchsorted(reach, few, side="right")), int(np.searchsorted(reach, q.total - few))
        low, high = min(low, q.edges[first]), max(high, q.edges[last + 1])
    beyond = sum(q.total - sum(n for *_, n in _inside(q, (low, high))) for q in quantities)
    return (low, high), f" {beyond:,} more extreme ones lie beyond the picture." if beyond else ""


def _inside(quantity: Quantity, view: tuple[float, float]) -> list[Bar]:
    """The bins that hold something there."""
    bins = zip(pairwise(quantity.edges), quantity.counts, strict=True)
    return [(left, right, n) for (left, right), n in bins if n and view[0] <= left and right <= view[1]]


def _set_limits(axes: Axes, view: tuple[float, float]) -> None:
    left, right = math.log2(view[0]), math.log2(view[1])
    room = max(0.03 * (right - left), (2 - (right - left)) / 2)  # two octaves at least
    axes.set_xlim(left - room, right + room)


def _finish(axes: Axes, unit: str, ticks: Ticks) -> None:
    tidy(axes, "images", "from zero", unit)
    low, high = axes.get_xlim()
    places, names = zip(*ticks(2**low, 2**high), strict=True)
    axes.set_xticks([math.log2(place) for place in places], names)


def _octaves(low: float, high: float) -> list[float]:
    """Powers of two inside, not too many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = next(s for s in (1, 2, 3, 5, 10, 100) if (last - first) // s < _TICKS)
    return [2.0**k for k in range(first, last + 1) if (k - first) % step == 0]


def _number_ticks(low: float, high: float) -> list[tuple[float, str]]:
    return [(n, format_count(n) if n >= 100_000 else f"{n:,.0f}" if n >= 1 else f"{n:g}") for n in _octaves(low, high)]


def _byte_ticks(low: float, high: float) -> list[tuple[float, str]]:
    return [(n, format_bytes(n).replace(".0 ", " ")) for n in _octaves(low, high)]


def _ratio_ticks(low: float, high: float) -> list[tuple[float, str]]:
    if high / low <= 6:
        named = list[tuple[float, str]]()
        for w, h in _RATIOS:
            if low < w / h < high and all(abs(math.log(w / h / other)) > _ROOM * math.log(high / low) for other, _ in named):
                named.append((w / h, f"{w}:{h}"))
        return named
    # Even powers are those of a square, so that 1:1 is always among them.
    reach = math.floor(max(-math.log2(low), math.log2(high)))
    step = max(1, -(-reach // 4))
    powers = [k for k in range(-reach // step * step, reach + 1, step) if low <= 2.0**k <= high]
    return [(2.0**k, f"{2**k:,}:1" if k >= 0 else f"1:{2**-k:,}") for k in powers]


def _rebinned(bins: Sequence[Bar]) -> list[Bar]:
    """At most `_BARS` bins of one width, which is that of the given ones times a power of two."""
    width = min(right - left for left, right, _ in bins)
    while math.floor(bins[-1][0] / width) - math.floor(bins[0][0] / width) >= _BARS:
        width *= 2
    counts = Counter[int]()
    for left, _, n in bins:
        counts[math.floor(left / width)] += n
    return [(width * k, width * (k + 1), counts[k]) for k in sorted(counts)]
