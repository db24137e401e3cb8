"""Three steps of a model with parameters that the loss never sees, every rank on the same batch: `unused.py RESULT.json`. Rank 0 writes
each parameter's sum, before and after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from pipeline.config.pretrain import Pretrain
from pipeline.core.world import World
from pipeline.models import create
from pipeline.train.optim import build_optimizer
from pipeline.train.zero import Engine, join_group


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
    if world.is_main:
        after = {name: float(p.detach().sum()) for name, p in model.named_parameters()}
        result.write_text(json.dumps({"before": before, "after": after, "norms": norms}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
