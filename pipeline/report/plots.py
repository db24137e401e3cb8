"""Curves of a run as inline SVG that takes its colours from the page, so that it reads in light and in dark.

matplotlib draws with placeholder colours; each is then replaced by a CSS variable of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.core.units import format_count

# Placeholder -> what stands in the page.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--second)",
    "#060606": "var(--right)",
    "#070707": "var(--wrong)",
}
INK, MUTED, LINE, ACCENT, SECOND, RIGHT, WRONG = _COLOURS
_POINTS = 600  # of one line; more cannot be told apart

Row = dict[str, float]


@dataclass(frozen=True)
class Plot:
    """One figure: `svg` is markup to put into the page as it is; `caption` tells what it shows, with its last values."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Line:
    name: str  # of the metric
    label: str
    colour: str


# Objective -> what its loss is counted in, and what its top-1 counts. Others say `loss` and `top-1, %`.
_UNITS = {
    "classify": ("cross-entropy, nats", "top-1, %"),
    "distil": ("cross-entropy, nats", "top-1, %"),
    "next-pixel": ("nats a pixel", ""),
    "bert-pixels": ("nats a masked pixel", ""),
    "pixels-and-classes": ("nats a pixel and nats an image", "top-1, %"),
    "masked-patches": ("nats a masked patch", "mean colours that are right, %"),
    "mae": ("mean squared error of masked patches", ""),
    "contrastive": ("cross-entropy, nats", "nearest to their own caption, %"),
    "sigmoid-contrastive": ("nats an image", "nearest to their own caption, %"),
    "caption": ("nats a token", "tokens that are right, %"),
    "bag-of-words": ("nats a caption", "likeliest word is in the caption, %"),
}


def draw_curves(history: Sequence[Row], objective: str = "classify", salt: str = "") -> list[Plot]:
    """The plots that the recorded metrics allow; `history` is as `read_history` gives it. `salt` tells figures of several runs apart."""
    train, held_out = ("train/", "training", SECOND), ("validate/", "held out", ACCENT)
    loss, top1 = _UNITS.get(objective, ("loss", "top-1, %"))
    wanted = [
        ("Loss", loss, [_Line(f"{p}loss", label, colour) for p, label, colour in (train, held_out)], "linear"),
        ("Accuracy", top1, [_Line(f"{p}top1", label, colour) for p, label, colour in (train, held_out)], "percent"),
        ("Logit scale", "what cosines are multiplied by", [_Line("train/logit_scale", "logit scale", ACCENT)], "linear"),
        (
            "Nearest neighbours and captions",
            "top-1, %",
            [_Line("validate/knn", "nearest neighbours", SECOND), _Line("validate/zero_shot", "captions (zero-shot)", ACCENT)],
            "percent",
        ),
        ("Learning rate", "learning rate", [_Line("train/lr", "learning rate", ACCENT)], "linear"),
        ("Gradient norm", "2-norm of the gradient", [_Line("train/grad_norm", "gradient norm", ACCENT)], "log"),
        ("Update-to-weight ratio", "norm of update / norm of weights", [_Line("train/update_ratio", "ratio", ACCENT)], "log"),
        ("Throughput", "images/s", [_Line("train/images_per_s", "images/s", ACCENT)], "from zero"),
        ("Model FLOPs utilisation", "share of the devices' peak, %", [_Line("train/mfu", "MFU", ACCENT)], "share"),
        ("Power", "W, all devices", [_Line("power/watts", "W", ACCENT)], "linear"),
        ("Waiting for data", "share of the time, %", [_Line("train/data_wait_fraction", "waiting", ACCENT)], "share"),
    ]
    plots = [_draw(history, title, unit, lines, scale, salt) for title, unit, lines, scale in wanted]
    return [plot for plot in plots if plot is not None]


