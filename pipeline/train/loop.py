"""The training loop: batch -> objective -> engine -> metrics. Everything else hangs on its hooks."""

from __future__ import annotations

import math
from typing import Protocol

from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import Diverged
from pipeline.core.world import World
from pipeline.objectives import Objective
from pipeline.plan import Plan
from pipeline.stream import Stream
from pipeline.train.accumulate import accumulate, mean_over_ranks
from pipeline.train.device import Device
from pipeline.train.schedule import factor
from pipeline.train.speed import OTHER, VALIDATION, Clock, Row
from pipeline.train.validate import HeldOut, validate
from pipeline.train.zero import Engine

_SKIPS, _SKIPS_16 = 10, 100  # updates in a row that could not be made, after which none ever will be; fp16 finds its scale by such


class Hooks(Protocol):
    """What happens beside training. Every rank calls every hook at the same steps. `clock` learns where the time goes."""

    clock: Clock

    def record(self, row: Row) -> None:
        """Keep one row of metrics (they are the same on every rank)."""

    def after_step(self, step: int, waited: float) -> None:
        """`step` optimiser steps are done; so far this rank has waited `waited` seconds for data."""


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
    """Steps `first` to `plan.steps`, drawing from `stream`.

    Raises:
        Diverged: the loss is no longer a finite number, or no update can be made any more.
    """
    batches = iter(stream)
    clock, device = hooks.clock, Device(config, world)
    clock.start()
    by_layer = config.statistics.steps(config.batch, plan.samples_an_epoch) if config.statistics else None
    for step in range(first, plan.steps):
        done = step + 1
        counts = by_layer is not None and done % by_layer == 0
        is_told = counts or done % plan.log_every == 0 or done in (1, plan.steps)
        engine.statistics.watch(is_told)
        lr = config.optimizer.lr * factor(config.schedule.name, step, plan.steps, plan.warmup, plan.cooldown, plan.timescale)
        engine.set_lr(lr)
        totals = accumulate(engine, objective, batches, stream, seed, clock)
        clock.count(config.batch)
        if engine.skipped >= (_SKIPS_16 if config.precision == "fp16" else _SKIPS):
            raise Diverged(
                f"pretrain: at step {done} the gradient has not been finite for {engine.skipped} steps in a row, and none was taken; "
                "try a lower pretrain.optimizer.lr or a longer pretrain.schedule.warmup"
            )
        if is_told:
            row = mean_over_ranks(totals, stream.pieces, world)
            if not math.isfinite(row["loss"]):
                raise Diverged(
                    f"pretrain: the loss is {row['loss']} at step {done}; "
                    "try a lower pretrain.optimizer.lr or a longer pretrain.schedule.warmup"
                )
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
        if held_out is not None and plan.validate_every and (done % plan.validate_every == 0 or done == plan.steps):
            with clock.span(VALIDATION):
                row = validate(engine, objective, held_out, stream, config, world)
            hooks.record({"step": done, "samples": done * config.batch, **row})
        with clock.beside():
            hooks.after_step(done, clock.waited)
