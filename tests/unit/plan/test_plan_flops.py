"""Floating-point operations against torch's counter over a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config, parse_config
from pipeline.objectives import Facts
from pipeline.plan import make_plan
from pipeline.plan.workload import loss_like

MODELS: dict[str, dict[str, Any]] = {
    "vit": {"model": {"name": "vit", "width": 192, "depth": 6, "heads": 3, "patch": 8}, "image": {"pixels": 64}},
    "igpt": {"model": {"name": "igpt", "width": 96, "depth": 3, "heads": 3}, "image": {"pixels": 12}, "objective": "next-pixel"},
    "clip": {
        "model": {
            "name": "clip", "embed": 64, "vision": {"kind": "vit", "width": 192, "depth": 6, "heads": 3, "patch": 8},
            "text": {"width": 128, "depth": 4},
        },
        "image": {"pixels": 48}, "objective": "contrastive",
    },
}  # fmt: skip
FACTS = Facts(classes=10, colors=64, vocabulary=600, context=16)


def config_of(name: str, **changes: Any) -> Config:
    section = {**MODELS[name], "batch": 8, "micro_batch": 2, "duration": "10 steps", "precision": "fp32", **changes}
    return parse_config({"name": "t", "storage": "runs", "data": "/d", "pretrain": section, "cluster": {"device": "h100"}})


@pytest.mark.parametrize("name", MODELS)
def test_as_torch_counts_them(name: str) -> None:
    """Of a whole micro-batch in training, on real tensors, with the plain formula of attention: the counter takes a fused kernel's backward
    pass to compute the logits again, and recomputation is not counted."""
    from pipeline.models import build

    plan = make_plan(config_of(name), 100, FACTS, 1)
    model = build(name, plan.load.options, seed=0).train()
    loss = loss_like(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.random.fork_rng():
        given = model(*model.example(2))
        (sum(each.sum() for each in given) if isinstance(given, tuple) else loss(given)).backward()
    assert plan.flops_a_sample == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
