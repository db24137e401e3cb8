from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.histogram import MOST, Histogram

LOG = {"is_log": True, "exponent": -2}
RATIO = {"is_log": True, "exponent": -3, "is_centred": True}


def of(values: list[float], **kind: object) -> Histogram:
    made = Histogram(**kind)  # type: ignore[arg-type]
    made.add(np.array(values, dtype=np.float64))
    return made


def test_bins_hold_what_lies_between_their_edges() -> None:
    made = of([1, 2, 3, 255, 256, 257, 640, 640], **LOG)
    edges, counts = made.steps()
    assert sum(counts) == made.total == 8 and len(edges) == len(counts) + 1 and edges == sorted(edges)
    for value, count in ((1, 1), (2, 1), (256, 2), (640, 2)):
        n = int(np.searchsorted(edges, value, side="right")) - 1
        assert edges[n] <= value < edges[n + 1] and counts[n] == count


def test_a_ratio_of_one_lies_in_the_middle_of_its_bin() -> None:
    edges, counts = of([1.0, 0.97, 1.03, 1.5], **RATIO).steps()
    assert counts == [3, 0, 1] and edges[0] * edges[1] == pytest.approx(1)
    assert edges[2] < 1.5 < edges[3]


def test_one_number_far_away_leaves_the_others_their_bins() -> None:
    scores = np.random.default_rng(0).normal(0.3, 0.05, 5000)
    alone, beside = of(scores.tolist()), of([*scores.tolist(), 1e9, -1e9])
    assert beside.exponent - alone.exponent <= 1 and len(beside.counts) > MOST // 2
    edges, counts = beside.steps()
    assert edges[0] <= -1e9 and edges[-1] > 1e9 and sum(counts) == 5002
    assert len(counts) <= 2 * MOST, "a gap is one empty bin, however wide"


@pytest.mark.parametrize("values", [[0.0], [-0.0, 0.0], [1e300, -1e300], [1.5e308] * 3, [5e-324, 1.0], [2.0**53 + 2, 2.0**53]])
def test_extreme_numbers_are_counted_between_their_edges(values: list[float]) -> None:
    edges, counts = of(values).steps()
    assert sum(counts) == len(values) and all(map(math.isfinite, edges))
    assert edges[0] <= min(values) and max(values) < edges[-1]


def test_the_most_extreme_shapes_are_counted() -> None:
    edges, counts = of([1 / (2**31 - 1), 1.0, 2**31 - 1.0], **RATIO).steps()
    assert [c for c in counts if c] == [1, 1, 1] and edges[0] <= 2**-30.9 and edges[-1] > 2**30.9


def test_nothing_counted_is_no_bins() -> None:
    assert of([]).steps() == ([], []) and of([]).total == 0


numbers = st.lists(st.floats(-1e6, 1e6, allow_nan=False), max_size=60)


@given(st.lists(numbers, max_size=6), st.randoms())
def test_the_sum_of_the_parts_is_the_whole_in_any_order(parts: list[list[float]], random: object) -> None:
    whole, summed = of([v for part in parts for v in part]), Histogram()
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for part in shuffled:
        summed.merge(of(part))
    assert summed == whole


def test_the_sum_of_many_wide_parts_is_the_whole_too() -> None:
    random = np.random.default_rng(1)
    values = np.concatenate([random.normal(0, 10.0**k, 400) for k in range(-6, 7)])
    for kind in ({}, LOG, RATIO):
        positive = np.abs(values) + 1e-9 if kind else values
        whole, summed = of(positive.tolist(), **kind), Histogram(**kind)  # type: ignore[arg-type]
        for part in np.array_split(random.permutation(positive), 9):
            summed.merge(of(part.tolist(), **kind))
        assert summed == whole
