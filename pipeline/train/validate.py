"""The objective on held-out data, and scores on small tasks, between two steps of training.

Shapes: b micro-batch, P input pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.config.pretrain import Pretrain
from pipeline.core.world import World
from pipeline.objectives import VALIDATION, Objective
from pipeline.stream import Dataset, Stream
from pipeline.stream.batches import evaluation_batches, filler
from pipeline.train.accumulate import mean_over_ranks
from pipeline.train.scores import Scores, score
from pipeline.train.speed import Row
from pipeline.train.watch import VALIDATING, beat
from pipeline.train.zero import Engine


@dataclass(frozen=True)
class HeldOut:
    """A split that is not trained on, and what is scored beside the objective."""

    dataset: Dataset
    scores: Scores


def validate(engine: Engine, objective: Objective, held_out: HeldOut, stream: Stream, config: Pretrain, world: World) -> Row:
    """The objective on all of a held-out split, unaugmented, and the scores; every rank makes the same number of forward passes."""
    engine.agree_on_buffers(stream.has_samples)
    engine.module.eval()
    with torch.no_grad(), torch.random.fork_rng():
        row = _loss(engine, objective, held_out.dataset, stream, config, world)
        return row | score(engine, objective, held_out.scores, stream.tokenizer, config, world)


def _loss(engine: Engine, objective: Objective, held_out: Dataset, stream: Stream, config: Pretrain, world: World) -> Row:
    length = stream.text_length if stream.tokenizer else 0
    batches = evaluation_batches(
        held_out, config.image.pixels, config.micro_batch, world.rank, world.size, tokenizer=stream.tokenizer, text_length=length
    )
    none = filler(1, config.image.pixels, length)  # where other ranks have a batch more
    totals: dict[str, torch.Tensor] = {}
    for turn in range(-(-len(held_out) // (config.micro_batch * world.size))):
        beat(VALIDATING)
        torch.manual_seed(turn * world.size + world.rank)  # the same masks each time
        batch = next(batches, none).to(world.device)
        loss, metrics = objective.loss(engine.module, batch)
        weight = batch.weight * objective.count(batch)
        for name, value in {"loss": loss, **metrics, "count": torch.ones(())}.items():
            totals[name] = totals.get(name, 0) + value * weight
    sums = mean_over_ranks(totals, 1, world)
    count = max(1.0, sums.pop("count"))
    return {f"{VALIDATION}{name}": value / count for name, value in sums.items()}
