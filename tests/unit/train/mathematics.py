"""Trains small models of each family at every ZeRO stage in one process group, the loop's own parts and nothing beside them:

    torchrun --nproc-per-node W mathematics.py CONFIG RESULTS.json

Results, by family and stage: the losses of 20 steps; and of the contrastive losses the gradient of one step, by parameter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import claim_run
from pipeline.checkpoint.fragments import AVERAGE, WEIGHT
from pipeline.config import Config, load_config
from pipeline.core.command import run_rank
from pipeline.core.world import World
from pipeline.models import build
from pipeline.models.blockwise import blocks_of
from pipeline.objectives import build_objective
from pipeline.stream import open_collection, open_stream
from pipeline.train.accumulate import accumulate, mean_over_ranks
from pipeline.train.inputs import open_inputs, options_of, prepare_inputs
from pipeline.train.library import join_group
from pipeline.train.optim import build_optimizer
from pipeline.train.speed import Clock
from pipeline.train.worker import use_cores
from pipeline.train.zero import Engine

STEPS = 20
VISION, TEXT = "{kind: vit, width: 16, depth: 1, heads: 2, patch: 4, drop_path: 0.2}", "{kind: transformer, width: 16, depth: 1, heads: 2}"
CAPTIONS = "pretrain.text={size: 520, length: 8}"
CLIP = f"pretrain.model={{name: clip, embed: 8, vision: {VISION}, text: {TEXT}}}"
FAMILIES = {
    "vit": ["pretrain.model={name: vit, width: 16, depth: 1, heads: 2, patch: 4, dropout: 0.1}", "pretrain.objective=classify"],
    "igpt": ["pretrain.model={name: igpt, width: 16, depth: 1, heads: 2}", "pretrain.objective=next-pixel", "pretrain.palette=three-bit"],
    "clip": [CLIP, "pretrain.objective=contrastive", CAPTIONS],
}
EXACT = {
    "softmax": [CLIP.replace("0.2", "0.0"), "pretrain.objective=contrastive", CAPTIONS],
    "sigmoid": [CLIP.replace("0.2", "0.0"), "pretrain.objective=sigmoid-contrastive", CAPTIONS],
}  # without dropout, so that any micro-batch gives the same
FACTORED = ["pretrain.model={name: vit, width: 32, depth: 1, heads: 2, patch: 4, dropout: 0.1}"]
STILL = ["pretrain.model={name: vit, width: 16, depth: 1, heads: 2, patch: 4}"]  # what is compiled draws other numbers for dropout
ALL = (0, 1, 2, 3)
# What else must not change the mathematics: overrides, at which stages, with how many ranks; compared with one rank at stage 0.
VARIANTS = {
    "adafactor": ([*FACTORED, "pretrain.optimizer={name: adafactor, lr: 1e-3, weight_decay: 0.1, layer_decay: 0.8, clip: 1.0}"], ALL, (2, 3)),
    "stable": ([*FACTORED, "pretrain.optimizer={name: stable-adamw, lr: 1e-3, weight_decay: 0.1, head_weight_decay: 0.3}"], ALL, (2, 3)),
    "average": ([*FAMILIES["vit"], "pretrain.average={decay: 0.9}", "pretrain.optimizer={name: sgd, lr: 0.1}"], ALL, (2,)),
    "recompute": ([*FAMILIES["clip"], "pretrain.recompute=true"], (0, 2, 3), (2,)),
    "again": ([*FAMILIES["igpt"], "pretrain.recompute=true"], (0, 3), (2,)),
    "offload": ([*FAMILIES["vit"], "pretrain.zero={stage: 1, offload: optimizer}"], (1, 2, 3), (2,)),
    "all": ([*FAMILIES["vit"], "pretrain.zero={stage: 3, offload: all}"], (3,), (1, 2)),
    "still": (STILL, (0,), (2,)),
    "compile": ([*STILL, "pretrain.compile=true"], (1, 3), (2,)),
    "hpz": ([*FAMILIES["vit"], "pretrain.zero={stage: 3, hpz: 2}"], (3,), (2, 4)),
}  # fmt: skip
RESNET = "{kind: resnet, depths: [1, 1, 1, 1], width: 8}"
STATISTICS = [  # an image tower with BatchNorm
    f"pretrain.model={{name: clip, embed: 8, vision: {RESNET}, text: {TEXT}}}", "pretrain.objective=contrastive", CAPTIONS,
    "pretrain.image={pixels: 32, enlarge: true}",
]  # fmt: skip
RATE = 0.01  # of the one step that shows a gradient; at 1 the scale would meet its limit
FEW = 4  # steps of these


@dataclass
class Task:
    """A model, what it is to learn from, and no engine."""

    config: Config
    world: World

    def __post_init__(self) -> None:
        run, p = claim_run(self.config), self.config.pretrain
        assert p is not None
        self.p = p
        data = open_collection(run.data, p.split, None)
        prepared = prepare_inputs(run, data, self.world)
        self.model = build(p.model.name, options_of(p, len(data.classes), prepared), seed=1)
        self.stream = open_stream(
            data, global_batch=p.batch, micro_batch=p.micro_batch, rank=self.world.rank, world_size=self.world.size, workers=0, seed=3,
            image=p.image, tokenizer=prepared.tokenizer, text_length=prepared.context,
        )  # fmt: skip
        inputs = open_inputs(self.config, prepared, data.classes, torch.float32, self.world.device)
        self.objective = build_objective(p.objective.name, p.objective.arguments, inputs)
        self.batches = iter(self.stream)


class Parts(Task):
    """What the loop works with."""

    def __init__(self, config: Config, world: World, stage: int) -> None:
        super().__init__(config, world)
        p = self.p.model_copy(update={"zero": self.p.zero.model_copy(update={"stage": stage})})
        self.engine = Engine(self.model, build_optimizer(self.model, p.optimizer), p, self.stream.rounds, world)
        assert any("forward" in vars(block) for block in blocks_of(self.model)) == (p.recompute or p.compile), "what is asked for is done"

    def step(self) -> float:
        totals = accumulate(self.engine, self.objective, self.batches, self.stream, 3, Clock())
        return mean_over_ranks(totals, self.stream.pieces, self.world)["loss"]

    def weights(self, key: str = WEIGHT) -> dict[str, torch.Tensor]:
        """All ranks' parts put together."""
        own = [(f.name, f.start, f.tensor.clone()) for f in self.engine.fragments() if f.key == key]
        shapes = self.engine.numbers()["shapes"]
        whole = {name: torch.zeros(shape).flatten() for name, shape in shapes.items()}
        for name, start, part in (each for rank in self.world.gather(own) for each in rank):
            whole[name][start : start + part.numel()] = part
        return whole

    def go_on_from(self, other: Parts) -> None:
        """Take over all ranks' state of `other`, which was cut up at another stage."""
        own = [(f.key, f.name, f.start, f.tensor.clone()) for f in other.engine.fragments()]
        pieces = [piece for rank in self.world.gather(own) for piece in rank]
        with torch.no_grad():
            for wanted in self.engine.fragments():
                wanted.tensor.fill_(7)  # nothing stays as it was
                for _, _, start, part in (p for p in pieces if p[:2] == (wanted.key, wanted.name)):
                    first, last = max(start, wanted.start), min(start + part.numel(), wanted.stop)
                    if first < last:
                        wanted.tensor[first - wanted.start : last - wanted.start] = part[first - start : last - start]
        self.engine.restored(other.engine.numbers())
        self.stream.resume(other.stream.state())


