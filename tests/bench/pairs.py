"""Commands raced against each other: A B A B .., each a process of its own that prints one JSON line with its figure."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np


def figure(command: str | Sequence[str], name: str = "images_per_s") -> float:
    """The value `name` in the last JSON line that `command` prints."""
    arguments = shlex.split(command) if isinstance(command, str) else list(command)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{shlex.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(json.loads(lines[-1])[name])


def race(
    ours: str | Sequence[str], others: Mapping[str, str | Sequence[str]], pairs: int, name: str = "images_per_s"
) -> dict[str, list[float]]:
    """`pairs` rounds of ours and each of the others in turn; what each gave, round by round ("ours" among them)."""
    found: dict[str, list[float]] = {"ours": [], **{other: [] for other in others}}
    for n in range(pairs):
        for who, command in {"ours": ours, **others}.items():
            found[who].append(figure(command, name))
            print(f"  pair {n + 1}: {who} {found[who][-1]:,.4g} {name}", file=sys.stderr, flush=True)
    return found


def ratios(found: Mapping[str, list[float]], other: str) -> tuple[float, float, float]:
    """(least, median, most) of ours over the other's, pair by pair."""
    each = [a / b for a, b in zip(found["ours"], found[other], strict=True)]
    return min(each), statistics.median(each), max(each)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def interval(ratios: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(lower end, median, upper end) of the 95% interval of the median."""
    values = np.asarray(ratios)
    medians = np.median(np.random.default_rng(0).choice(values, (draws, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), median(ratios), float(high)


def ratio_of_medians(ours: Sequence[float], others: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(lower end, ratio, upper end) of the median of the others' seconds over that of ours, taken in pairs: its 95% interval where the
    pairs are drawn again."""
    pairs = np.asarray([ours, others])
    drawn = np.median(pairs[:, np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))], axis=2)
    low, high = np.percentile(drawn[1] / drawn[0], [2.5, 97.5])
    return float(low), median(others) / median(ours), float(high)


def machine() -> str:
    """Date and machine, for the head of a table of results."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in about if line.startswith("model name")), platform.processor())
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores of {model}, Python {platform.python_version()}"
