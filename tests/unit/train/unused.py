"""Three steps of a model with parameters that the loss never sees, every rank on the same batch: `unused.py RESULT.json`. Rank 0 writes
each parameter's sum, before and after; and beside that what becomes of BatchNorm's statistics and of fp16's scale in bad steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.config.pretrain import Pretrain
from pipeline.core.command import run_rank
from pipeline.core.world import World
from pipeline.models import create
from pipeline.train.library import join_group
from pipeline.train.optim import build_optimizer
from pipeline.train.zero import Engine


def main(result: Path) -> None:
    torch.set_num_threads(1)
    world = World.from_environment()
    join_group(world)
    model = create("vit", seed=0, width=16, depth=1, heads=2, patch=4, pixels=8, classes=3, masked=True)
    torch.nn.init.ones_(model.get_parameter("mask_head.weight"))
    config = Pretrain.model_validate({
        "model": "vit", "batch": 4 * world.size, "micro_batch": 4, "duration": "3 steps", "precision": "fp32",
        "optimizer": {"lr": 0.01, "weight_decay": 0.1, "clip": 1.0},
    })  # fmt: skip
    engine = Engine(model, build_optimizer(model, config.optimizer), config, 1, world)
    before = {name: float(p.detach().sum()) for name, p in model.named_parameters()}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    norms = []
    for _ in range(3):
        engine.backward(F.cross_entropy(engine.module(images), torch.tensor([0, 1, 2, 0])))
        engine.step()
        norms.append(engine.gradient_norm())
    others = {"statistics": statistics(world), "scales": scales(world), "updates": updates(engine)}
    if world.is_main:
        after = {name: float(p.detach().sum()) for name, p in model.named_parameters()}
        result.write_text(json.dumps({"before": before, "after": after, "norms": norms, **others}))


def made(world: World, name: str, options: dict[str, Any], **pretrain: Any) -> Engine:
    p = Pretrain.model_validate({"model": name, "batch": 2 * world.size, "micro_batch": 2, "duration": "3 steps", **pretrain})
    model = create(name, seed=0, classes=3, **options)
    return Engine(model, build_optimizer(model, p.optimizer), p, 1, world)


def statistics(world: World) -> list[list[float]]:
    """A running mean: at first, after a step and all ranks' agreement on it, in a bad one, and after it."""
    engine = made(world, "resnet", {"depths": [1, 1, 1, 1], "width": 8, "pixels": 32}, precision="fp32")
    mean = dict(engine.model.named_buffers())["bn1.running_mean"]
    found = [mean.tolist()]
    for factor in (1.0, torch.nan):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(world.rank))
        loss = engine.module(images).square().mean() * factor
        found += [mean.tolist()] if factor != 1 else []
        engine.backward(loss)
        engine.step()
        if factor == 1:
            engine.agree_on_buffers(True)
        found.append(mean.tolist())
    assert engine.is_left_out
    return found


def scales(world: World) -> list[list[float]]:
    """The scale of fp16's loss after each step, and whether its update was left out; the CPU's arithmetic does here, however slow."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    raw = {"fp16": {"initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}}
    options = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "pixels": 8}
    engine = made(world, "vit", options, precision="fp16", deepspeed=raw)
    found = []
    for factor in (torch.inf, torch.inf, torch.inf, 1.0):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).half()
        engine.backward((engine.module(images).float() - 1).square().mean() * factor)
        engine.step()
        found.append([engine.numbers()["scaler"]["cur_scale"], float(engine.is_left_out)])
    return found


def updates(engine: Engine) -> list[int]:
    """As counted; and as taken over from a state that has no such count."""
    numbers = engine.numbers()
    counted = numbers.pop("updates")
    engine.restored(numbers)
    return [counted, engine.updates]


if __name__ == "__main__":
    run_rank(lambda: main(Path(sys.argv[1])))