def main(config: str, results: str) -> None:
    world = World.from_environment()
    use_cores(2)
    join_group(world)
    found: dict[str, Any] = {}
    for stage in range(4):
        for family, overrides in FAMILIES.items():
            parts = Parts(load_config(config, [f"name={family}", *overrides]), world, stage)
            found[f"{family}{stage}"] = [parts.step() for _ in range(STEPS)]
        for name, (overrides, stages, sizes) in VARIANTS.items():
            if stage in stages and (world.size in sizes or (world.size == 1 and stage == 0)):
                parts = Parts(load_config(config, [f"name={name}", *overrides]), world, stage)
                found[f"{name}{stage}"] = [parts.step() for _ in range(FEW)]
                if name == "average":
                    found[f"averages{stage}"] = {key: average.tolist() for key, average in parts.weights(AVERAGE).items()}
        if world.size == 2:
            overrides = ["name=moved", *VARIANTS["adafactor"][0], "pretrain.average={decay: 0.9}"]
            before, after = (Parts(load_config(config, overrides), world, each) for each in (stage, (stage + 1) % 4))
            losses = [before.step() for _ in range(FEW // 2)]
            after.go_on_from(before)
            found[f"moved{stage}"] = losses + [after.step() for _ in range(FEW // 2)]
        for name, overrides in EXACT.items():
            sgd = f"pretrain.optimizer={{name: sgd, lr: {RATE}, clip: null, weight_decay: 0}}"
            for micro in (3, 12):
                parts = Parts(load_config(config, [f"name={name}-{micro}", *overrides, sgd, f"pretrain.micro_batch={micro}"]), world, stage)
                before = parts.weights()
                loss = parts.step()
                found[f"{name}{stage}-{micro}"] = [loss, {key: ((before[key] - w) / RATE).tolist() for key, w in parts.weights().items()}]
    parts = Parts(load_config(config, ["name=statistics", *STATISTICS]), world, 0)
    parts.step()
    buffers = dict(parts.model.named_buffers())
    found["statistics"] = {name: buffer.tolist() for name, buffer in buffers.items() if name.startswith("visual.bn1.")}
    if world.is_main:
        Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    run_rank(lambda: main(*sys.argv[1:]))
