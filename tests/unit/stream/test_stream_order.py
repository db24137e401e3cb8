from __future__ import annotations

import numpy as np
import pytest

from pipeline.stream.order import Order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_epoch_is_a_permutation(size: int) -> None:
    order = Order(size, "view", seed=3)
    numbers = order.samples(0, 3 * size).reshape(3, size)
    assert numbers.dtype == np.int64
    assert (np.sort(numbers, axis=1) == np.arange(size)).all()


def test_epochs_seeds_and_views_differ() -> None:
    size = 1000
    orders = [Order(size, "view", 0).samples(n * size, size) for n in range(2)]
    orders += [Order(size, "view", 1).samples(0, size), Order(size, "other", 0).samples(0, size), np.arange(size)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02  # two random permutations of 1,000 agree at one place on average


def test_it_is_pure() -> None:
    """Any slicing gives the same numbers, in the first epochs and in the millionth."""
    order = Order(37, "view", 5)
    whole = order.samples(0, 200)
    assert (np.concatenate([order.samples(n, 1) for n in range(200)]) == whole).all()
    assert (np.concatenate([Order(37, "view", 5).samples(s, 7) for s in range(0, 196, 7)]) == whole[:196]).all()
    far = 37 * 10**6 + 5
    assert (order.samples(far, 40)[10:20] == order.samples(far + 10, 10)).all()
    assert order.epoch_of(far) == 10**6 and order.epoch_of(36) == 0 and order.epoch_of(37) == 1


def test_neighbours_are_mixed() -> None:
    """Where a sample comes says nothing about its neighbours, and all places are as likely."""
    size = 4096
    first = np.array([Order(size, "view", seed).samples(0, 1)[0] for seed in range(400)])
    assert abs(first.mean() / size - 0.5) < 0.06  # four standard errors
    numbers = Order(size, "view", 0).samples(0, size)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
    assert (np.abs(np.diff(numbers)) == 1).mean() < 0.01


def test_a_large_dataset_costs_nothing() -> None:
    order = Order(10**12, "view")
    numbers = order.samples(3 * 10**12 - 5, 10)
    assert len(set(numbers.tolist())) == 10 and numbers.min() >= 0 and numbers.max() < 10**12


def test_without_shuffling() -> None:
    assert Order(5, "view", shuffle=False).samples(3, 5).tolist() == [3, 4, 0, 1, 2]
