"""The gradient of a global batch, micro-batch by micro-batch, and what was measured on the way.

n micro-batches make a global batch; w ranks make k = ceil(n / w) each, some of them fillers of weight zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.core.world import World
from pipeline.objectives import Objective
from pipeline.stream import Stream
from pipeline.stream.batches import MicroBatch
from pipeline.train.speed import Clock, Row
from pipeline.train.zero import Engine

Totals = dict[str, torch.Tensor]  # sums over this rank's micro-batches, of the loss and each metric


def accumulate(engine: Engine, objective: Objective, batches: Iterator[MicroBatch], stream: Stream, seed: int, clock: Clock) -> Totals:
    """Take this rank's micro-batches of the next global batch, and have the engine make the step that they add up to."""
    world, totals = engine.world, Totals()
    for _ in range(stream.rounds):
        with clock.waiting():
            batch = next(batches)
        begin(engine, batch, seed)
        loss, metrics = objective.loss(engine.module, batch.to(world.device))
        # Each real micro-batch counts 1 / n; DeepSpeed divides by k and by w.
        engine.backward(loss * (batch.weight * stream.rounds * world.size / stream.pieces))
        engine.step()
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0) + value.detach() * batch.weight
    return totals


def begin(engine: Engine, batch: MicroBatch, seed: int) -> None:
    """Make the forward pass of `batch` what it is on any rank, and after any restart."""
    engine.module.train(batch.weight > 0)  # a filler must not enter BatchNorm's statistics
    # Dropout and its like depend on the micro-batch alone.
    torch.manual_seed((seed << 32) + batch.index)  # of 64 bits


def mean_over_ranks(totals: Totals, count: float, world: World) -> Row:
    """Sums of each rank to means over `count`, on every rank."""
    names = list(totals)
    sums = world.sum([float(totals[name]) for name in names])
    return {name: value / count for name, value in zip(names, sums, strict=True)}
