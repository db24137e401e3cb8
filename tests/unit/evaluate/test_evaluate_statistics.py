from __future__ import annotations

import pytest
from scipy.stats import beta

from pipeline.evaluate.statistics import accuracy_interval, seeds_interval


@pytest.mark.parametrize(("k", "n"), [(1, 10), (98, 100), (357, 360)])
def test_clopper_pearson_is_made_of_beta_quantiles(k: int, n: int) -> None:
    low, high = accuracy_interval(k, n)
    assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1), abs=1e-6)
    assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k), abs=1e-6)


def test_at_the_ends_the_interval_is_one_sided() -> None:
    assert accuracy_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1), abs=1e-6)
    assert accuracy_interval(10, 10) == pytest.approx((0.025**0.1, 1), abs=1e-6)


def test_student_interval_of_three_seeds() -> None:
    # t(.975, 2) = 4.302653; s = .01; 4.302653 * .01 / sqrt(3) = .0248414
    mean, low, high = seeds_interval([0.5, 0.51, 0.52])
    assert mean == pytest.approx(0.51)
    assert (mean - low, high - mean) == pytest.approx((0.0248414, 0.0248414), abs=1e-6)


def test_student_interval_stays_between_nothing_and_everything() -> None:
    assert seeds_interval([1.0, 0.9])[2] == 1.0
    assert seeds_interval([0.0, 0.1])[1] == 0.0
