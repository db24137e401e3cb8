"""At each ZeRO stage: one bit of what ranks have copies of changes on the last rank. And ranks that round sums differently hold the same
all the same. `torchrun .. flip.py CONFIG RESULTS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import load_config
from pipeline.core.command import run_rank
from pipeline.core.errors import InfrastructureError
from pipeline.core.world import World
from pipeline.models import create
from pipeline.train.copies import compare
from pipeline.train.library import join_group
from pipeline.train.optim import build_optimizer
from pipeline.train.zero import Engine


def main(config: str, results: Path) -> None:
    world, found = World.from_environment(), []
    join_group(world)
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            p = load_config(config, [f"pretrain.zero.stage={stage}", f"pretrain.precision={precision}"]).pretrain
            assert p is not None
            model = create("vit", width=16, depth=1, heads=2, patch=4, pixels=8, classes=3)
            engine = Engine(model, build_optimizer(model, p.optimizer), p, 1, world)
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank)).to(engine.dtype)
            engine.backward(engine.module(images).square().mean())
            engine.step()
            compare(engine.copies(), world)  # raises nothing: ranks saw other images, and hold the same
            names = [name for name, _ in engine.copies()]
            if world.rank == world.size - 1:
                tensor = dict(engine.copies())[names[-1]]
                tensor.view(-1)[-1:].view(torch.uint8)[0] ^= 1
            told = None
            try:
                compare(engine.copies(), world)
            except InfrastructureError as e:
                told = str(e)
            found.append([precision, stage, len(names), names[-1], told])
    drifts = [drift(config, world, optimizer) for optimizer in ("{name: stable-adamw}", "{name: adafactor}")]
    if world.is_main:
        results.write_text(json.dumps({"flips": found, "drifts": drifts}))


def drift(config: str, world: World, optimizer: str) -> list[Any]:
    """Three steps at stage 0 with another number of threads on each rank: whether a sum differs between them, and what is found."""
    torch.set_num_threads(1 + world.rank)
    p = load_config(config, [f"pretrain.optimizer={optimizer}"]).pretrain
    assert p is not None
    model = create("vit", width=256, depth=1, heads=2, patch=4, pixels=8, classes=3)
    engine = Engine(model, build_optimizer(model, p.optimizer), p, 1, world)
    random = torch.Generator().manual_seed(world.rank)
    for _ in range(3):
        engine.backward((engine.module(torch.randn(4, 3, 8, 8, generator=random)) - 1).square().mean())
        engine.step()
    sums = {float(torch.rand(4096, 32, generator=torch.Generator().manual_seed(seed)).sum()) for seed in range(3)}
    told = None
    try:
        compare(engine.copies(), world)
    except InfrastructureError as e:
        told = str(e)
    return [len(set(map(tuple, map(sorted, world.gather(sums))))), told]


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1], Path(sys.argv[2])))
