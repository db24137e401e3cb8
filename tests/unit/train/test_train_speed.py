"""Where the time of a step goes, by the wall clock, and what the ranks send to each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from workshop import STEPS, Workshop

from pipeline.checkpoint import find_model, read_history
from pipeline.checkpoint.goodput import read_jobs
from pipeline.config.pretrain import Pretrain
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.communication import watching
from pipeline.train.device import Device, host_peak
from pipeline.train.speed import CHECKPOINT, COMMUNICATION, KINDS, VALIDATION, Clock


def test_each_second_is_of_the_innermost_kind() -> None:
    began, clock = time.perf_counter(), Clock()
    clock.count(60)
    with clock.waiting():
        time.sleep(0.05)
    with clock.beside():
        time.sleep(0.02)
        with clock.span(CHECKPOINT):
            time.sleep(0.08)
        time.sleep(0.01)
    clock.count(60)
    with clock.span(VALIDATION):
        time.sleep(0.1)
    time.sleep(0.03)
    row, whole = clock.read(1e9, World()), time.perf_counter() - began
    expected = {"input": 0.05, "other": 0.03, "checkpoint": 0.08, "validation": 0.1, "compute": 0.03, "communication": 0.0}
    found = {kind: 2 * row[f"time/{kind}"] for kind in KINDS}
    assert all(found[kind] >= least for kind, least in expected.items()), "sleeps last longer at times, and never less"
    assert sum(expected.values()) <= sum(found.values()) == pytest.approx(2 * row["time/step"]) and 2 * row["time/step"] <= whole
    training = found["input"] + found["compute"] + found["communication"] + found["other"]
    assert row["train/images_per_s"] == pytest.approx(120 / training), "without validation and checkpoint"
    assert row["train/tflops_per_s"] == pytest.approx(row["train/images_per_s"] * 1e9 / 1e12)
    assert row["train/data_wait_fraction"] == pytest.approx(found["input"] / training)
    assert clock.waited == pytest.approx(found["input"]) and "train/mfu" not in row and "slowest/rank" not in row
    assert clock.read(1e9, World())["train/images_per_s"] == 0


class Beside(World):
    """The first of two ranks, of which the other one's clock is told."""

    other: list[float]

    def table(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values), self.other]


def test_the_slowest_rank_is_the_one_that_waits_least_for_others() -> None:
    clock, world = Clock(), Beside(0, 2)
    clock.count(1)
    time.sleep(0.01)
    clock.switch(COMMUNICATION)
    object.__setattr__(world, "other", [5.0, 7.0, 1.0, 2.0, 3.0, 4.0])  # in the order of KINDS
    row = clock.read(0, world)
    own = {kind: 2 * row[f"time/{kind}"] - seconds for kind, seconds in zip(KINDS, world.other, strict=True)}
    assert own["compute"] >= 0.01 and own["communication"] > 0 and own["validation"] == own["checkpoint"] == 0
    assert row["slowest/rank"] == 1 and [row[f"slowest/{kind}"] for kind in KINDS] == world.other
    assert row["time/step"] == pytest.approx(11 + sum(own.values()) / 2)


def test_mfu_is_of_the_peak_of_all_devices() -> None:
    clock = Clock()
    clock.count(10)
    row = clock.read(1e9, World(), peak=4e12)
    assert row["train/mfu"] == pytest.approx(row["train/tflops_per_s"] / 4)


def test_on_a_device_that_works_beside_the_host_exposed_waits_are_taken_from_compute() -> None:
    clock = Clock(is_async=True)
    clock.exposed = lambda: 0.03
    clock.count(1)
    with clock.beside():
        time.sleep(0.1)
    row = clock.read(0, World())
    assert (row["time/communication"], row["time/other"]) == (0.03, 0)
    assert row["time/compute"] == pytest.approx(row["time/step"] - 0.03) and row["time/compute"] >= 0.07
    clock.exposed = lambda: 5.0  # events of streams that ran beside each other
    row = clock.read(0, World())
    assert row["time/compute"] == 0 and row["time/communication"] == row["time/step"]


