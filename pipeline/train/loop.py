"""The training loop: batch -> objective -> engine -> metrics. Everything else hangs on its hooks.

Shapes: b micro-batch, P input pixels. n micro-batches make a global batch, w ranks make k = ceil(n / w) each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Protocol

import torch

from pipeline.config.schema import Pretrain
from pipeline.core.errors import Diverged
from pipeline.core.world import World
from pipeline.objectives import Classify
from pipeline.plan import Plan
from pipeline.stream import Dataset, MicroBatch, Stream
from pipeline.stream.batches import evaluation_batches, filler
from pipeline.stream.decode import normalize
from pipeline.stream.mixing import mixed
from pipeline.train.schedule import factor
from pipeline.train.zero import Engine

Row = dict[str, float]


class Hooks(Protocol):
    """What happens beside training. Every rank calls every hook at the same steps."""

    def record(self, row: Row) -> None:
        """Keep one row of metrics (they are the same on every rank)."""

    def after_step(self, step: int) -> None:
        """`step` optimiser steps are done."""


def train(
    engine: Engine,
    objective: Classify,
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
        Diverged: the loss is no longer a finite number.
    """
    batches = iter(stream)
    clock = Clock()
    for step in range(first, plan.steps):
        lr = config.optimizer.lr * factor(config.schedule.name, step, plan.steps, plan.warmup)
        engine.set_lr(lr)
        engine.module.train()
        totals: dict[str, torch.Tensor] = {}
        for _ in range(stream.rounds):
            with clock.waiting():
                batch = next(batches)
            # Dropout and its like depend on the micro-batch alone: not on the rank that has it, nor on a restart.
            torch.manual_seed((seed << 32) + batch.index)  # of 64 bits
            loss, metrics = _forward(engine, objective, batch, config, world)
            # Each real micro-batch counts 1 / n; DeepSpeed divides by k and by w.
            engine.backward(loss * (batch.weight * stream.rounds * world.size / stream.pieces))
            engine.step()
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0) + value.detach() * batch.weight
        clock.count(config.batch)
        done = step + 1
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
                hooks.record({"step": done, "samples": done * config.batch, **validate(engine, objective, held_out, config, world)})
            hooks.after_step(done)


def validate(engine: Engine, objective: Classify, held_out: Dataset, config: Pretrain, world: World) -> Row:
    """The objective on all of a held-out split, unaugmented; every rank makes the same number of forward passes."""
    engine.module.eval()
    batches = evaluation_batches(held_out, config.image.pixels, config.micro_batch, world.rank, world.size)
    totals: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in _equal_turns(batches, len(held_out), config, world):
            loss, metrics = _forward(engine, objective, batch, config, world)
            labelled = batch.weight * (batch.labels >= 0).sum()  # the objective gives means over these
            for name, value in {"loss": loss, **metrics, "labelled": torch.ones(())}.items():
                totals[name] = totals.get(name, 0) + value * labelled
    sums = _mean(totals, 1, world)
    count = max(1.0, sums.pop("labelled"))
    return {f"validate/{name}": value / count for name, value in sums.items()}


def _equal_turns(batches: Iterator[MicroBatch], samples: int, config: Pretrain, world: World) -> Iterator[MicroBatch]:
    """This rank's batches, and a filler of weight zero where other ranks have one more."""
    none = filler(1, config.image.pixels)
    for _ in range(-(-samples // (config.micro_batch * world.size))):
        yield next(batches, none)


def _forward(
    engine: Engine, objective: Classify, batch: MicroBatch, config: Pretrain, world: World
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = normalize(batch.images.to(world.device, non_blocking=True), config.image.mean, config.image.std, engine.dtype)
    labels = batch.labels.to(world.device, non_blocking=True)
    return objective.loss(engine.module, mixed(images, batch.mix), labels, batch.mix)


def _mean(totals: dict[str, torch.Tensor], count: int, world: World) -> Row:
    """Sums of this rank's to means over all ranks'."""
    names = list(totals)
    sums = world.sum([float(totals[name]) for name in names])
    return {name: value / count for name, value in zip(names, sums, strict=True)}


class Clock:
    """Throughput since it was last read, with pauses (validation, saving) left out."""

    def __init__(self) -> None:
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0

    def count(self, samples: int) -> None:
        self._samples += samples

    def waiting(self) -> _Span:
        return _Span(self, is_wait=True)

    def paused(self) -> _Span:
        return _Span(self, is_wait=False)

    def add(self, seconds: float, is_wait: bool) -> None:
        if is_wait:
            self._waited += seconds
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
