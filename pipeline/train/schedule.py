"""Learning rates as a pure function of the step, so that nothing of them needs saving.

t: steps done since the warm-up. T: steps after the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(t: int, steps: int, timescale: int) -> float:
    """arXiv 1608.03983, equation 5, one period, down to 0."""
    return 0.5 * (1 + math.cos(math.pi * t / steps))


def linear(t: int, steps: int, timescale: int) -> float:
    return 1 - t / steps


def constant(t: int, steps: int, timescale: int) -> float:
    return 1.0


def rsqrt(t: int, steps: int, timescale: int) -> float:
    """Reciprocal square root (arXiv 2106.04560, section 3.5): it does not depend on T, so a run can be made longer. After `timescale`
    steps it is 1 / sqrt 2."""
    return 1 / math.sqrt(1 + t / timescale)


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {"cosine": cosine, "linear": linear, "constant": constant, "rsqrt": rsqrt}


def factor(name: str, step: int, total: int, warmup: int, cooldown: int = 0, timescale: int = 10_000) -> float:
    """What the peak rate is multiplied by at `step` of `total` (from 0): linear over `warmup` steps, then the schedule `name`; over the
    last `cooldown` steps that too is multiplied by a line down to 0. `timescale` is that of rsqrt, in steps."""
    if step < warmup:
        return (step + 1) / warmup
    decay = SCHEDULES[name](step - warmup, max(1, total - warmup), timescale)
    return decay * min(1.0, (total - step) / cooldown) if cooldown else decay
