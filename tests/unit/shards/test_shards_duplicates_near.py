"""Near pairs: exactly those that comparing all with all finds, and a rule for who stays that does not depend on how it is worked out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.duplicates.near import Bits, find_matches, find_pairs, masks_for, settle

NEAR = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 11, 16])


@st.composite
def families(draw: st.DrawFn) -> np.ndarray:
    """Distinct hashes, many of them a few bits from others; uint64, in no order."""
    seeds = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    found = set(seeds)
    for start in seeds:
        hash_ = start
        for flipped in draw(st.lists(st.lists(st.integers(0, 63), max_size=6), max_size=10)):
            hash_ ^= sum(1 << bit for bit in set(flipped))
            found.add(hash_)
    return np.array(draw(st.permutations(sorted(found))), dtype=np.uint64)


def brute(one: np.ndarray, other: np.ndarray, near: int) -> set[tuple[int, int, int]]:
    return {(i, j, d) for i, a in enumerate(one.tolist()) for j, b in enumerate(other.tolist()) if (d := (a ^ b).bit_count()) <= near}


@settings(max_examples=80, deadline=None)
@given(hashes=families(), near=NEAR, count=st.sampled_from([100, 10**5, 10**7]))
def test_pairs_are_those_of_comparing_all(hashes: np.ndarray, near: int, count: int) -> None:
    """Whichever number of blocks is the cheapest; and each pair comes of one mask alone."""
    masks = masks_for(near, count)
    found = []
    for which in range(len(masks)):
        one, other, distance = find_pairs(hashes, near, masks, which)
        found += list(zip(np.minimum(one, other).tolist(), np.maximum(one, other).tolist(), distance.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert set(found) == {(i, j, d) for i, j, d in brute(hashes, hashes, near) if i < j}


@settings(max_examples=100, deadline=None)
@given(hashes=families(), near=NEAR, share=st.floats(0, 1))
def test_matches_are_those_of_comparing_all(hashes: np.ndarray, near: int, share: float) -> None:
    queries, table = hashes[: round(len(hashes) * share)], hashes[len(hashes) // 3 :]
    found = list(zip(*(part.tolist() for part in find_matches(queries, table, near)), strict=True))
    assert len(set(found)) == len(found) and set(found) == brute(queries, table, near)


def test_no_pair_is_missed_among_many() -> None:
    """Planted among 200,000, at each distance; the bits that differ lie anywhere."""
    random = np.random.default_rng(0)
    hashes = np.unique(random.integers(0, 2**64 - 1, 200_000, dtype=np.uint64))
    planted = []
    for near in range(1, 7):
        for row in random.integers(0, len(hashes), 50).tolist():
            flipped = sum(1 << bit for bit in random.choice(64, near, replace=False).tolist())
            planted.append((int(hashes[row]), int(hashes[row]) ^ flipped, near))
    everything = np.unique(np.append(hashes, np.array([copy for _, copy, _ in planted], dtype=np.uint64)))
    for near in (2, 4, 6):
        masks = masks_for(near, len(everything))
        found = set()
        for which in range(len(masks)):
            one, other, _ = find_pairs(everything, near, masks, which)
            found |= {frozenset(pair) for pair in zip(everything[one].tolist(), everything[other].tolist(), strict=True)}
        assert {frozenset(pair[:2]) for pair in planted if pair[2] <= near} <= found


def test_masks_are_fewer_where_less_has_to_be_told_apart() -> None:
    assert len(masks_for(0, 100)) == 1 and len(masks_for(4, 100)) == 5
    assert len(masks_for(4, 100)) <= len(masks_for(4, 10**6)) < len(masks_for(4, 10**9)) <= 500
    for near in (1, 4, 9, 16):
        masks = masks_for(near, 10**9)
        assert all(mask.bit_count() == masks[0].bit_count() or abs(mask.bit_count() - masks[0].bit_count()) <= near for mask in masks)


def greedy(count: int, pairs: dict[tuple[int, int], int]) -> dict[int, tuple[int, int]]:
    """One after the other: who goes, and the first it is near to that stays."""
    gone: dict[int, tuple[int, int]] = {}
    for image in range(count):
        before = [other for other in range(image) if (other, image) in pairs and other not in gone]
        if before:
            gone[image] = before[0], pairs[before[0], image]
    return gone


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(2, 25), cuts=st.lists(st.integers(1, 24), max_size=3))
def test_who_stays_is_decided_one_after_the_other(data: st.DataObject, count: int, cuts: list[int]) -> None:
    """In rounds and by ranges, as if by going through all in order."""
    numbers = st.integers(0, count - 1)
    chosen = data.draw(st.sets(st.tuples(numbers, numbers).filter(lambda p: p[0] < p[1]), max_size=60))
    pairs = {pair: 1 + sum(pair) % 4 for pair in chosen}
    gone, found = Bits(count), {}
    for first, end in zip([0, *sorted(cuts)], [*sorted(cuts), count], strict=True):
        part = data.draw(st.permutations([p for p in pairs if first <= p[1] < end]))
        low, high = (np.array([p[side] for p in part], dtype=np.int64) for side in (0, 1))
        who, of, distance = settle(low, high, np.array([pairs[p] for p in part], dtype=np.uint8), gone)
        assert who.tolist() == sorted(who.tolist())
        found |= dict(zip(who.tolist(), zip(of.tolist(), distance.tolist(), strict=True), strict=True))
    assert found == greedy(count, pairs)
    assert np.flatnonzero(gone.has(np.arange(count))).tolist() == sorted(found)


def test_a_chain_loses_no_picture_that_is_like_none_that_stays() -> None:
    """a ~ b ~ c ~ d: b goes for a, so c stays, and d goes for c."""
    low, high = np.array([0, 1, 2]), np.array([1, 2, 3])
    who, of, _ = settle(low, high, np.ones(3, dtype=np.uint8), Bits(4))
    assert who.tolist() == [1, 3] and of.tolist() == [0, 2]


def test_too_many_pairs_are_refused() -> None:
    near = np.array([sum(1 << bit for bit in (a, b)) for a in range(64) for b in range(a)], dtype=np.uint64)
    with pytest.raises(OverflowError, match="more than 100 near pairs"):
        for which in range(5):
            find_pairs(near, 4, masks_for(4, len(near)), which, most=100)
