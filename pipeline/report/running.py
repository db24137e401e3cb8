"""Pictures of how training ran: where its time went, the memory it took, and how each parameter moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from pipeline.report.plots import ACCENT, INK, LINE, MUTED, RIGHT, SECOND, WRONG, Plot, Row, canvas, points_of, style, thin, tidy, to_svg
from pipeline.train.speed import CHECKPOINT, COMMUNICATION, COMPUTE, INPUT, KINDS, OTHER, VALIDATION
from pipeline.train.statistics import LAYERS

_COLUMNS = 200  # of a picture over steps; more cannot be told apart
_NAMES = 16  # of parameters, written beside a picture; more would touch each other
_KIND_COLOURS = {COMPUTE: SECOND, INPUT: ACCENT, COMMUNICATION: RIGHT, CHECKPOINT: WRONG, VALIDATION: MUTED, OTHER: LINE}
_GIB = 2**30


def draw_running(history: Sequence[Row], salt: str = "") -> list[Plot]:
    """The pictures that the recorded metrics allow; `history` is as `read_history` gives it. `salt` tells figures of several runs apart."""
    pictures = [_draw_time(history, salt), _draw_memory(history, salt)]
    pictures += [_draw_parameters(history, salt, *what) for what in _ABOUT_PARAMETERS]
    return [each for each in pictures if each is not None]


def _draw_time(history: Sequence[Row], salt: str) -> Plot | None:
    """Shares of the steps' wall time, one on top of the other."""
    rows = [row for row in history if row.get("time/step")]
    if not rows:
        return None
    steps = [row["step"] - before["step"] for before, row in pairwise([{"step": 0.0}, *rows])]
    # A later job of the run may have begun anew at an earlier step than the one before ended at.
    spent = np.array([[max(1.0, n) * row[f"time/{kind}"] for kind in KINDS] for n, row in zip(steps, rows, strict=True)])  # seconds
    x, shares = [0.0], []
    many = -(-len(rows) // _COLUMNS)
    for start in range(0, len(rows), many):
        seconds = spent[start : start + many].sum(axis=0)
        shares.append(100 * seconds / seconds.sum())
        x.append(rows[min(start + many, len(rows)) - 1]["step"])
    whole = dict(zip(KINDS, 100 * spent.sum(axis=0) / spent.sum(), strict=True))
    shown = sorted((kind for kind in KINDS if whole[kind] > 0), key=lambda kind: kind != COMPUTE)
    with mpl.rc_context(style(f"time {salt}")):
        figure, axes = canvas()
        series = [[shares[0][KINDS.index(kind)], *(share[KINDS.index(kind)] for share in shares)] for kind in shown]
        labels = [f"{kind} {whole[kind]:.1f}%" for kind in shown]
        axes.stackplot(x, series, step="pre", labels=labels, colors=[_KIND_COLOURS[kind] for kind in shown], linewidth=0)
        tidy(axes, "share of a step's wall time, %", "share")
        axes.set_ylim(0, 100)
        axes.margins(x=0)
        figure.legend(frameon=False, labelcolor=INK, handlelength=1.0, loc="outside lower center", ncols=3, fontsize=9)
        told = ", ".join(f"{kind} {whole[kind]:.1f}%" for kind in shown)
        caption = f"Where the time of training goes, by step, as the mean over ranks. Over all: {told}."
        return Plot(f"Where the time goes: {whole[COMPUTE]:.1f}% compute", caption, to_svg(figure, caption))


def _draw_memory(history: Sequence[Row], salt: str) -> Plot | None:
    lines = [("memory/device_peak", "device", ACCENT), ("memory/host_peak", "host", SECOND)]
    series = [(label, colour, found) for name, label, colour in lines if (found := points_of(history, name, 1 / _GIB))]
    if not series:
        return None
    with mpl.rc_context(style(f"memory {salt}")):
        figure, axes = canvas()
        for label, colour, found in series:
            axes.plot(
                *zip(*thin(found), strict=True), color=colour, linewidth=1.8, label=label, marker="o" if len(found) <= 30 else "", ms=3
            )
        tidy(axes, "GiB", "linear")
        axes.set_ylim(0, 1.15 * max(value for _, _, found in series for _, value in found))
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=INK, handlelength=1.4, loc="best")
        last = ", ".join(f"{label} {found[-1][1]:.3g} GiB" for label, _, found in series)
        caption = f"The most memory that a worker had had, by step, of the worker that had most. At the end: {last}."
        return Plot("Peak memory of a worker", caption, to_svg(figure, caption))


# What is told of each parameter, the picture's title, and what its colours mean.
_ABOUT_PARAMETERS = (
    ("update_ratio", "Update-to-weight ratio by parameter", "norm of the update over that of the weights"),
    ("grad_norm", "Gradient norm by parameter", "2-norm of the gradient as the optimiser gets it"),
    ("weight_norm", "Weight norm by parameter", "2-norm of the weights"),
)


def _draw_parameters(history: Sequence[Row], salt: str, what: str, title: str, unit: str) -> Plot | None:
    """A row each parameter, in the model's order, and a column each time that they were looked at; colours are by powers of ten."""
    rows = [row for row in history if any(key.startswith(LAYERS) for key in row)]
    rows = rows[:: -(-len(rows) // _COLUMNS)] if rows else rows
    names = list(dict.fromkeys(key.split("/")[1] for row in rows for key in row if key.startswith(LAYERS)))
    values = np.array([[row.get(f"{LAYERS}{name}/{what}", 0.0) for row in rows] for name in names])
    if not names or not (values > 0).any():
        return None
    logs = np.log10(np.where(values > 0, values, np.nan))  # what is zero, or cannot be told, stays empty
    with mpl.rc_context(style(f"{what} {salt}")):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        # A few that are far below all others (steps at a rate of nearly zero) would leave the others one colour.
        drawn = axes.imshow(logs, aspect="auto", interpolation="nearest", cmap="viridis", vmin=np.nanpercentile(logs, 5))
        bar = figure.colorbar(drawn, ax=axes, shrink=0.9, pad=0.02, format=lambda value, _: f"{10**value:.2g}")
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=0)
        named = np.unique(np.linspace(0, len(names) - 1, min(_NAMES, len(names))).round().astype(int))
        axes.set_yticks(named, [names[n] for n in named], fontsize=7)
        at = np.unique(np.linspace(0, len(rows) - 1, min(5, len(rows))).round().astype(int))
        axes.set_xticks(at, [f"{rows[n]['step']:,.0f}" for n in at])
        axes.set_xlabel("step", color=MUTED)
        axes.tick_params(colors=MUTED, length=0, pad=6)
        for side in axes.spines.values():
            side.set_visible(False)
        low, high = 10 ** np.nanmin(logs), 10 ** np.nanmax(logs)
        caption = f"{title} and step: {unit}, from {low:.2g} to {high:.2g}; of {len(names)} parameters, at {len(rows)} steps."
        assert math.isfinite(low + high), "some are larger than zero"
        return Plot(title, caption, to_svg(figure, caption))
