from __future__ import annotations

import itertools

import pytest

from pipeline.core.errors import DataError
from pipeline.shards.layout import plan_shards, planned_bytes, sample_key, split_of
from pipeline.shards.sources import Item

ITEMS = [Item(f"c{n % 3}/{n}.jpg", 10_000 + 100 * (n % 50), f"c{n % 3}") for n in range(3000)]


def test_every_item_once_and_no_shard_too_large() -> None:
    planned = plan_shards(ITEMS, {"train": 0.8, "test": 0.2}, 2**20)
    assert sorted(i.path for p in planned for _, i in p.samples) == sorted(i.path for i in ITEMS)
    assert all(sum(planned_bytes(i) for _, i in p.samples) <= 2**20 for p in planned)
    assert [p.name for p in planned if p.split == "test"][:2] == ["test-00000.tar", "test-00001.tar"]
    share = sum(len(p.samples) for p in planned if p.split == "test") / len(ITEMS)
    assert abs(share - 0.2) < 0.03


def test_the_plan_does_not_depend_on_the_order_of_anything() -> None:
    one = plan_shards(ITEMS, {"train": 0.8, "test": 0.2}, 2**20)
    assert plan_shards(ITEMS[::-1], {"test": 0.2, "train": 0.8}, 2**20) == one


def test_the_order_is_not_that_of_the_split() -> None:
    keys = [key for p in plan_shards(ITEMS, {"train": 1.0}, 2**30) for key, _ in p.samples]
    assert keys != sorted(keys)
    classes = [i.class_name for p in plan_shards(ITEMS, {"train": 1.0}, 2**30) for _, i in p.samples]
    repeats = sum(a == b for a, b in itertools.pairwise(classes)) / len(classes)
    assert abs(repeats - 1 / 3) < 0.05


def test_adding_images_moves_none_between_splits() -> None:
    splits = {"a": 0.3, "b": 0.3, "c": 0.4}
    assert {split_of(sample_key(str(n)), splits) for n in range(100)} == {"a", "b", "c"}
    assert split_of("f" * 20, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == "c"
    assert split_of("0" * 20, splits) == "a"


def test_a_sample_larger_than_a_shard_has_one_for_itself() -> None:
    planned = plan_shards([Item("a.jpg", 10**6), Item("b.jpg", 10**6)], {"train": 1.0}, 1000)
    assert [len(p.samples) for p in planned] == [1, 1]


def test_an_empty_split_is_named() -> None:
    with pytest.raises(DataError, match=r"^shard.splits.test: a share of 0.001 leaves it none of the 2 images"):
        plan_shards([Item("a.jpg", 1), Item("b.jpg", 1)], {"train": 0.999, "test": 0.001}, 2**20)
