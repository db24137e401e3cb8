"""What to change where a config does not fit into its device's memory; `auto`: the smallest stage and the largest micro-batch that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.config import Config
from pipeline.config.pretrain import AUTO, Pretrain
from pipeline.core.errors import ConfigError
from pipeline.core.units import format_bytes
from pipeline.objectives import Facts
from pipeline.plan.devices import Device, find_device
from pipeline.plan.memory import Memory
from pipeline.plan.plan import Plan
from pipeline.plan.workload import Workload

Changes = dict[str, Any]  # by the path of their key, as one would type them
_MOST_WORKERS = 4096
_ROOM = 0.95  # of the device's memory that `auto` fills: the allocator's own losses take the rest
_LESS = 0.8  # of the plan's peak, where it ran out of memory although the plan fitted


def smallest_change(load: Workload, room: int) -> Changes | None:
    """What makes `load` fit into `room` bytes: the first that does of a smaller micro-batch, recomputation, a higher stage, offloading,
    all of these together, and more workers. None where nothing does."""
    p = load.pretrain
    if smaller := _largest_micro_batch(load, room, p.micro_batch - 1):
        return {"pretrain.micro_batch": smaller}
    steps = list(_steps(load))
    for change in steps:
        if _changed(load, change).memory.peak <= room:
            return change
    every: Changes = {}
    for change in steps:
        every |= change
        if largest := _largest_micro_batch(_changed(load, every), room, p.micro_batch):
            return every if largest == p.micro_batch else {**every, "pretrain.micro_batch": largest}
    workers = 2 * load.workers
    while workers <= _MOST_WORKERS:
        for change in ({}, *steps, {**every, "pretrain.micro_batch": 1}):
            if _changed(replace(load, workers=workers), change).memory.peak <= room:
                return {**change, "cluster.workers": workers, **({} if load.on_cpu else {"cluster.gpus": workers})}
        workers *= 2
    return None


def _steps(load: Workload) -> Iterator[Changes]:
    p = load.pretrain
    if load.has_blocks and not p.recompute:
        yield {"pretrain.recompute": True}
    for stage in range(p.zero.stage + 1, 4):
        yield {"pretrain.zero.stage": stage}
    if p.zero.offload == "none":
        yield {"pretrain.zero.stage": max(1, p.zero.stage), "pretrain.zero.offload": "optimizer"}
    if p.zero.offload != "all":
        yield {"pretrain.zero.stage": 3, "pretrain.zero.offload": "all"}


def _changed(load: Workload, changes: Mapping[str, Any]) -> Workload:
    p = load.pretrain
    top = {key.removeprefix("pretrain."): value for key, value in changes.items() if key.startswith("pretrain.") and key.count(".") == 1}
    zero = {key.rpartition(".")[2]: value for key, value in changes.items() if key.startswith("pretrain.zero.")}
    return replace(load, pretrain=p.model_copy(update={**top, "zero": p.zero.model_copy(update=zero)}))


def _largest_micro_batch(load: Workload, room: int, most: int) -> int:
    """The largest divisor of the batch, up to `most`, that fits into `room`; 0 where none does. More samples never take less, but where
    they are all of a worker's share: then it keeps no sums of gradients."""
    divisors = [n for n in range(1, most + 1) if load.pretrain.batch % n == 0]
    whole = [n for n in divisors if n * load.workers >= load.pretrain.batch]
    return _largest(load, room, whole) or _largest(load, room, divisors[: len(divisors) - len(whole)])


def _largest(load: Workload, room: int, divisors: Sequence[int]) -> int:
    low, high = 0, len(divisors)
    while low < high:
        middle = (low + high) // 2
        if _changed(load, {"pretrain.micro_batch": divisors[middle]}).memory.peak <= room:
            low = middle + 1
        else:
            high = middle
    return divisors[low - 1] if low else 0


def as_typed(changes: Changes | None) -> str:
    """`pretrain.micro_batch=16`; several with spaces between."""
    if changes is None:
        return f"none up to {_MOST_WORKERS:,} workers"
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items())


