"""The order: a permutation an epoch, a pure function, few bytes and requests at any world size, and well mixed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.mixture import PARTS, Mixture, whole_shares
from pipeline.stream.order import Order, permute, transposed

SHARDS = st.lists(st.integers(0, 700), min_size=1, max_size=20).filter(any)


@settings(max_examples=80, deadline=None)
@given(sizes=SHARDS, block=st.sampled_from([1, 2, 7, 64]), row=st.integers(1, 3000), epoch=st.integers(0, 3), seed=st.integers(0, 9))
def test_every_sample_once_an_epoch(sizes: list[int], block: int, row: int, epoch: int, seed: int) -> None:
    order = Order(np.array(sizes), "view", seed, block=block, row=row)
    n = order.size
    assert (np.sort(order.samples(epoch * n, n)) == np.arange(n)).all()


@settings(max_examples=100, deadline=None)
@given(sizes=SHARDS, block=st.sampled_from([1, 4, 64]), row=st.integers(1, 500), data=st.data())
def test_any_stretch_of_positions_is_the_same_alone(sizes: list[int], block: int, row: int, data: st.DataObject) -> None:
    """Asked for in one go, or anew at any position, over the ends of epochs: nothing depends on what was asked before."""
    size = sum(sizes)
    start, count = data.draw(st.integers(0, 3 * size)), data.draw(st.integers(1, size))
    whole = Order(np.array(sizes), "view", 3, block=block, row=row).samples(0, 4 * size)
    assert (Order(np.array(sizes), "view", 3, block=block, row=row).samples(start, count) == whole[start : start + count]).all()


@pytest.mark.parametrize("block", [1, 64])
def test_epochs_seeds_and_views_have_orders_of_their_own(block: int) -> None:
    sizes = np.array([700, 300, 1000])

    def first(view: str = "view", seed: int = 0, epoch: int = 1) -> list[int]:
        return Order(sizes, view, seed, block=block, row=64).samples(epoch * 2000, 2000).tolist()

    orders = [first(), first(view="other"), first(seed=1), first(epoch=2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


def test_the_order_stays_what_it_was() -> None:
    """A run must go on after an upgrade of Tessera, numpy or the machine: these numbers are for ever."""
    assert Order(np.array([40, 60]), "view", 7).samples(95, 10).tolist() == GOLDEN[1]
    assert Order(np.array([400, 600]), "view", 7, block=16, row=8).samples(995, 10).tolist() == GOLDEN[16]


GOLDEN = {1: [76, 55, 91, 15, 96, 34, 18, 24, 25, 11], 16: [278, 45, 423, 430, 999, 146, 303, 162, 518, 937]}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permute(size: int) -> None:
    keys = np.arange(6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert (np.sort(permute(np.arange(size), size, keys)) == np.arange(size)).all()


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 400), row=st.fractions(1, 500, max_denominator=50))
def test_transposed(size: int, row: Fraction) -> None:
    """As a person would do it: write the numbers in rows, row t from ceil(t row) on, and list the columns."""
    table: dict[tuple[int, int], int] = {}
    t = 0
    for place in range(size):
        while math.ceil((t + 1) * row) <= place:
            t += 1
        table[place - math.ceil(t * row), t] = place
    by_columns = [table[at] for at in sorted(table)]
    found = transposed(np.arange(size), size, row)
    assert [by_columns[i] for i in found] == list(range(size))


# Reading: what a rank on a machine of its own fetches, without any sharing

SAMPLE, INDEX_ROW = 40_000, 70  # bytes of a photograph in a shard, and of its row in the index


def cost(order: Order, sizes: np.ndarray, batch: int, micro: int, world_size: int, epoch: int) -> tuple[float, float]:
    """(bytes fetched over bytes used, requests a 1,000 samples) of an epoch."""
    first = epoch * order.size
    numbers, positions = order.samples(first, order.size), np.arange(first, first + order.size)
    pieces = batch // micro
    owners = np.repeat(np.arange(world_size), np.diff(np.arange(world_size + 1) * pieces // world_size))
    rank = owners[positions % batch // micro]
    ends = np.cumsum(sizes)
    shard = np.searchsorted(ends, numbers, side="right")
    block = (numbers - (ends[shard] - sizes[shard])) // order.block
    window = np.searchsorted(order._epoch(epoch).window_starts, positions - first, side="right")
    blocks = np.unique((rank * 1000 + shard) * 1000 + block)
    looks = np.unique((rank * 1000 + window) * 1000 + shard)  # an index is kept for a window, and no longer
    samples = np.minimum(order.block, sizes[blocks // 1000 % 1000] - blocks % 1000 * order.block).sum()
    fetched = samples * SAMPLE + (sizes[looks % 1000] * INDEX_ROW).sum()
    return fetched / (order.size * SAMPLE), (len(blocks) + len(looks)) / order.size * 1000


@pytest.mark.parametrize(("batch", "micro"), [(4096, 64), (6000, 50), (1024, 16)])
def test_bytes_and_requests_at_any_world_size(batch: int, micro: int) -> None:
    sizes = np.full(120, 5000)
    order = Order(sizes, "view", 0, block=64, row=batch)
    for world_size in (1, 2, 3, 5, 7, 8, 16, 31, 48, 64):
        share, requests = cost(order, sizes, batch, micro, world_size, epoch=1)
        print(
            f"batch {batch}, micro-batch {micro}, {world_size} ranks: {share:.3f} bytes fetched a byte used, {requests:.1f} requests a 1,000"
        )
        assert share <= 1.25 and requests <= 25


def test_a_mixture_reads_as_little() -> None:
    """Each dataset's rows are its share of the batch."""
    shares, shards = (0.7, 0.3), 40
    orders = [
        Order(np.full(shards, 5000), name, 0, block=64, row=Fraction(4096 * share, PARTS))
        for name, share in zip("ab", whole_shares(shares), strict=True)
    ]
    places = Mixture(orders, shares).at(0, 1_400_000)
    rank = np.arange(len(places.number)) % 4096 // 64
    for d in (0, 1):
        epoch = (places.dataset == d) & (places.epoch == 1)
        assert epoch.sum() == shards * 5000
        number = places.number[epoch]
        blocks = np.unique((rank[epoch] * 1000 + number // 5000) * 1000 + number % 5000 // 64)
        assert len(blocks) * 64 / epoch.sum() <= 1.25


# Mixing, against a perfect shuffle

CLASSES, SAMPLES = 1000, 1_280_000


@pytest.fixture(scope="module")
def sorted_by_class() -> dict[int, Order]:
    """256 shards; sample n is of class n * 1000 // 1,280,000, as of a folder a class, written one after the other."""
    return {batch: Order(np.full(256, 5000), "view", 0, block=64, row=batch) for batch in (256, 1024, 4096)}


def classes_a_batch(order: Order, batch: int, epoch: int, step: int) -> float:
    start = epoch * SAMPLES
    counts = [len(np.unique(order.samples(start + s * batch, batch) * CLASSES // SAMPLES)) for s in range(0, SAMPLES // batch - 1, step)]
    return float(np.mean(counts))


@pytest.mark.parametrize(("batch", "least"), [(256, 0.85), (1024, 0.65), (4096, 0.45)])
def test_classes_in_a_batch_from_sorted_shards(sorted_by_class: dict[int, Order], batch: int, least: float) -> None:
    chance = CLASSES * (1 - (1 - 1 / CLASSES) ** batch)
    found = classes_a_batch(sorted_by_class[batch], batch, epoch=1, step=max(1, 8192 // batch) * 5)
    print(f"batch {batch}: {found:.0f} classes, by chance {chance:.0f}: {found / chance:.2f}")
    assert found / chance >= least


@pytest.mark.parametrize("batch", [256, 4096])
def test_how_often_two_samples_meet_again(sorted_by_class: dict[int, Order], batch: int) -> None:
    """Of the pairs in one batch, those in one batch of the next epoch too: a shuffle by blocks alone would keep blocks together."""
    order = sorted_by_class[batch]
    steps = [np.empty(SAMPLES, dtype=np.int64) for _ in range(2)]
    for epoch, step in enumerate(steps, start=1):
        step[order.samples(epoch * SAMPLES, SAMPLES)] = (np.arange(SAMPLES) + epoch * SAMPLES) // batch
    together = np.unique(steps[0] * SAMPLES + steps[1], return_counts=True)[1]
    met = int((together * (together - 1)).sum()) / SAMPLES  # ordered pairs a sample that met in both epochs
    chance = (batch - 1) ** 2 / SAMPLES
    print(f"batch {batch}: {met:.3f} met again a sample, by chance {chance:.3f}: {met / chance:.2f}")
    assert met / chance <= 2
