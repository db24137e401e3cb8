"""Steps, samples, parameters, memory and floating-point operations of a config."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError
from pipeline.models import Model, build, flops
from pipeline.objectives import Facts, model_options
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
    cooldown: int = 0
    timescale: int = 10_000


def make_plan(config: Config, samples_an_epoch: int, facts: Facts, workers: int, reading: Reading | None = None) -> Plan:
    """The plan of `config.pretrain` for a training split of `samples_an_epoch` samples; `reading` is what these ask of the store.

    Raises:
        ConfigError: the schedule's warm-up and cool-down are longer than the run.
    """
    p = config.pretrain
    assert p is not None, "only pre-training is planned"
    steps = p.duration.steps(p.batch, samples_an_epoch)
    warmup, cooldown = (span.steps(p.batch, samples_an_epoch) if span else 0 for span in (p.schedule.warmup, p.schedule.cooldown))
    if cooldown and warmup + cooldown > steps:
        raise ConfigError(
            f"pretrain.schedule: warmup ({warmup:,} steps) and cooldown ({cooldown:,} steps) are longer than the run ({steps:,} steps)"
        )
    options = model_options(p.model.name, p.model.arguments, p.objective.name, p.objective.arguments, p.image.pixels, facts)
    model = build(p.model.name, options, device="meta")
    parameters = model.parameter_count
    return Plan(
        steps=steps,
        warmup=warmup,
        samples=steps * p.batch,
        samples_an_epoch=samples_an_epoch,
        log_every=p.log.steps(p.batch, samples_an_epoch),
        validate_every=p.validation.every.steps(p.batch, samples_an_epoch) if p.validation else None,
        parameters=parameters,
        flops_a_sample=_BACKWARD * flops(model),
        memory=_memory(p, model, parameters, workers),
        reading=reading,
        cooldown=cooldown,
        timescale=p.schedule.timescale.steps(p.batch, samples_an_epoch) if p.schedule.timescale else Plan.timescale,
    )


def _memory(p: Pretrain, model: Model, parameters: int, workers: int) -> Memory:
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
        activations=round(p.micro_batch * width * model.activations()),
    )
