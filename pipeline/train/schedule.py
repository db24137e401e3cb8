"""Learning rates as a pure function of the step, so that nothing of them needs saving."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """arXiv 1608.03983, equation 5, one period, down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


def constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def factor(name: str, step: int, total: int, warmup: int) -> float:
    """What the peak rate is multiplied by at `step` of `total` (from 0): linear over `warmup` steps, then the decay."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[name]((step - warmup) / max(1, total - warmup))
