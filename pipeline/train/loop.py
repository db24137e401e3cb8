"""The training loop: batch -> objective -> engine -> metrics. Everything else hangs on its hooks.

Shapes: b micro-batch, P input pixels. n micro-batches make a global batch, w ranks make k = ceil(n / w) each.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import torch

from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import Diverged
from pipeline.core.world import World
from pipeline.objectives import VALIDATION, Objective
from pipeline.plan import Plan
from pipeline.stream import Dataset, Stream
from pipeline.stream.batches import evaluation_batches, filler
from pipeline.train.schedule import factor
from pipeline.train.zero import Engine

Row = dict[str, float]
_SKIPS, _SKIPS_16 = 10, 100  # updates in a row that could not be made, after which none ever will be; fp16 finds its scale by such


class Hooks(Protocol):
    """What happens beside training. Every rank calls every hook at the same steps."""

    def record(self, row: Row) -> None:
        """Keep one row of metrics (they are the same on every rank)."""

    def after_step(self, step: int, waited: float) -> None:
        """`step` optimiser steps are done; so far this rank has waited `waited` seconds for data."""


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
    """Steps `first` to `plan.steps`, drawing from `stream`.

    Raises:
        Diverged: the loss is no longer a finite number, or no update can be made any more.
    """
    batches = iter(stream)
    clock = Clock()
    for step in range(first, plan.steps):
        lr = config.optimizer.lr * factor(config.schedule.name, step, plan.steps, plan.warmup, plan.cooldown, plan.timescale)
        engine.set_lr(lr)
        totals: dict[str, torch.Tensor] = {}
        for _ in range(stream.rounds):
            with clock.waiting():
                batch = next(batches)
            engine.module.train(batch.weight > 0)  # a filler must not enter BatchNorm's statistics
            # Dropout and its like depend on the micro-batch alone: not on the rank that has it, nor on a restart.
            torch.manual_seed((seed << 32) + batch.index)  # of 64 bits
            loss, metrics = objective.loss(engine.module, batch.to(world.device))
            # Each real micro-batch counts 1 / n; DeepSpeed divides by k and by w.
            engine.backward(loss * (batch.weight * stream.rounds * world.size / stream.pieces))
            engine.step()
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0) + value.detach() * batch.weight
        clock.count(config.batch)
        done = step + 1
        if engine.skipped >= (_SKIPS_16 if config.precision == "fp16" else _SKIPS):
            raise Diverged(
                f"pretrain: at step {done} the gradient has not been finite for {engine.skipped} steps in a row, and none was taken; "
                "try a lower pretrain.optimizer.lr or a longer pretrain.schedule.warmup"
            )
        if done % plan.log_every == 0 or done in (1, plan.steps):
            row = _mean(totals, stream.pieces, world)
            if not math.isfinite(row["loss"]):
                raise Diverged(
                    f"pretrain: the loss is {row['loss']} at step {done}; "
                    "try a lower pretrain.optimizer.lr or a longer pretrain.schedule.warmup"
                )
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
            if held_out is not None and plan.validate_every and (done % plan.validate_every == 0 or done == plan.steps):
                hooks.record({"step": done, "samples": done * config.batch, **validate(engine, objective, held_out, stream, config, world)})
            hooks.after_step(done, clock.waited)


def validate(engine: Engine, objective: Objective, held_out: Dataset, stream: Stream, config: Pretrain, world: World) -> Row:
    """The objective on all of a held-out split, unaugmented; every rank makes the same number of forward passes."""
    engine.agree_on_buffers(stream.has_samples)
    engine.module.eval()
    length = stream.text_length if stream.tokenizer else 0
    batches = evaluation_batches(
        held_out, config.image.pixels, config.micro_batch, world.rank, world.size, tokenizer=stream.tokenizer, text_length=length
    )
    none = filler(1, config.image.pixels, length)  # where other ranks have a batch more
    totals: dict[str, torch.Tensor] = {}
    with torch.no_grad(), torch.random.fork_rng():
        for turn in range(-(-len(held_out) // (config.micro_batch * world.size))):
            torch.manual_seed(turn * world.size + world.rank)  # the same masks each time
            batch = next(batches, none).to(world.device)
            loss, metrics = objective.loss(engine.module, batch)
            weight = batch.weight * objective.count(batch)
            for name, value in {"loss": loss, **metrics, "count": torch.ones(())}.items():
                totals[name] = totals.get(name, 0) + value * weight
    sums = _mean(totals, 1, world)
    count = max(1.0, sums.pop("count"))
    return {f"{VALIDATION}{name}": value / count for name, value in sums.items()}


def _mean(totals: dict[str, torch.Tensor], count: int, world: World) -> Row:
    """Sums of this rank's to means over all ranks'."""
    names = list(totals)
    sums = world.sum([float(totals[name]) for name in names])
    return {name: value / count for name, value in zip(names, sums, strict=True)}


class Clock:
    """Throughput since it was last read, with pauses (validation, saving) left out; `waited`: seconds waited for data, ever."""

    def __init__(self) -> None:
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0
        self.waited = 0.0

    def count(self, samples: int) -> None:
        self._samples += samples

    def waiting(self) -> _Span:
        return _Span(self, is_wait=True)

    def paused(self) -> _Span:
        return _Span(self, is_wait=False)

    def add(self, seconds: float, is_wait: bool) -> None:
        if is_wait:
            self._waited += seconds
            self.waited += seconds
        else:
            self._start += seconds

    def read(self, flops_a_sample: float) -> Row:
        """Samples a second and floating-point operations a second of all ranks together; seconds waited for data."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._samples / seconds
        row = {
            "train/images_per_s": rate,
            "train/tflops_per_s": rate * flops_a_sample / 1e12,
            "train/data_wait_fraction": self._waited / seconds,
        }
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0
        return row


class _Span:
    def __init__(self, clock: Clock, is_wait: bool) -> None:
        self._clock, self._is_wait = clock, is_wait

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.add(time.perf_counter() - self._began, self._is_wait)
