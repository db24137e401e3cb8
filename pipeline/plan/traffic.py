"""What one worker sends in a step, by kind of collective and what it carries.

Rings: of a tensor of S bytes on w workers each sends (w - 1) / w S in an all-gather or a reduce-scatter, twice that in an all-reduce
(Patarasuk & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). gloo sends as much, but its reduce-scatter is an all-reduce of which a
rank keeps its part: twice the bytes (measured on 2, 3 and 4 ranks, torch 2.13).

What DeepSpeed 0.19.8 does of ZeRO's book: stages 1 and 2 sum gradients with an all-reduce, not a reduce-scatter, for
`use_multi_rank_bucket_allreduce` is its default; stage 2 does so after every micro-batch. Stage 3 gathers parameters and scatters
gradients at each micro-batch, a loss of all pairs twice where it embeds twice; a model of fewer than `MAX_LIVE` parameters has them still
in the backward pass, a larger one gathers again: with hierarchical partitioning (ZeRO++, arXiv 2306.10209, section 3.2) from
its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.setup import MAX_LIVE
from pipeline.plan.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes that one worker sends in a step."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0
    features: int = 0
    near: int = 0  # of the gathers, those between the neighbours of hierarchical partitioning (ZeRO++), within a node

    @property
    def total(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather + self.features


def traffic_of(load: Workload) -> Traffic:
    w = load.workers
    if w == 1:
        return Traffic()
    ring = (w - 1) / w
    size = load.width * load.tensors.parameters
    features = ring * 4 * load.pretrain.batch * 2 * (load.embedding + 1) if load.is_joint else 0  # and a number an image and a caption
    stage = load.stage
    if stage < 3:
        reductions = load.rounds if stage == 2 else 1
        gathered = ring * size if stage else 0
        return Traffic(all_reduce=round(2 * ring * size * reductions), all_gather=round(gathered), features=round(features))
    forward = 2 if load.has_first_pass else 1
    backward = size * load.rounds if load.tensors.parameters > MAX_LIVE else 0  # what could not stay is gathered again
    near = (load.hpz - 1) / load.hpz * backward
    return Traffic(
        reduce_scatter=round((2 if load.on_cpu else 1) * ring * size * load.rounds),
        all_gather=round(ring * size * load.rounds * forward + (near if load.hpz > 1 else ring * backward)),
        features=round(features),
        near=round(near),
    )
