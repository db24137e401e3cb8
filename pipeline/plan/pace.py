"""How long a step takes, and what the run costs: work over the device's figures, or over what was measured here (`--calibrate`).

    step = max(compute, gathers that overlap it) + exposed communication + update, and no less than the input takes

Compute counts what the device does, so recomputation and the second forward pass of a loss of all pairs; MFU counts what the model needs.
Validation, and what saving stands still for (under a step), are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.devices import Device
from pipeline.plan.traffic import Traffic
from pipeline.plan.workload import Workload

# Decoded images a second of one thread: 2,036 of two, JPEGs of 304 x 256 pixels (tests/bench/RESULTS.md); larger files are slower.
DECODED = 1_000
_OVERLAPPED = 0.9  # of stage 3's gathers and scatters, at most; the first and the last layer have nothing beside them


@dataclass(frozen=True)
class Measured:
    """Seconds of a micro-batch forward and back, and of an update, as `--calibrate` found them here; the ratio of the memory's peak to the
    plan's; and seconds of the pass without a graph that a joint loss of several micro-batches makes before (`Workload.has_first_pass`)."""

    micro_batch: float
    update: float
    memory: float = 1.0
    first_pass: float = 0.0


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, its parts, and what follows; `mfu` of the device's peak."""

    step: float
    compute: float
    communication: float
    update: float
    input: float
    mfu: float
    samples_per_second: float


def work_of(load: Workload) -> float:
    """What a device does of a sample: forward and back, and forward once more to recompute, and for a joint loss's first pass."""
    again = (1 if load.recompute else 0) + (1 if load.has_first_pass else 0)
    return load.training_flops + (again * load.forward_flops if again else 0)


def pace_of(load: Workload, device: Device, traffic: Traffic, measured: Measured | None = None) -> Pace:
    p = load.pretrain
    peak = device.peak(p.precision)
    if measured:
        compute = load.rounds * (measured.micro_batch + (measured.first_pass if load.has_first_pass else 0))
    else:
        compute = load.rounds * p.micro_batch * work_of(load) / (peak * device.efficiency)
    update = measured.update if measured else _update(load, device)
    wire = device.link if load.workers <= device.per_node else min(device.link, device.network)
    sending = (traffic.total - traffic.near) / wire + traffic.near / device.link
    hidden = min(_OVERLAPPED * sending, compute) if load.stage == 3 else 0.0
    decode = load.rounds * p.micro_batch / (DECODED * max(1, p.loader.workers))
    step = max(compute + (sending - hidden) + update, decode)
    rate = p.batch / step
    return Pace(
        step=step,
        compute=compute,
        communication=sending - hidden,
        update=update,
        input=decode,
        mfu=rate * load.training_flops / (load.workers * peak),
        samples_per_second=rate,
    )


def _update(load: Workload, device: Device) -> float:
    """Reading and writing the optimiser's state once, with the gradient; offloaded, in the host's memory, with the way there and back."""
    own = load.tensors.parameters / (load.workers if load.stage else 1)
    moved = own * 28  # m, v and weights read and written, the gradient read
    if load.pretrain.zero.offload == "none" or device.is_cpu:
        return moved / device.bandwidth
    return moved / 100e9 + own * (4 + load.width) / device.host  # a host's memory, of which its GPUs share, is about that fast
