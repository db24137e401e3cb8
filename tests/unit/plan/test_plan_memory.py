"""What a step keeps in memory, what ranks send, and what is done about too much of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError
from pipeline.models import create
from pipeline.models.blockwise import recompute_blocks
from pipeline.objectives import Facts
from pipeline.plan import Plan, make_plan
from pipeline.plan.devices import find_device
from pipeline.plan.fit import check_fits, explain_out_of_memory, is_out_of_memory, settle, smallest_change
from pipeline.plan.live import count_live
from pipeline.plan.setup import RUNTIME_CPU, RUNTIME_GPU
from pipeline.plan.workload import loss_like

VIT = {"name": "vit", "width": 64, "depth": 4, "heads": 4, "patch": 4}
CLIP = {
    "name": "clip",
    "embed": 32,
    "vision": {"kind": "vit", "width": 64, "depth": 2, "heads": 4, "patch": 4},
    "text": {"width": 64, "depth": 2},
}
CAPTION = {
    "vision": {"kind": "vit", "width": 64, "depth": 2, "heads": 4, "patch": 4}, "text": {"width": 64, "depth": 4, "heads": 4}, "pixels": 32,
    "vocabulary": 600, "context": 16,
}  # fmt: skip
FACTS = Facts(classes=10, vocabulary=600, context=16)
SMALL_GPU = {"name": "mine", "flops": 1e12, "memory": RUNTIME_GPU + 400 * 2**20}


def config(device: Any = "h100", **changes: Any) -> Config:
    section = {"model": VIT, "image": {"pixels": 32}, "batch": 1024, "micro_batch": 64, "duration": "10 steps", **changes}
    return parse_config({"name": "t", "storage": "runs", "data": "/d", "cluster": {"device": device}, "pretrain": section})


def plan(workers: int = 1, device: Any = "h100", **changes: Any) -> Plan:
    return make_plan(config(device, **changes), 100_000, FACTS, workers)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["vit", "caption"])
def test_what_is_kept_is_what_autograd_saves(name: str, recompute: bool) -> None:
    """Against the tensors that a real forward pass on this CPU saves, which has a fused attention too; a captioner's decoder has blocks of
    its own."""
    sizes = {**{k: v for k, v in VIT.items() if k != "name"}, "pixels": 32, "classes": 10} if name == "vit" else CAPTION
    model = create(name, **sizes).train()
    if recompute:
        recompute_blocks(model)
    inputs = model.example(3)
    own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers(), *inputs)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert loss_like(name)(model(*inputs)).requires_grad
    real = sum(storage.nbytes() for storage in saved.values())
    twin = count_live(create(name, device="meta", **sizes), torch.float32, 3, loss_like(name), recompute)
    assert twin.kept_bytes == pytest.approx(real, rel=0.05)
    assert twin.kept_bytes <= twin.forward <= twin.most <= twin.most_with_gradients


def test_recomputation_keeps_what_blocks_see() -> None:
    def live(recompute: bool) -> int:
        model = create("vit", device="meta", **{k: v for k, v in VIT.items() if k != "name"}, pixels=32, classes=10)
        return count_live(model, torch.bfloat16, 8, loss_like("vit"), recompute).most

    assert live(True) < live(False) / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_bytes_that_a_worker_sends(precision: str, rounds: int) -> None:
    """Of rings: an all-reduce 2 (w - 1) / w of the gradients, gathers and scatters half of that."""
    workers, width = 4, 4 if precision == "fp32" else 2

    def sent(stage: int) -> dict[str, int]:
        p = plan(workers, precision=precision, zero={"stage": stage}, micro_batch=1024 // workers // rounds)
        size = width * p.parameters
        t = p.traffic
        assert t.total == t.all_reduce + t.all_gather + t.reduce_scatter
        return {
            "all_reduce": round(t.all_reduce / size, 3),
            "all_gather": round(t.all_gather / size, 3),
            "scatter": round(t.reduce_scatter / size, 3),
        }

    assert sent(1) == {"all_reduce": 1.5, "all_gather": 0.75, "scatter": 0}
    assert sent(2) == {"all_reduce": 1.5 * rounds, "all_gather": 0.75, "scatter": 0}
    assert sent(3) == {"all_reduce": 0, "all_gather": 0.75 * rounds, "scatter": 0.75 * rounds}
    assert sent(0) == (sent(1) if width == 2 else {"all_reduce": 1.5, "all_gather": 0, "scatter": 0})
    assert plan(1).traffic.total == 0


def test_a_contrastive_loss_takes_tiles_not_squares() -> None:
    def pairs(batch: int) -> int:
        return plan(8, model=CLIP, objective="contrastive", batch=batch, micro_batch=64).load.pair_bytes

    assert pairs(131_072) < 17 * pairs(8192), "of n x T, not N x N"
    p = plan(8, model=CLIP, objective="contrastive", batch=32_768, micro_batch=64)
    assert p.traffic.features == pytest.approx(7 / 8 * 4 * 32_768 * 2 * 33)
    assert p.pace.compute == pytest.approx(64 * 64 * (p.flops_a_sample + p.load.forward_flops) / (989e12 * 0.4)), "embedded twice"


def test_figures_of_ones_own() -> None:
    device = find_device(config({"name": "h100", "price": 2.0, "memory": "40 GiB"}).cluster, 1)
    assert (device.flops, device.memory, device.price) == (989e12, 40 * 2**30, 2.0)
    mine = find_device(config(SMALL_GPU).cluster, 1)
    assert mine.name == "mine" and mine.flops == 1e12
    with pytest.raises(
        ConfigError, match=r"cluster\.device\.name: 'h10' is not in the table, did you mean 'h100'\? .* at least flops and memory"
    ):
        find_device(config("h10").cluster, 1)


def test_what_does_not_fit_is_refused_with_the_smallest_change() -> None:
    fitting = plan(device=SMALL_GPU, micro_batch=64)
    assert fitting.fits
    check_fits(fitting)
    large = plan(device=SMALL_GPU, micro_batch=1024)
    assert large.fits is False
    with pytest.raises(ConfigError, match=r"^pretrain: needs .* most of it \w+ \(.* \(mine\) has 1\.9 GiB .* pretrain\.micro_batch=\d+$"):
        check_fits(large)
    change = smallest_change(large.load, large.device.memory)
    assert change is not None
    assert plan(device=SMALL_GPU, **{"micro_batch": change["pretrain.micro_batch"]}).fits
    assert plan(device=SMALL_GPU, micro_batch=2 * change["pretrain.micro_batch"]).fits is False, "the largest that fits"


def test_where_no_micro_batch_fits_the_stage_is_raised() -> None:
    wide = {**VIT, "width": 2048, "depth": 24, "heads": 16}  # 1.2 billion parameters
    p = plan(8, model=wide, batch=8, micro_batch=1, zero={"stage": 0}, precision="fp32")
    room = round(p.peak * 0.75)
    change = smallest_change(p.load, room)
    assert change is not None and list(change) == ["pretrain.zero.stage"]
    stage = change["pretrain.zero.stage"]
    for other in range(4):
        peak = plan(8, model=wide, batch=8, micro_batch=1, zero={"stage": other}, precision="fp32").peak
        assert (peak <= room) == (other == stage) or other > stage


def test_auto_takes_the_smallest_stage_and_the_largest_micro_batch() -> None:
    asked = config(SMALL_GPU, micro_batch="auto", zero="auto")
    settled = settle(asked, FACTS, 1)
    assert settled.pretrain is not None and settled.pretrain.zero.stage == 0
    size = settled.pretrain.micro_batch
    assert 1 < size < 1024 and 1024 % size == 0
    assert plan(device=SMALL_GPU, micro_batch=size).peak <= 0.95 * SMALL_GPU["memory"] < plan(device=SMALL_GPU, micro_batch=2 * size).peak
    again = settle(asked, FACTS, 1, kept=8)
    assert again.pretrain is not None and again.pretrain.micro_batch == 8, "a run that goes on keeps it"
    assert settle(settled, FACTS, 1) is settled
    with pytest.raises(ConfigError, match=r"'auto' needs to know the device's memory; say cluster.device"):
        settle(parse_config({**asked.model_dump(mode="json", by_alias=True), "cluster": {"gpus": 8}}), FACTS, 8)


def test_auto_finds_the_micro_batch_that_needs_no_sums_of_gradients() -> None:
    """A worker's whole share at once may take less than half of it twice."""
    wide = {**VIT, "width": 2048, "depth": 4, "heads": 16}
    section = {"model": wide, "batch": 64, "precision": "fp32", "zero": {"stage": 1}}
    peaks = {n: plan(8, micro_batch=n, **section).peak for n in (1, 2, 4, 8)}
    assert peaks[8] < peaks[1] < peaks[4], peaks
    device = {**SMALL_GPU, "memory": math.ceil((peaks[8] + peaks[1]) / 2 / 0.95)}
    settled = settle(config(device, micro_batch="auto", **section), FACTS, 8)
    assert settled.pretrain is not None and settled.pretrain.micro_batch == 8