def draw_layers(layers: Sequence[dict[str, Any]], best: int, suite: str, salt: str = "") -> Plot:
    """The linear probe of each layer, as `evaluate_layers` gives it; the layer that was chosen is marked."""
    with mpl.rc_context(style(f"layers {suite} {salt}")):
        figure, axes = canvas()
        x = [row["layer"] for row in layers]
        for key, label, colour in (("held_out_top1", "held out", SECOND), ("top1", "test", ACCENT)):
            axes.plot(x, [100 * row[key] for row in layers], color=colour, linewidth=1.8, label=label, marker="o", markersize=3)
        chosen = next(row for row in layers if row["layer"] == best)
        axes.axvline(best, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.plot([best], [100 * chosen["top1"]], color=ACCENT, marker="o", markersize=8, markerfacecolor="none", markeredgewidth=1.6)
        tidy(axes, "top-1, %", "percent", "layer")
        axes.legend(frameon=False, labelcolor=INK, handlelength=1.4, loc="best")
        top1 = f"{100 * chosen['top1']:.2f}%"
        caption = f"Linear probe of {suite} by layer. Layer {best} is the best on held-out images, and gets {top1} of the test images."
        return Plot(f"Linear probe by layer: layer {best} is chosen", caption, to_svg(figure, caption))


def style(salt: str) -> Any:
    return {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": salt, "axes.edgecolor": LINE, "text.color": INK}


def canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    return figure, figure.add_subplot()


def _draw(history: Sequence[Row], title: str, unit: str, lines: list[_Line], scale: str, salt: str) -> Plot | None:
    factor = 100.0 if scale in ("percent", "share") else 1.0
    series = [(line, points) for line in lines if (points := points_of(history, line.name, factor))]
    if not series:
        return None
    with mpl.rc_context(style(title + salt)):
        figure, axes = canvas()
        for line, points in series:
            x, y = zip(*thin(points), strict=True)
            few = len(x) <= 30
            axes.plot(x, y, color=line.colour, linewidth=1.8, label=line.label, marker="o" if few else "", markersize=3)
        tidy(axes, unit, scale)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=INK, handlelength=1.4, loc="best")
        last = ", ".join(
            f"{line.label} {_number(points[-1][1], scale)}" if len(lines) > 1 else _number(points[-1][1], scale) for line, points in series
        )
        caption = f"{title} by step. At the end: {last}{' images/s' if scale == 'from zero' else ''}."
        return Plot(title, caption, to_svg(figure, caption))


def points_of(history: Sequence[Row], name: str, factor: float) -> list[tuple[float, float]]:
    return [(row["step"], row[name] * factor) for row in history if row.get(name) is not None]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_POINTS` of them, evenly, the last kept."""
    every = -(-len(points) // _POINTS)
    return points if every == 1 else [*points[:-1:every], points[-1]]


def tidy(axes: Axes, unit: str, scale: str, x: str = "step") -> None:
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(unit, color=MUTED)
    axes.tick_params(colors=MUTED, length=0, pad=6)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if axes.get_xlim()[1] >= 20000 else "{x:,.0f}")
    low, high = axes.get_ylim()
    if scale == "log" and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 500 else (1.0,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif scale == "percent":
        axes.set_ylim(max(0, low), min(100.5, high))
    elif scale in ("from zero", "share"):
        axes.set_ylim(0, max(high, 1.0))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
        largest = max(abs(low), abs(high))
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{value:.3g}" if largest < 1000 else format_count(value))


def _number(value: float, scale: str) -> str:
    return f"{value:.2f}%" if scale in ("percent", "share") else format_count(value) if value >= 1000 else f"{value:.3g}"


def to_svg(figure: Figure, caption: str) -> str:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts write the text, not matplotlib's
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = sink.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and nothing refers to them
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    # The title speaks to screen readers; the size is the page's to choose.
    head = f'<svg role="img" aria-label="{_escape(caption)}"'
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1).replace(
        "<svg", head, 1
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
