"""From a config to what its memory, traffic and time are made of: the model on the meta device, its loss, its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.config.pretrain import Pretrain
from pipeline.models import Model, build, flops, training_flops
from pipeline.models.blockwise import blocks_of
from pipeline.models.options import Options
from pipeline.models.registry import family_of
from pipeline.objectives import OBJECTIVES, Facts, model_options
from pipeline.objectives.joint import JointObjective
from pipeline.objectives.pairs import TILE
from pipeline.plan.live import Live, count_live
from pipeline.plan.memory import Memory, memory_of
from pipeline.plan.setup import HEAP_BELOW, Setup, Tensors, moment_bytes

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACTORED_FROM = 32  # rows and columns of a matrix whose second moment Adafactor factors (train/optimizers.py)


def stage_of(config: Pretrain) -> int:
    """The stage that DeepSpeed runs. In 16 bits its stage 0 takes a step of its own before the first (it decays weights and counts in
    Adam's bias correction), and does not give out fp32 weights. Stage 1 sends as many bytes and does neither."""
    least = 0 if config.precision == "fp32" else 1
    return max(least, config.zero.stage)  # one that the plan is still to choose counts as the least


@dataclass(frozen=True)
class Workload:
    """One config's pre-training on `workers` workers, for a data's `facts`; figures are worked out as they are asked for."""

    pretrain: Pretrain
    facts: Facts
    workers: int
    on_cpu: bool = False

    @cached_property
    def options(self) -> Options:
        p = self.pretrain
        return model_options(p.model.name, p.model.arguments, p.objective.name, p.objective.arguments, p.image.pixels, self.facts)

    @property
    def width(self) -> int:
        return WIDTHS[self.pretrain.precision]

    @property
    def stage(self) -> int:
        """As the engine runs it."""
        return stage_of(self.pretrain)

    @property
    def micro_batches(self) -> int:
        """Of a global batch."""
        return self.pretrain.batch // self.pretrain.micro_batch

    @property
    def rounds(self) -> int:
        """Micro-batches of a worker and step."""
        return -(-self.micro_batches // self.workers)

    @property
    def hpz(self) -> int:
        return self.pretrain.zero.hpz

    @property
    def recompute(self) -> bool:
        return self.pretrain.recompute

    @property
    def has_average(self) -> bool:
        return self.pretrain.average is not None

    @cached_property
    def has_blocks(self) -> bool:
        """Whether the model is made of blocks that can be computed once more."""
        return bool(blocks_of(build(self.pretrain.model.name, self.options, device="meta")))

    @property
    def is_joint(self) -> bool:
        """Whether the loss is one of all pairs of the global batch."""
        return issubclass(OBJECTIVES[self.pretrain.objective.name], JointObjective)

    @property
    def has_first_pass(self) -> bool:
        """Whether each micro-batch passes through the model once more before, for a joint loss of several of them."""
        return self.is_joint and self.rounds > 1

    @cached_property
    def tensors(self) -> Tensors:
        return _tensors(self.pretrain.model.name, self.options, self.width)

    @cached_property
    def forward_flops(self) -> float:
        return _forward_flops(self.pretrain.model.name, self.options)

    @cached_property
    def training_flops(self) -> float:
        """Forward and back."""
        return _training_flops(self.pretrain.model.name, self.options)

    @cached_property
    def live(self) -> Live:
        p = self.pretrain
        return _live(p.model.name, self.options, p.precision, p.micro_batch, self.recompute, self.on_cpu)

    @property
    def embedding(self) -> int:
        """E of a contrastive loss."""
        return int(getattr(self.options, "embed", 0)) if self.is_joint else 0

    @property
    def pair_bytes(self) -> int:
        """Of a contrastive loss in fp32 (objectives/pairs.py): everyone's features, own features and their gradients, three tiles of own
        rows, and a number an image and caption."""
        if not self.is_joint:
            return 0
        batch, own = self.pretrain.batch, self.rounds * self.pretrain.micro_batch
        return 4 * (2 * batch * self.embedding + 4 * own * self.embedding + 3 * own * min(TILE, batch) + 2 * batch)

    @property
    def waiting_bytes(self) -> int:
        """Of batches in host memory: the one in use, as many as decoding threads are at, and two ready."""
        p = self.pretrain
        size = p.micro_batch * (3 * p.image.pixels**2 + 8 * (1 + self.facts.context))
        ahead = max(1, p.loader.workers) + 2
        return size * (max(ahead, self.rounds) if self.is_joint else ahead)  # a joint loss holds all micro-batches of its step

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, moments and average, in fp32."""
        return 4 * self.tensors.parameters * (1 + self.has_average) + moment_bytes(self.pretrain.optimizer, self.tensors)

    @property
    def memory(self) -> Memory:
        return memory_of(self.setup)

    @property
    def setup(self) -> Setup:
        p = self.pretrain
        return Setup(
            tensors=self.tensors, width=self.width, stage=self.stage, workers=self.workers, rounds=self.rounds, optimizer=p.optimizer,
            live=self.live, offload=p.zero.offload, hpz=self.hpz, has_average=self.has_average, pairs=self.pair_bytes,
            inputs=self.waiting_bytes, on_cpu=self.on_cpu,
        )  # fmt: skip


@cache
def _tensors(name: str, options: Options, width: int) -> Tensors:
    parameters = list(build(name, options, device="meta").parameters())
    sizes = [p.numel() for p in parameters]
    matrices = [(p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, p.numel()) for p in parameters]
    factored = sum(rows + columns if min(rows, columns) >= FACTORED_FROM else rows * columns for rows, columns in matrices)
    return Tensors(sum(sizes), max(sizes), sum(n for n in sizes if width * n < HEAP_BELOW), factored)


@cache
def _forward_flops(name: str, options: Options) -> float:
    return flops(build(name, options, device="meta"))


@cache
def _training_flops(name: str, options: Options) -> float:
    return training_flops(build(name, options, device="meta"))


@cache
def _live(name: str, options: Options, precision: str, batch: int, recompute: bool, on_cpu: bool) -> Live:
    model: Model = build(name, options, device="meta")
    return count_live(model, _DTYPES[precision], batch, loss_like(name), recompute, on_cpu)


def loss_like(model: str) -> Callable[[Any], torch.Tensor]:
    """A scalar of the shapes that a model's objective goes through: cross-entropy in fp32 of the last dimension; of an MAE, squares. Of a
    CLIP the features alone: its pairs are counted by themselves."""

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        rows = math.prod(logits.shape[:-1])
        return F.cross_entropy(logits.float().view(rows, -1), torch.zeros(rows, dtype=torch.long, device=logits.device))

    match family_of(model):
        case "clip":
            return lambda given: sum((each.float().sum() for each in given if each is not None), torch.zeros((), device="meta"))
        case "mae":
            return lambda given: (given[0] if isinstance(given, tuple) else given).float().square().mean()
        case _:
            return entropy
