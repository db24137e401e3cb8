"""The training loop: batch -> objective -> engine -> metrics. Everything else hangs on its hooks."""

from __future__ import annotations

from typing import Protocol

import torch

from pipeline.config.pretrain import Pretrain
from pipeline.core.world import World
from pipeline.objectives import Objective
from pipeline.plan import Plan
from pipeline.stream import Stream
from pipeline.train.accumulate import accumulate, mean_over_ranks
from pipeline.train.device import Device
from pipeline.train.schedule import factor
from pipeline.train.speed import OTHER, VALIDATION, Clock, Row
from pipeline.train.validate import HeldOut, validate
from pipeline.train.watch import VALIDATING, beat, watched
from pipeline.train.zero import Engine

_APART = 10  # steps: rows that follow each other sooner do not each tell how large updates are, 2% of a small model's step on a CPU


class Hooks(Protocol):
    """What happens beside training. Every rank calls every hook at the same steps. `clock` learns where the time goes."""

    clock: Clock

    def record(self, row: Row) -> None:
        """Keep one row of metrics (they are the same on every rank)."""

    def after_step(self, step: int, waited: float, loss: torch.Tensor) -> int:
        """`step` optimiser steps are done, the last with `loss`, a sum over this rank's micro-batches; so far this rank has waited
        `waited` seconds for data. Gives the step to go on from: `step`, or an earlier one that training went back to."""


def train(
    engine: Engine,
    objective: Objective,
    stream: Stream,
    held_out: HeldOut | None,
    config: Pretrain,
    plan: Plan,
    seed: int,
    world: World,
    first: int,
    hooks: Hooks,
) -> None:
    """Steps `first` to `plan.steps`, drawing from `stream`."""
    step, batches = first, watched(iter(stream))
    clock, device = hooks.clock, Device(config, world)
    clock.start()
    by_layer = config.statistics.steps(config.batch, plan.samples_an_epoch) if config.statistics else None
    while step < plan.steps:
        done = step + 1
        counts = by_layer is not None and done % by_layer == 0
        is_told = counts or done % plan.log_every == 0 or done in (1, plan.steps)
        is_first = done // _APART > (done - plan.log_every) // _APART  # row of these ten steps
        engine.statistics.watch(counts or done in (1, plan.steps) or (is_told and is_first), counts)
        lr = config.optimizer.lr * factor(config.schedule.name, step, plan.steps, plan.warmup, plan.cooldown, plan.timescale)
        engine.set_lr(lr)
        totals = accumulate(engine, objective, batches, stream, seed, clock)
        clock.count(config.batch)
        if is_told and not engine.is_left_out:
            row = mean_over_ranks(totals, stream.pieces, world)
            row = {
                "step": done,
                "samples": done * config.batch,
                "epoch": done * config.batch / plan.samples_an_epoch,
                **{f"train/{name}": value for name, value in row.items()},
                "train/lr": lr,
                "train/grad_norm": engine.gradient_norm(),
                **engine.statistics.read(by_layer=counts),
                **clock.read(plan.flops_a_sample, world, device.peak),
                **device.read(world),
            }
            with clock.span(OTHER):
                hooks.record(row)
        beat(VALIDATING)
        if held_out is not None and plan.validate_every and (done % plan.validate_every == 0 or done == plan.steps):
            with clock.span(VALIDATION):
                row = validate(engine, objective, held_out, stream, config, world)
            hooks.record({"step": done, "samples": done * config.batch, **row})
        with clock.beside():
            step = hooks.after_step(done, clock.waited, totals["loss"])
        if step != done:  # back at a checkpoint, past some data
            batches.close()
            batches = watched(iter(stream))
