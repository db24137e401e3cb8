"""Blocks computed once more, and blocks compiled, are the same blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.models import Model, create
from pipeline.models.blockwise import blocks_of, compile_blocks, recompute_blocks

TOWER = {"width": 16, "depth": 2, "heads": 2}
TEXT = {"kind": "transformer", **TOWER}
VISION = {"kind": "vit", "patch": 4, **TOWER}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**TOWER, "patch": 4, "pixels": 8, "classes": 3, "dropout": 0.2, "drop_path": 0.2},
    "igpt": {**TOWER, "pixels": 4},
    "mae": {**TOWER, "patch": 4, "pixels": 8, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "clip": {"embed": 8, "vision": VISION, "text": TEXT, "pixels": 8},
    "caption": {"vision": VISION, "text": TEXT, "pixels": 8},
}


def loss_of(model: Model) -> torch.Tensor:
    for i, parameter in enumerate(model.parameters()):  # heads begin at zero
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    torch.manual_seed(1)
    inputs = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in model.example(3))
    out = model(*inputs)
    return sum((x.float().square().sum() for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()), torch.zeros(()))


def gradients(model: Model, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    (loss_of(model) if loss is None else loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_have_the_same_gradients(name: str) -> None:
    """Dropout included: it draws the same the second time. And less is kept: of each block its input."""
    plain, frugal = (create(name, seed=0, **MODELS[name]).train() for _ in range(2))
    recompute_blocks(frugal)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(plain)
        all_of_it = sum(kept)
        kept.clear()
        again = loss_of(frugal)
        assert sum(kept) < all_of_it, "logits are most of what these small models keep"
    theirs, ours = gradients(plain, loss), gradients(frugal, again)
    assert set(ours) == set(theirs) and len(ours) > 10
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in ours)
    assert set(frugal.state_dict()) == set(plain.state_dict())
    with torch.no_grad():
        frugal(*frugal.example(2))


def test_a_compiled_model_computes_the_same() -> None:
    options = {**MODELS["vit"], "dropout": 0.0, "drop_path": 0.0}
    plain, compiled = (create("vit", seed=0, **options) for _ in range(2))
    compile_blocks(compiled)
    theirs, ours = gradients(plain), gradients(compiled)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5, rtol=1e-4) for k in theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"


def test_models_without_blocks() -> None:
    assert not blocks_of(create("resnet", seed=0, depths=[1, 1, 1, 1], width=8, pixels=32))
    assert len(blocks_of(create("clip", seed=0, **MODELS["clip"]))) == 4
