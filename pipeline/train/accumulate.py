"""The gradient of a global batch, micro-batch by micro-batch, and what was measured on the way.

    a mean over samples        each micro-batch ─▶ loss ─▶ backward
    a loss of all together     each micro-batch ─▶ features, without a graph ─▶ the loss of all ranks' and its gradient by features
                               ─▶ each micro-batch once more, with a graph ─▶ backward of features x gradient
                               (where a rank has one micro-batch alone, its first pass keeps the graph and is the only one)

n micro-batches make a global batch; w ranks make k = ceil(n / w) each, some of them fillers of weight zero. DeepSpeed divides gradients
by k and by w.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.core.world import World
from pipeline.objectives import Objective
from pipeline.objectives.joint import Embedded, JointObjective
from pipeline.stream import Stream
from pipeline.stream.batches import MicroBatch
from pipeline.train.speed import Clock, Row
from pipeline.train.watch import STEP, beat
from pipeline.train.zero import OWN_BUFFERS, Engine

Totals = dict[str, torch.Tensor]  # of this rank: sums over micro-batches of the loss and each metric


def accumulate(engine: Engine, objective: Objective, batches: Iterator[MicroBatch], stream: Stream, seed: int, clock: Clock) -> Totals:
    """Take this rank's micro-batches of the next global batch, and have the engine make the step that they add up to."""
    if isinstance(objective, JointObjective):
        return _joint(engine, objective, batches, stream, seed, clock)
    totals = Totals()
    for _ in range(stream.rounds):
        with clock.waiting():
            batch = next(batches)
        _begin(engine, batch, seed)
        loss, metrics = objective.loss(engine.module, batch.to(engine.world.device))
        engine.backward(loss * (batch.weight * stream.rounds * engine.world.size / stream.pieces))
        engine.step()
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0) + value.detach() * batch.weight
    return totals


def _joint(engine: Engine, objective: JointObjective, batches: Iterator[MicroBatch], stream: Stream, seed: int, clock: Clock) -> Totals:
    with clock.waiting():
        mine = [next(batches) for _ in range(stream.rounds)]

    def embed(batch: MicroBatch) -> Embedded:
        _begin(engine, batch, seed)
        return objective.embed(engine.module, batch.to(engine.world.device))

    if is_single := len(mine) == 1:
        first = [embed(mine[0])]
    else:
        with torch.no_grad(), _statistics_kept(engine.module):
            first = [embed(batch) for batch in mine]
    real = [e for e, batch in zip(first, mine, strict=True) if batch.weight]
    columns = zip(*(e.features for e in real or first), strict=True)
    features = tuple(torch.cat(parts).detach()[: stream.shares[stream.rank]] for parts in columns)  # of fillers alone: none
    coupled = objective.couple(Embedded(features, first[0].detach().scalars), stream.shares, engine.world)

    start = 0
    for turn, batch in enumerate(mine):
        embedded = first[0] if is_single else embed(batch)
        at = slice(start, start + len(batch.images)) if batch.weight else slice(0, 0)
        start = at.stop if batch.weight else start
        if batch.weight:
            through = coupled.through(embedded, at, 1 / len(real))
        else:  # the ranks' backward passes must match
            through = sum((tensor.sum() for tensor in (*embedded.features, *embedded.scalars)), torch.zeros(())) * 0.0
        engine.backward(through * (stream.rounds * engine.world.size), first[turn].sound())
        engine.step()
    return {name: value * stream.pieces for name, value in {"loss": coupled.loss, **coupled.metrics}.items()}


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are as they were after this block: the pass that follows moves them, once."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(OWN_BUFFERS)}
    yield
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])


def _begin(engine: Engine, batch: MicroBatch, seed: int) -> None:
    """Make the forward pass of `batch` what it is on any rank, after any restart, and a second time."""
    beat(STEP)
    engine.module.train(batch.weight > 0)  # a filler must not enter BatchNorm's statistics
    # Dropout and its like depend on the micro-batch alone.
    torch.manual_seed((seed << 32) + batch.index)  # of 64 bits


def mean_over_ranks(totals: Totals, count: float, world: World) -> Row:
    """Sums of each rank to means over `count`, on every rank."""
    names = list(totals)
    sums = world.sum([float(totals[name]) for name in names])
    return {name: value / count for name, value in zip(names, sums, strict=True)}
