"""The training loop: batch -> objective -> engine -> metrics. Everything else hangs on its hooks."""

from __future__ import annotations

from typing import Protocol

import torch

from pipeline.config.pretrain import Pretrain
from pipeline.core.world import World
from pipeline.objectives import Objective
from pipeline.plan import Plan
from pipeline.stream import Dataset, Stream
from pipeline.train.accumulate import accumulate, mean_over_ranks
from pipeline.train.schedule import factor
from pipeline.train.speed import Clock, Row
from pipeline.train.validate import validate
from pipeline.train.watch import VALIDATING, beat, watched
from pipeline.train.zero import Engine


class Hooks(Protocol):
    """What happens beside training. Every rank calls every hook at the same steps."""

    def record(self, row: Row) -> None:
        """Keep one row of metrics (they are the same on every rank)."""

    def after_step(self, step: int, waited: float, loss: torch.Tensor) -> int:
        """`step` optimiser steps are done, the last with `loss`, a sum over this rank's micro-batches; so far this rank has waited
        `waited` seconds for data. Gives the step to go on from: `step`, or an earlier one that training went back to."""


def train(
    engine: Engine,
    objective: Objective,
    stream: Stream,
    held_out: Dataset | None,
    config: Pretrain,
    plan: Plan,
    seed: int,
    world: World,
    first: int,
    hooks: Hooks,
) -> None:
    """Steps `first` to `plan.steps`, drawing from `stream`."""
    step, batches, clock = first, watched(iter(stream)), Clock()
    while step < plan.steps:
        lr = config.optimizer.lr * factor(config.schedule.name, step, plan.steps, plan.warmup, plan.cooldown, plan.timescale)
        engine.set_lr(lr)
        totals = accumulate(engine, objective, batches, stream, seed, clock)
        clock.count(config.batch)
        done = step + 1
        if (done % plan.log_every == 0 or done in (1, plan.steps)) and not engine.is_left_out:
            row = mean_over_ranks(totals, stream.pieces, world)
            hooks.record({
                "step": done,
                "samples": done * config.batch,
                "epoch": done * config.batch / plan.samples_an_epoch,
                **{f"train/{name}": value for name, value in row.items()},
                "train/lr": lr,
                "train/grad_norm": engine.gradient_norm(),
                **clock.read(plan.flops_a_sample),
            })  # fmt: skip
        with clock.paused():
            beat(VALIDATING)
            if held_out is not None and plan.validate_every and (done % plan.validate_every == 0 or done == plan.steps):
                hooks.record({"step": done, "samples": done * config.batch, **validate(engine, objective, held_out, stream, config, world)})
            step = hooks.after_step(done, clock.waited, totals["loss"])
        if step != done:  # back at a checkpoint, past some data
            batches.close()
            batches = watched(iter(stream))