def biggest(memory: Memory) -> str:
    """The largest item at the fullest moment, in words."""
    name = max((item for item in memory.at_peak if item != "runtime"), key=lambda item: memory.at_peak[item])
    return f"{name} ({format_bytes(memory.at_peak[name])} of {format_bytes(memory.peak)})"


def check_fits(plan: Plan) -> None:
    """Raises ConfigError where the plan's peak is more than its device has, if that is known and not only assumed."""
    if plan.fits is False and not plan.device.is_assumed:
        raise ConfigError(
            f"pretrain: needs {format_bytes(plan.peak)} of memory a worker, most of it {biggest(plan.memory)}, and its device "
            f"({plan.device.name}) has {format_bytes(plan.device.memory)} for each; the smallest change that fits: "
            f"{as_typed(smallest_change(plan.load, plan.device.memory))}"
        )


def explain_out_of_memory(plan: Plan, device_bytes: int) -> str:
    """One sentence for a worker that ran out of memory on a device of `device_bytes`."""
    fits = plan.peak <= device_bytes
    room = round(_LESS * plan.memory.peak) if fits else device_bytes
    planned = f"it was planned to need {format_bytes(plan.peak)}" + (", which should fit: others may use the device too" if fits else "")
    return (
        f"pretrain: out of memory on a device with {format_bytes(device_bytes)}; {planned}; the biggest item is {biggest(plan.memory)}; "
        f"the smallest change that fits{' in a fifth less' if fits else ''}: {as_typed(smallest_change(plan.load, room))}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's error of a GPU, Python's own, and the RuntimeError of torch's CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def has_auto(p: Pretrain | None) -> bool:
    return p is not None and AUTO in (p.micro_batch, p.zero.stage)


def settle(config: Config, facts: Facts, workers: int, kept: int | None = None, device: Device | None = None) -> Config:
    """`config` with numbers where it says `auto`: the smallest stage at which some micro-batch fits, and there the largest that does.
    `kept`: the micro-batch of the run that goes on, which stays, for what is computed depends on it (where it does not divide the batch,
    this is another batch than the run's, which `claim_run` refuses). `device`: what it is to fit into; by default what the config says.

    Raises:
        ConfigError: the device's memory is not known; nothing fits.
    """
    p = config.pretrain
    if p is None or not has_auto(p):
        return config
    device = device or find_device(config.cluster, workers)
    kept = kept if kept and p.batch % kept == 0 else None
    key = "pretrain.micro_batch" if p.micro_batch == AUTO else "pretrain.zero.stage"
    if (p.zero.stage == AUTO or not kept) and (device.is_assumed or not device.memory):
        raise ConfigError(f"{key}: 'auto' needs to know the device's memory; say cluster.device, such as h100, or give a number")
    given = kept if p.micro_batch == AUTO and kept else p.micro_batch
    least = 1 if p.zero.offload != "none" else 0
    stages = range(least, 4) if p.zero.stage == AUTO else [p.zero.stage]
    room = round(_ROOM * device.memory)
    for stage in stages:
        load = _changed(Workload(p, facts, workers, device.is_cpu), {"pretrain.zero.stage": stage})
        if given != AUTO:
            fitting = given if stage == p.zero.stage or _changed(load, {"pretrain.micro_batch": given}).memory.peak <= room else 0
        else:
            fitting = _largest_micro_batch(load, room, -(-p.batch // workers))
        if fitting:
            values = config.model_dump(mode="json", by_alias=True)
            values["pretrain"]["micro_batch"] = fitting
            values["pretrain"]["zero"]["stage"] = stage
            return Config.model_validate(values)
    least_load = _changed(Workload(p, facts, workers, device.is_cpu), {
        "pretrain.zero.stage": max(stages), "pretrain.micro_batch": 1 if given == AUTO else given,
    })  # fmt: skip
    raise ConfigError(
        f"{key}: 'auto' finds nothing that fits into {format_bytes(device.memory)} ({device.name}); the smallest change that does: "
        f"{as_typed(smallest_change(least_load, room))}"
    )
