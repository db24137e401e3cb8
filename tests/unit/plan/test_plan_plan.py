from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.objectives import Facts
from pipeline.plan import Plan, make_plan
from pipeline.plan.describe import as_text, describe
from pipeline.plan.moments import BUILDERS
from pipeline.stream.collection import Reading

MODEL = {"name": "vit", "width": 16, "depth": 2, "heads": 2, "patch": 4}


def config(**changes: Any) -> Config:
    section = {
        "model": MODEL,
        "image": {"pixels": 8},
        "batch": 100,
        "micro_batch": 10,
        "duration": "3 epochs",
        "precision": "fp32",
        **changes,
    }
    return parse_config({"name": "t", "storage": "runs", "data": "/d", "pretrain": section})


def plan(workers: int = 1, samples: int = 1050, **changes: Any) -> Plan:
    return make_plan(config(**changes), samples, Facts(classes=5), workers)


def test_steps() -> None:
    p = plan(schedule={"name": "cosine", "warmup": "1 epoch"}, validate={"every": "500 samples"}, log="4 steps")
    assert (p.steps, p.samples, p.samples_an_epoch) == (32, 3200, 1050)  # 31.5 rounded up
    assert (p.warmup, p.validate_every, p.log_every) == (11, 5, 4)
    q = plan(duration="2 steps")
    assert (q.steps, q.warmup, q.validate_every, q.log_every) == (2, 0, None, 10)
    assert plan(duration="1M samples").steps == 10_000


def test_parameters_and_flops() -> None:
    p = plan()
    width, tokens = 16, 5
    block = 12 * width * width + 13 * width
    assert p.parameters == 48 * width + width + width + tokens * width + 2 * block + 2 * width + 5 * width + 5
    forward = 2 * (4 * 48 * width + 2 * (tokens * 12 * width * width + 2 * tokens * tokens * width) + 5 * width)
    assert p.flops_a_sample == 3 * forward - 2 * (4 * 48 * width), "nobody needs the gradient by the pixels"


def test_memory_in_fp32() -> None:
    m, n = plan().memory, plan().parameters
    assert (m.items["parameters"], m.items["gradients"], m.items["optimizer"]) == (4 * n, 4 * n, 8 * n)
    assert plan(optimizer={"name": "sgd"}).memory.items["optimizer"] == 4 * n
    assert plan(micro_batch=20).memory.items["activations"] == pytest.approx(2 * m.items["activations"], rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_memory_in_16_bits(precision: str) -> None:
    m, n = plan(precision=precision).memory, plan().parameters
    at = plan(precision=precision).load
    assert (m.at_peak["parameters"], m.items["optimizer"]) == (2 * n, 12 * n)
    assert m.items["activations"] == pytest.approx(10 * 34 * 5 * 16 * 2, rel=0.25) and at.stage == 1


@pytest.mark.parametrize(("stage", "shares"), [(0, (1, 1, 8)), (1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))])
def test_zero_stages_share(stage: int, shares: tuple[int, int, int]) -> None:
    """What the ZeRO paper's figure 1 shows: optimiser, then gradients, then parameters, over 8 workers, between the steps. The engine
    runs 16-bit stage 0 as stage 1."""
    p = plan(workers=8, zero={"stage": stage}, precision="bf16")
    n, build = p.parameters, BUILDERS[p.load.stage](p.load.setup, -(-p.parameters // 8))
    base, kept = build.base(), build.accumulated()
    wanted = [b * n / s for b, s in zip((2, 2, 12), shares, strict=True)]
    assert [base["parameters"], kept, base["optimizer"]] == pytest.approx(wanted, rel=0.01)


def test_what_it_asks_of_the_store() -> None:
    text = as_text(describe(config(), make_plan(config(), 1050, Facts(classes=5), 1, Reading(40_000, 64)), False, 1), "config")
    assert "store        39.1 KiB a sample, 40.1 MiB an epoch; every 1,000 samples/s ask for 38.1 MiB/s in 20 requests/s" in text
    assert Reading(40_000, 1).requests == 1000 and "store" not in as_text(describe(config(), plan(), False, 1), "config")


def test_the_number_of_workers_changes_no_step() -> None:
    assert plan(workers=7).steps == plan(workers=1).steps
