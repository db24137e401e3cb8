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


def blocks(depth: int, tokens: int, width: int) -> int:
    """Multiply-adds of Transformer blocks (arXiv 1706.03762): four projections and an MLP of four times the width; logits, all of them even
    where attention is causal, and what they weigh."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


# Forward, by hand; and what is without a gradient by its input: the embedding of patches.
BY_HAND = {
    "vit": (blocks(6, 65, 192) + 64 * 8 * 8 * 3 * 192 + 192 * 10, 64 * 8 * 8 * 3 * 192),
    "igpt": (blocks(3, 144, 96) + 144 * 96 * 64, 0),
    "clip": (blocks(6, 37, 192) + 36 * 8 * 8 * 3 * 192 + 192 * 64 + blocks(4, 16, 128) + 128 * 64, 36 * 8 * 8 * 3 * 192),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_one_counts_by_hand(name: str) -> None:
    """Two a multiply-add, backward twice the forward but for the gradient by the pixels."""
    forward, first = BY_HAND[name]
    assert make_plan(config_of(name), 100, FACTS, 1).flops_a_sample == pytest.approx(2 * (3 * forward - first), rel=0.01)


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
