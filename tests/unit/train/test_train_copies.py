"""Ranks that no longer hold the same: real DeepSpeed on gloo, and a bit that changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from workshop import Workshop

from pipeline.checkpoint import Checkpoints, read_history
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.copies import checksum, compare


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("copies")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    return Workshop(root)


@pytest.fixture(scope="module")
def tried(shop: Workshop) -> dict[str, Any]:
    results = shop.root / "flips.json"
    shop.fork(3, [str(Path(__file__).with_name("flip.py")), str(shop.root / "config.yaml"), str(results)])
    return json.loads(results.read_text())


@pytest.mark.slow
def test_one_bit_on_one_rank_is_found_at_every_stage(tried: dict[str, Any]) -> None:
    found = tried["flips"]
    assert [(precision, stage) for precision, stage, *_ in found] == [(p, s) for p in ("fp32", "bf16") for s in range(4)]
    for _, _, count, last, told in found:
        assert count > 10 and told.startswith(f"pretrain: rank 2 holds not the same numbers of {last} as the others")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_ranks_that_round_differently_hold_the_same(tried: dict[str, Any], number: int) -> None:
    """StableAdamW's and Adafactor's means over parameters are rank 0's on all."""
    kinds, told = tried["drifts"][number]
    assert kinds > 1, "they do round differently"
    assert told is None


@pytest.mark.slow
def test_it_ends_a_run_and_nothing_of_it_is_saved(shop: Workshop) -> None:
    """Of step 11, on the one of two ranks that has its micro-batch; seen at the next check, and at the next save at the latest."""

    def job(name: str, check: str) -> dict[str, Any]:
        return shop.job(
            name, "pretrain.duration=18 steps", "pretrain.save.every=6 steps", "pretrain.objective={name: spoilt, how: flip, at: [51], pause: 0.2, paused: [30, 60]}",
            f"pretrain.guard.check={check}",
        )  # fmt: skip

    slow = shop.job("slow", "pretrain.zero.stage=3", "pretrain.objective={name: spoilt, slow: 0.1}", "pretrain.duration=3 steps")
    small, large = (f"cluster.device={{name: cpu, memory: {memory}}}" for memory in ("100 MiB", "8 GiB"))
    auto = ["pretrain.micro_batch=auto", "pretrain.zero=auto", "pretrain.duration=3 steps"]
    chosen = [
        shop.job("auto", *auto) | {"by_rank": {0: [large], 1: [small]}},
        shop.job("none", *auto) | {"by_rank": {0: [small], 1: [large]}},
        shop.job("own", *auto, "cluster.name=ray", "data=null", f"shard.source.url={shop.root / 'data'}"),
    ]
    (shop.root / "runs" / "own").mkdir(parents=True)
    (shop.root / "runs" / "own" / "shards").symlink_to(shop.root / "data")  # as the run's own, made before
    errors = shop.train(2, [job("soon", "1 step"), job("at-a-save", "1000 steps"), job("unseen", "null"), slow, *chosen])
    for name, error in zip(("soon", "at-a-save"), errors[:2], strict=True):
        assert error is not None and error[0] == "InfrastructureError" and "which are right cannot be told" in error[1]
        assert Checkpoints(shop.directory(name)).steps() == [6]
    assert errors[2:5] == [None] * 3
    # Beside that: who lags at stage 3, where the others wait for it within their forward passes.
    rows = [row for row in read_history(shop.directory("slow")) if "train/loss" in row]
    own, mean = (sum(row[key] for row in rows) for key in ("slowest/compute", "time/compute"))
    assert [row["slowest/rank"] for row in rows] == [1] * 3 and own > 0.9 and own > 1.5 * (2 * mean - own)
    # And: what `auto` means is rank 0's to say, and that it finds nothing.
    section = yaml.safe_load(shop.directory("auto").read("run.yaml"))["config"]["pretrain"]
    assert (section["micro_batch"], section["zero"]["stage"]) == (10, 0)
    assert errors[6] is None, "of shards that the run made"
    assert errors[5] is not None and "pretrain.micro_batch: 'auto' finds nothing that fits into 100.0 MiB (cpu)" in errors[5][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_checksum(dtype: torch.dtype, start: int) -> None:
    tensor = (torch.rand(1003) * 100).to(dtype)[start:]
    before = checksum(tensor)
    assert before.dtype == torch.int64 and before == checksum(tensor.clone())
    for place in (0, 500, len(tensor) - 1):
        changed = tensor.clone()
        changed[place : place + 1].view(torch.uint8)[0] ^= 1
        assert checksum(changed) != before
    assert checksum(tensor.reshape(1, -1).T) == before


def test_alone_there_is_nobody_to_differ_from() -> None:
    compare([("a", torch.ones(1))], World())
