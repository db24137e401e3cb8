"""Steps, samples, parameters, memory, traffic, time and cost of a config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.config import Config
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError
from pipeline.objectives import Facts
from pipeline.plan.devices import Device, find_device
from pipeline.plan.memory import Memory
from pipeline.plan.pace import Measured, Pace, pace_of
from pipeline.plan.traffic import Traffic, traffic_of
from pipeline.plan.workload import Workload
from pipeline.stream.collection import Reading

# What one worker uploads of a checkpoint, in bytes a second: what one stream to a store in the same region is known to give. Where the
# figure matters, `python -m pipeline.checkpoint` shows what a save took.
UPLOAD = 200e6
_MANY = 10**12  # samples of an epoch, where nothing depends on how many


@dataclass(frozen=True)
class Plan:
    """Steps are of the optimiser; `flops_a_sample` is of training, two a multiply-add, a backward pass twice the forward pass but for the
    gradient by the pixels (models/model.py), recomputation left out. What a worker need not know before it trains is worked out as it is
    asked for."""

    steps: int
    warmup: int
    samples: int
    samples_an_epoch: int
    log_every: int
    validate_every: int | None
    load: Workload
    device: Device
    reading: Reading | None = None
    cooldown: int = 0
    timescale: int = 10_000
    measured: Measured | None = None

    @property
    def parameters(self) -> int:
        return self.load.tensors.parameters

    @cached_property
    def flops_a_sample(self) -> float:
        return self.load.training_flops

    @cached_property
    def memory(self) -> Memory:
        return self.load.memory

    @cached_property
    def peak(self) -> int:
        """Bytes of one worker, as measured here where that was."""
        return round(self.memory.peak * (self.measured.memory if self.measured else 1))

    @cached_property
    def traffic(self) -> Traffic:
        return traffic_of(self.load)

    @cached_property
    def pace(self) -> Pace:
        return pace_of(self.load, self.device, self.traffic, self.measured)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, the optimiser's moments and the average, in fp32, of all workers together."""
        return self.load.checkpoint_bytes

    @property
    def save_seconds(self) -> float:
        """Until a checkpoint is in the store, each worker sending its share at `UPLOAD`; training goes on meanwhile."""
        return self.checkpoint_bytes / self.load.workers / UPLOAD

    @property
    def hours(self) -> float:
        return self.steps * self.pace.step / 3600

    @property
    def gpu_hours(self) -> float:
        """Of devices: on CPUs, hours of workers."""
        return self.hours * self.load.workers

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.device.price

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the device's memory; None where that is not known."""
        return self.peak <= self.device.memory if self.device.memory else None


def check_schedule(p: Pretrain, samples_an_epoch: int | None = None) -> tuple[int, int, int]:
    """Steps of the run, its warm-up and its cool-down. Without `samples_an_epoch` these mean something only where all are counted in
    epochs or none is; otherwise nothing is checked.

    Raises:
        ConfigError: warm-up and cool-down are longer than the run.
    """
    spans = (p.duration, p.schedule.warmup, p.schedule.cooldown)
    if samples_an_epoch is None:
        if len({span.unit == "epoch" for span in spans if span}) > 1:
            return 0, 0, 0
        samples_an_epoch = _MANY
    steps, warmup, cooldown = (span.steps(p.batch, samples_an_epoch) if span else 0 for span in spans)
    if warmup + cooldown > steps:
        what = (
            f"warmup ({p.schedule.warmup}, {warmup:,} steps) is" if warmup else f"cooldown ({p.schedule.cooldown}, {cooldown:,} steps) is"
        )
        if warmup and cooldown:
            what = f"warmup ({warmup:,} steps) and cooldown ({cooldown:,} steps) are"
        raise ConfigError(f"pretrain.schedule: {what} longer than the run ({steps:,} steps)")
    return steps, warmup, cooldown


def check_groups(config: Config) -> None:
    """Raises ConfigError where hierarchical partitioning does not go with a number of workers that the run could have."""
    p, cluster = config.pretrain, config.cluster
    hpz = p.zero.hpz if p else 1
    most = cluster.workers or cluster.gpus
    least = max(cluster.min_workers or 1, cluster.min_gpus or 1) if cluster.min_workers or cluster.min_gpus is not None else most
    if hpz == 1 or (least == most and most and most % hpz == 0):
        return
    if least != most:
        has = f"{least} to {most} workers" if most else f"{least} workers or more"
    else:
        has = f"{most} workers" if most else "as many workers as there is room for"
    raise ConfigError(
        f"pretrain.zero.hpz: {hpz} must divide every number of workers that the run could have, and cluster allows {has} "
        f"(allowed: 1, or a multiple of {hpz} as cluster.workers or cluster.gpus, and no fewer as min_workers or min_gpus)"
    )


def make_plan(
    config: Config,
    samples_an_epoch: int,
    facts: Facts,
    workers: int,
    reading: Reading | None = None,
    measured: Measured | None = None,
) -> Plan:
    """The plan of `config.pretrain` for a training split of `samples_an_epoch` samples; `reading` is what these ask of the store.

    Raises:
        ConfigError: the schedule's warm-up and cool-down are longer than the run; the model and the objective do not fit together; an
            unknown device.
    """
    p = config.pretrain
    assert p is not None, "only pre-training is planned"
    steps, warmup, cooldown = check_schedule(p, samples_an_epoch)
    device = find_device(config.cluster, workers)
    load = Workload(p, facts, workers, device.is_cpu)
    _ = load.options  # raises what is wrong with the model
    return Plan(
        steps=steps,
        warmup=warmup,
        samples=steps * p.batch,
        samples_an_epoch=samples_an_epoch,
        log_every=p.log.steps(p.batch, samples_an_epoch),
        validate_every=p.validation.every.steps(p.batch, samples_an_epoch) if p.validation else None,
        load=load,
        device=device,
        reading=reading,
        cooldown=cooldown,
        timescale=p.schedule.timescale.steps(p.batch, samples_an_epoch) if p.schedule.timescale else Plan.timescale,
        measured=measured,
    )