@pytest.fixture
def group() -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_collectives_are_counted_and_timed_and_then_left_alone() -> None:
    before, clock = (vars(dist.ProcessGroup)["allreduce"], vars(dist.Work)["wait"]), Clock()
    t = torch.ones(1000)
    with watching(clock):
        clock.start()
        for _ in range(50):
            dist.all_reduce(t)
            dist.all_reduce(t, async_op=True).wait()
        dist.broadcast(t.double(), src=0)
        dist.all_gather([torch.empty(1000)], t)
        dist.all_gather_object([None], "x")
        dist.barrier()
        assert clock.seconds[COMMUNICATION] > 0
        with clock.span(VALIDATION):
            known = clock.seconds[COMMUNICATION]
            dist.all_reduce(t)
            assert clock.seconds[COMMUNICATION] == known, "a collective of validation is validation's"
        known = clock.seconds[COMMUNICATION]
        other = threading.Thread(target=dist.all_reduce, args=(t,))
        other.start()
        other.join()
        assert clock.seconds[COMMUNICATION] == known, "another thread's time is not this one's"
        sent = dict(clock.sent)
    assert (sent["all_reduce"], sent["broadcast"], sent["barrier"]) == (102 * 4000, 8000, 0) and 4000 < sent["all_gather"] < 4500
    assert (vars(dist.ProcessGroup)["allreduce"], vars(dist.Work)["wait"]) == before
    dist.all_reduce(t)
    assert clock.sent == sent


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_on_a_gpu_only_what_the_compute_stream_waits_is_counted() -> None:
    clock, side = Clock(is_async=True), torch.cuda.Stream()
    long, short = 400_000_000, 40_000_000  # clock cycles
    with watching(clock):
        clock.start()
        for beside, own in ((long, 0), (short, long)):
            with torch.cuda.stream(side):
                torch.cuda._sleep(beside)
            torch.cuda._sleep(own)
            torch.cuda.current_stream().wait_stream(side)
            exposed = clock.exposed()
            assert exposed > 0.05 if own == 0 else exposed < 0.01


def test_what_a_device_tells() -> None:
    values = {"model": "vit_b16", "duration": "1 step", "precision": "bf16"}
    device = Device(Pretrain.model_validate({**values, "peak": 2.5}), World())
    assert device.peak == 2.5e12
    row = device.read(World())
    assert 50 * 2**20 < row["memory/host_peak"] == host_peak() < 2**40
    held = torch.ones(64 * 2**20 // 4)
    assert host_peak() >= row["memory/host_peak"] and held.sum() > 0
    if not torch.cuda.is_available():
        assert Device(Pretrain.model_validate(values), World()).peak is None and set(row) == {"memory/host_peak"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    """Two ranks train at each ZeRO stage."""
    root = tmp_path_factory.mktemp("speed")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    shop = Workshop(root)
    errors = shop.train(2, [shop.job(f"stage{n}", f"pretrain.zero.stage={n}", "pretrain.peak=0.5") for n in range(4)])
    assert not any(errors)
    return shop


def told(shop: Workshop, name: str) -> list[dict[str, float]]:
    return [row for row in read_history(shop.directory(name)) if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_kinds_add_up_to_the_wall_time_of_the_steps(shop: Workshop, stage: int) -> None:
    rows = told(shop, f"stage{stage}")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert sum(row[f"time/{kind}"] for kind in KINDS) == pytest.approx(row["time/step"])
        own = [
            row["slowest/input"] + row["slowest/compute"] + row["slowest/other"],
            row["time/input"] + row["time/compute"] + row["time/other"],
        ]
        assert own[1] <= own[0] * (1 + 1e-9) <= 2 * own[1] * (1 + 2e-9), "of two ranks the slower"
        assert row["time/compute"] > 0 and row["time/communication"] > 0 and row["slowest/rank"] in (0, 1)
        assert row["train/mfu"] == pytest.approx(row["train/tflops_per_s"] / (2 * 0.5))
    for before, row in pairwise(rows):  # what follows the row of a step is in the next
        assert (row["time/validation"] > 0) is (row["time/checkpoint"] > 1e-4) is (before["step"] == 3)


@pytest.mark.slow
def test_steps_are_most_of_what_the_ledger_calls_training(shop: Workshop) -> None:
    """Another clock, rank 0's alone, up to the end of the last validation, which is in no row. Of all jobs together: one may be held up."""
    of_steps = of_ledger = 0.0
    for stage in range(4):
        of_steps += sum(row["time/step"] - row["time/checkpoint"] for row in told(shop, f"stage{stage}"))
        [job] = read_jobs(shop.directory(f"stage{stage}"))
        of_ledger += job.productive + job.waiting
    assert 0.5 * of_ledger < of_steps < of_ledger + 4 * 0.01


@pytest.mark.slow
def test_bytes_are_those_of_gradients_and_parameters(shop: Workshop) -> None:
    whole = 4 * sum(tensor.numel() for tensor in find_model(shop.directory("stage0"))[1].values())
    rounds = 3  # micro-batches of a rank a step
    expected = {  # beside a few numbers that the ranks agree on, and what fills flat tensors up
        0: {"all_reduce": whole},
        1: {"all_reduce": whole, "all_gather": whole},
        2: {"all_reduce": rounds * whole, "all_gather": whole},
        3: {"reduce_scatter": rounds * whole, "all_gather": whole},  # all are small enough to be kept whole between two steps
    }
    for stage, kinds in expected.items():
        row = told(shop, f"stage{stage}")[1]
        found = {k.removeprefix("communication/"): v for k, v in row.items() if k.startswith("communication/")}
        assert found.pop("bytes") == pytest.approx(sum(found.values()))
        assert {kind: found.get(f"{kind}_bytes", 0) for kind in ("all_reduce", "all_gather", "reduce_scatter")} == pytest.approx(
            dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), 0) | kinds, rel=0.02, abs=300
        )