def test_a_micro_batch_that_does_not_divide_another_batch_is_left_to_the_claim() -> None:
    settled = settle(config(SMALL_GPU, batch=96, micro_batch="auto", zero="auto"), FACTS, 1, kept=64)
    assert settled.pretrain is not None and 96 % settled.pretrain.micro_batch == 0


def test_where_nothing_else_fits_it_takes_more_workers() -> None:
    """On a CPU nothing can be offloaded."""
    wide = {**VIT, "width": 1024, "depth": 4, "heads": 16}
    section = {"model": wide, "batch": 64, "recompute": True, "zero": {"stage": 3}, "precision": "fp32"}
    p = plan(8, device="cpu", micro_batch=1, **section)
    change = smallest_change(p.load, round(p.peak * 0.95))
    assert change is not None and change["cluster.workers"] > 8 and "cluster.gpus" not in change


@pytest.mark.parametrize("parameters", [0.9e9, 1.1e9])
def test_neighbours_gather_for_the_backward_pass(parameters: float) -> None:
    """With hierarchical partitioning, of a model that is too large to stay whole from the forward pass on."""
    width = round((parameters / 24 / 12) ** 0.5 / 64) * 64
    section = {"model": {**VIT, "width": width, "depth": 24, "heads": 16}, "batch": 128, "micro_batch": 1, "recompute": True}
    near, far = (plan(64, **section, zero={"stage": 3, "hpz": hpz}) for hpz in (8, 1))
    size = near.load.width * near.load.tensors.parameters * near.load.rounds
    is_large = near.load.tensors.parameters > 1e9
    assert near.traffic.near == (round(7 / 8 * size) if is_large else 0) and far.traffic.near == 0
    assert (near.traffic.total < far.traffic.total) == is_large
    assert (near.pace.communication + near.pace.step < far.pace.communication + far.pace.step) == is_large


