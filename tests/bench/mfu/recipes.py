"""Ways to take the same training step, by name: what each variant changes of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

BASE = "base"

# What a variant changes of `Recipe`. Several together: "cudnn+fp8+recompute-half".
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    # how weights are kept
    "autocast": {"weights": "autocast"},
    "fp32": {"weights": "fp32"},
    # what is compiled, and how
    "eager": {"compiles": "nothing"},
    "norms": {"compiles": "norms"},
    "whole": {"compiles": "whole"},
    "reduce-overhead": {"compiles": "whole", "mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "graph": {"graph": True},
    # attention
    "flash": {"attention": "flash"},
    "cudnn": {"attention": "cudnn"},
    "efficient": {"attention": "efficient"},
    "math": {"attention": "math"},
    # the optimiser
    "fused": {"optimizer": "fused"},
    "foreach": {"optimizer": "foreach"},
    # memory
    "recompute": {"recompute": 1.0},
    "recompute-half": {"recompute": 0.5},
    "recompute-quarter": {"recompute": 0.25},
    "rounds-4": {"rounds": 4},
    "rounds-16": {"rounds": 16},
    # 8 bits
    "fp8": {"fp8": True},
    # our engine
    "deepspeed": {"engine": "deepspeed"},
    "zero-2": {"engine": "deepspeed", "stage": 2},
    "zero-3": {"engine": "deepspeed", "stage": 3},
    "offload": {"engine": "deepspeed", "offload": True},
}


@dataclass(frozen=True)
class Recipe:
    """One way to take a step.

    weights: `bf16` with fp32 behind them in the optimiser, `autocast` of fp32 ones to bf16, or `fp32` throughout. compiles: each `Block`
    for itself (once for all of a shape, so that it takes seconds), the `norms` and activations alone, the `whole` model, or nothing.
    recompute: the fraction of blocks whose insides are computed again in the backward pass. rounds: micro-batches an update. graph: the
    whole step is one CUDA graph. engine: `plain` PyTorch, or `deepspeed`, which is our `train/zero.py`.
    """

    weights: str = "bf16"
    compiles: str = "blocks"
    mode: str = "default"
    graph: bool = False
    attention: str = "default"
    optimizer: str = "flat"
    recompute: float = 0.0
    rounds: int = 1
    fp8: bool = False
    engine: str = "plain"
    stage: int = 1
    offload: bool = False
    backend: str = "inductor"
    lr: float = 1e-4


THEIRS = Recipe(weights="autocast", compiles="whole", optimizer="fused")


def recipe(name: str, base: Recipe) -> tuple[Recipe, int | None]:
    """The recipe "name+name@batch", and the batch if it says one.

    Raises:
        ValueError: it has a part of another name.
    """
    names, _, batch = name.partition("@")
    changes: dict[str, Any] = {}
    for each in names.split("+"):
        if each not in VARIANTS:
            raise ValueError(f"{name}: {each!r} is no variant (allowed, and joined by +: {', '.join(VARIANTS)})")
        changes |= VARIANTS[each]
    if batch and not batch.isdigit():
        raise ValueError(f"{name}: {batch!r} after @ should be a number of images")
    return replace(base, **changes), int(batch) if batch else None
