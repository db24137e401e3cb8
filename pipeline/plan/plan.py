"""Steps, samples, parameters, memory and floating-point operations of a config.

Shapes: N tokens, D width, L depth, h heads, b micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.config.schema import Pretrain
from pipeline.models import build_model
from pipeline.models.vit import VisionTransformer
from pipeline.stream.collection import Reading

_BACKWARD = 3  # a training step costs three forward passes: one forward, and a backward of twice that


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """Steps are of the optimiser; `flops_a_sample` is of training, two a multiply-add."""

    steps: int
    warmup: int
    samples: int
    samples_an_epoch: int
    log_every: int
    validate_every: int | None
    parameters: int
    flops_a_sample: float
    memory: Memory
    reading: Reading | None = None


def make_plan(config: Config, samples_an_epoch: int, classes: int, workers: int, reading: Reading | None = None) -> Plan:
    """The plan of `config.pretrain` for a training split of `samples_an_epoch` samples; `reading` is what these ask of the store."""
    p = config.pretrain
    assert p is not None, "only pre-training is planned"
    steps = p.duration.steps(p.batch, samples_an_epoch)
    with torch.device("meta"):
        model = build_model(p.model.name, p.model.arguments, pixels=p.image.pixels, classes=classes)
    parameters = sum(w.numel() for w in model.parameters())
    return Plan(
        steps=steps,
        warmup=p.schedule.warmup.steps(p.batch, samples_an_epoch) if p.schedule.warmup else 0,
        samples=steps * p.batch,
        samples_an_epoch=samples_an_epoch,
        log_every=p.log.steps(p.batch, samples_an_epoch),
        validate_every=p.validation.every.steps(p.batch, samples_an_epoch) if p.validation else None,
        parameters=parameters,
        flops_a_sample=_BACKWARD * model.flops(),
        memory=_memory(p, model, parameters, workers),
        reading=reading,
    )


def _memory(p: Pretrain, model: VisionTransformer, parameters: int, workers: int) -> Memory:
    """ZeRO (arXiv 1910.02054, section 3.1 and figure 1): 2 + 2 + 12 bytes a parameter in 16-bit mixed precision with
    Adam, 4 + 4 + 8 in fp32; stage 1 shares the optimiser's among the workers, stage 2 gradients, stage 3 parameters."""
    half = p.precision != "fp32"
    width = 2 if half else 4
    moments = {"adamw": 2, "adam": 2, "sgd": 1}.get(p.optimizer.name, 2)
    optimizer = (4 * moments + (4 if half else 0)) * parameters

    stage = max(1, p.zero.stage) if half else p.zero.stage  # the engine runs 16-bit stage 0 as stage 1 (train/zero.py)

    def shared(size: int, from_stage: int) -> int:
        return -(-size // workers) if stage >= from_stage else size

    return Memory(
        parameters=shared(width * parameters, 3),
        gradients=shared(width * parameters, 2),
        optimizer=shared(optimizer, 1),
        activations=p.micro_batch * _activation_bytes(model, width),
    )


def _activation_bytes(model: VisionTransformer, width: int) -> int:
    """Of one sample: arXiv 2205.05198, equation 1, without its 5 a s / h term, since the fused attention keeps no
    N x N matrix; 34 N D bytes a layer in 16 bits, twice that in 32."""
    tokens = (model.pixels // model.patch) ** 2 + 1
    return 34 * width // 2 * tokens * model.width * len(model.blocks)