def test_auto_is_a_word_of_the_config() -> None:
    p = config(micro_batch="auto", zero="auto").pretrain
    assert p is not None and p.model_dump(mode="json")["micro_batch"] == "auto" and p.model_dump(mode="json")["zero"]["stage"] == "auto"
    for key, value, said in (
        ("micro_batch", 0, "1 or more"),
        ("micro_batch", "many", "or 'auto'"),
        ("zero", {"stage": 4}, "0, 1, 2 or 3, or 'auto'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            config(**{key: value})


def test_out_of_memory_is_explained() -> None:
    p = plan(device=SMALL_GPU, micro_batch=1024)
    said = explain_out_of_memory(p, RUNTIME_GPU + 400 * 2**20)
    assert "the biggest item is activations (" in said and "smallest change that fits: pretrain.micro_batch=" in said
    said = explain_out_of_memory(p, 80 * 2**30)
    assert "others may use the device too" in said
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("schedule", [{"warmup": "11 steps"}, {"name": "rsqrt", "warmup": "6 steps", "cooldown": "5 steps"}])
def test_a_schedule_longer_than_the_run_is_refused(schedule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^pretrain\.schedule: (warmup|cooldown).* longer than the run \(10 steps\)$"):
        plan(schedule={"name": "cosine", **schedule})


def test_an_average_and_adafactor() -> None:
    whole = plan(8, zero={"stage": 1}, optimizer={"name": "adafactor", "betas": [0, 0.999]}).load
    assert 8 * whole.memory.items["optimizer"] == pytest.approx(4 * whole.tensors.parameters + 4 * whole.tensors.factored, rel=0.01)
    with_average = replace(whole, pretrain=whole.pretrain.model_copy(update={"average": {"decay": 0.9999}}))
    assert 8 * with_average.memory.items["averages"] == pytest.approx(4 * whole.tensors.parameters, rel=0.01)


@pytest.mark.parametrize("stage", range(4))
def test_a_heap_is_as_large_as_it_ever_was(stage: int) -> None:
    """On a CPU; `tests/bench/plan.py` holds the whole against real trainings. In what was measured there, the sum of these."""
    load = plan(2, "cpu", precision="fp32", zero={"stage": stage}, micro_batch=4, batch=8).load
    size, most = 4 * load.tensors.parameters, load.live.most
    own = size // 2
    wanted = {
        0: {"parameters": size, "optimizer": 2 * size, "gradients": size, "buffers": 4 * load.tensors.largest, "allocator": most},
        1: {"parameters": size, "optimizer": 3 * own, "buffers": 2 * size, "allocator": size + most},
        2: {"parameters": size, "optimizer": 3 * own, "buffers": 2 * size, "allocator": most},
        3: {
            "parameters": own, "optimizer": 3 * own, "gradients": own, "buffers": size, "temporaries": 2 * size, "allocator": size + most,
        },
    }[stage]  # fmt: skip
    assert load.memory.moments["reduce"] - RUNTIME_CPU == pytest.approx(sum(wanted.values()), rel=0.001)
