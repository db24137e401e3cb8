from __future__ import annotations

import hashlib

import numpy as np

from pipeline.shards.layout import cut_by_bytes, cut_by_rows, group_of, key_order, planned_bytes, sample_key, split_of
from pipeline.shards.sources import Item


def test_a_key_is_a_hash_of_whatever_names_the_sample() -> None:
    assert sample_key("dog/a.jpg") == hashlib.sha256(b"dog/a.jpg").hexdigest()[:20]
    odd = ["a b/c.jpg", "ü/日本.png", "x" * 300, "caf\udce9.png", "a/b/c/d.jpg"]
    assert len({sample_key(name) for name in odd}) == len(odd) and all(len(sample_key(name)) == 20 for name in odd)


def test_adding_images_moves_none_between_splits() -> None:
    splits = {"a": 0.3, "b": 0.3, "c": 0.4}
    assert {split_of(sample_key(str(n)), splits) for n in range(100)} == {"a", "b", "c"}
    assert split_of("f" * 20, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == "c"
    assert split_of("0" * 20, splits) == "a"


def test_the_order_is_not_that_of_the_split() -> None:
    keys = sorted(sample_key(str(n)) for n in range(3000))
    orders = [key_order(key) for key in keys]
    assert abs(np.corrcoef(np.argsort(orders), np.arange(3000))[0, 1]) < 0.06


def test_ranges_of_orders_are_equal_and_complete() -> None:
    orders = np.array([0, 2**62, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert group_of(orders, 1).tolist() == [0] * 5
    assert group_of(orders, 4).tolist() == [0, 1, 1, 2, 3]
    many = np.array([key_order(sample_key(str(n))) for n in range(5000)], dtype=np.uint64)
    counts = np.bincount(group_of(many, 7), minlength=7)
    assert counts.sum() == 5000 and counts.min() > 600


def test_shards_by_bytes_are_full_and_none_too_large() -> None:
    sizes = np.array([planned_bytes(Item(f"c/{n}.jpg", 10_000 + 100 * (n % 50), "c")) for n in range(3000)])
    cuts = cut_by_bytes(sizes, 2**20)
    assert [n for cut in cuts for n in range(cut.start, cut.stop)] == list(range(3000))
    totals = [int(sizes[cut].sum()) + 10_240 for cut in cuts]
    assert max(totals) <= 2**20 and min(totals[:-1]) > 2**20 - 20_000


def test_a_sample_larger_than_a_shard_has_one_for_itself() -> None:
    assert cut_by_bytes(np.array([10**6, 10**6]), 1000) == [slice(0, 1), slice(1, 2)]
    assert cut_by_bytes(np.array([], dtype=np.int64), 1000) == []


def test_shards_by_rows() -> None:
    assert cut_by_rows(10, 4, even=False) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert [c.stop - c.start for c in cut_by_rows(10, 4, even=True)] == [3, 3, 4]
    assert cut_by_rows(0, 4, even=True) == cut_by_rows(0, 4, even=False) == []
