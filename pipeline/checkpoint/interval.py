"""How often to save, and whether a save fits a preemption notice."""

from __future__ import annotations

import math

# What is believed before anything was seen: one failure a day of running, worth as much as a day of watching.
PRIOR_SECONDS, PRIOR_FAILURES = 86_400.0, 1.0
LEAST = 10.0  # seconds


def mean_time_between_failures(seconds: float, failures: int) -> float:
    """Seconds, after `failures` in `seconds` of running, by a gamma prior of one failure a day."""
    return (seconds + PRIOR_SECONDS) / (failures + PRIOR_FAILURES)


def best_interval(cost: float, between_failures: float, in_flight: float) -> float:
    """Seconds of training between two saves that lose the least, where a save costs `cost` seconds of training and is committed after
    `in_flight` (Young 1974: sqrt(2 C M); Daly 2006, equation 37, with his higher-order terms, and M where C >= 2 M)."""
    if cost >= 2 * between_failures:
        interval = between_failures
    else:
        ratio = cost / (2 * between_failures)
        interval = math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
    return max(interval, in_flight, LEAST)
