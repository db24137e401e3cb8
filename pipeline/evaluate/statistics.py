"""Intervals for accuracies. All are of 95% unless told otherwise; accuracies are fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import binomtest, t

CONFIDENCE = 0.95


def accuracy_interval(correct: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a proportion, `correct` of `total`: what other test images of the same kind might give.

    C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26 (1934); CLIP (arXiv 2103.00020, table 9) prints the same kind, at 99.5%.
    """
    assert 0 <= correct <= total and total > 0, "a count of a non-empty test split"
    interval = binomtest(correct, total).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)


def seeds_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(mean, low, high) of the accuracies of several seeds: mean +- t s / sqrt(n), kept within 0 and 1.

    Student, "The probable error of a mean", Biometrika 6 (1908). It tells how much the seed matters (the draw of the
    few shots, the order of fine-tuning), not how much another test split would: every seed saw the same test images.
    """
    n = len(values)
    assert n >= 2, "one value has no spread"
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)
    return mean, max(0.0, mean - half), min(1.0, mean + half)
