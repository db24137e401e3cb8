"""A trace of a few steps, of a real run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import Workshop

from pipeline.config.pretrain import Profile
from pipeline.core.progress import set_sink
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.profile import Profiler


def events(directory: Storage, name: str) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(directory.read(f"profile/{name}.json.gz")))["traceEvents"]


def step(number: int) -> None:
    """So many multiplications as its number says."""
    for _ in range(number):
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))


def train(profiler: Profiler, first: int, last: int) -> None:
    for number in range(first + 1, last + 1):
        step(number)
        profiler.after_step(number)
    profiler.close()


def multiplications(directory: Storage, name: str) -> int:
    return sum(event.get("name") == "aten::mm" for event in events(directory, name))


def test_only_the_asked_steps_are_traced(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    train(Profiler(Profile(steps=2, after=3), 10, run, World()), 10, 20)
    assert run.names("profile") == ["step-14-rank-0.json.gz", "step-14-rank-0.txt"]
    assert multiplications(run, "step-14-rank-0") == 14 + 15
    table = run.read("profile/step-14-rank-0.txt").decode()
    assert "aten::mm" in table and "Self CPU" in table


def test_as_many_steps_are_traced_where_training_goes_back(tmp_path: Path) -> None:
    """After step 12 to step 6; what is done again then is not traced a second time."""
    run, profiler = Storage(str(tmp_path)), Profiler(Profile(steps=3, after=10), 0, Storage(str(tmp_path)), World())
    for number in [*range(1, 13), *range(7, 20)]:
        step(number)
        profiler.after_step(number)
    profiler.close()
    assert run.names("profile") == ["step-11-rank-0.json.gz", "step-11-rank-0.txt"]
    assert multiplications(run, "step-11-rank-0") == 11 + 12 + 7


def test_a_run_that_ends_keeps_what_was_traced(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    train(Profiler(Profile(steps=100, after=1), 0, run, World()), 0, 4)
    assert multiplications(run, "step-2-rank-0") == 2 + 3 + 4
    train(Profiler(Profile(after=9), 0, run, World()), 0, 4)
    train(Profiler(None, 0, run, World()), 0, 4)
    assert len(run.names("profile")) == 2


def test_other_ranks_are_traced_where_asked_for(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    train(Profiler(Profile(steps=1, after=1), 0, run, World(1, 2)), 0, 4)
    assert run.names("profile") == []
    train(Profiler(Profile(steps=1, after=1, ranks="all"), 0, run, World(1, 2)), 0, 4)
    assert run.names("profile") == ["step-2-rank-1.json.gz", "step-2-rank-1.txt"]


def test_a_store_that_fails_costs_the_trace_alone(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder would be")
    said: list[str] = []
    set_sink(lambda event: said.append(str(event)))
    try:
        train(Profiler(Profile(steps=1, after=1), 0, Storage(str(tmp_path)), World()), 0, 4)
    finally:
        set_sink(None)
    assert any("the trace could not be kept" in event for event in said)


@pytest.mark.slow
def test_a_run_is_traced(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    make_dataset(Storage(str(tmp_path / "data")), {"train": 50, "test": 11})
    shop = Workshop(tmp_path)
    assert shop.train(1, [shop.job("traced", "pretrain.profile={steps: 2, after: 2}"), shop.job("plain")]) == [None, None]
    assert shop.directory("traced").names("profile") == ["step-3-rank-0.json.gz", "step-3-rank-0.txt"]
    steps = [event for event in events(shop.directory("traced"), "step-3-rank-0") if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == 2
    assert shop.rows("traced") == shop.rows("plain") and not shop.directory("plain").names("profile")
