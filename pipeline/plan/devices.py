"""The figures of a device that time, memory and money are planned with: a short table, and what a config says instead."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from pipeline.config.schema import Cluster
from pipeline.core.errors import ConfigError, nearest

_GB, _TB, _GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True)
class Device:
    """Of one worker's device. `flops`, `flops_fp32`: peak dense operations a second in 16 bits, and in fp32 without TF32. `memory`:
    bytes a process can have, 0 where it is not known. `bandwidth` of its memory; `link` inside a node and `network` between nodes, sent by
    one device, and `host`, to the host's memory, all in bytes a second. `price`: an hour. `efficiency`: of the peak, in the matrix
    multiplications and everything else of forward and backward pass."""

    name: str
    flops: float
    flops_fp32: float
    memory: int
    bandwidth: float
    link: float
    network: float
    host: float
    per_node: int
    price: float
    efficiency: float
    is_assumed: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def peak(self, precision: str) -> float:
        return self.flops_fp32 if precision == "fp32" else self.flops


# Peaks, memory and links: NVIDIA's data sheets of the SXM forms (A100 80 GB, H100, H200; HGX B200), dense, NVLink one way; memory as
# CUDA gives it out. Network: one 200 Gb/s (A100) or 400 Gb/s adapter a GPU, as in the DGX of each. Prices: about what clouds asked an hour
# on demand in 2025, within a factor of two; give your own as cluster.price. Efficiencies: large CLIPs reach 39% on an A100 (NeMo), language
# models 64% on an A100 and 46% on an H100 (llm-foundry), torchtitan 33-39% on an H100: what good software reaches, not what ours was
# measured to; --calibrate measures.
# A CPU worker: two cores at 3 GHz with one 512-bit multiplier-adder each, gloo over a loopback; half of it is reached (ViT-S/16, fp32).
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("a100", 312e12, 19.5e12, 79 * _GIB, 2.039 * _TB, 300 * _GB, 25 * _GB, 25 * _GB, 8, 1.80, 0.45),
        Device("h100", 989e12, 67e12, 79 * _GIB, 3.35 * _TB, 450 * _GB, 50 * _GB, 50 * _GB, 8, 3.00, 0.40),
        Device("h200", 989e12, 67e12, 139 * _GIB, 4.8 * _TB, 450 * _GB, 50 * _GB, 50 * _GB, 8, 3.50, 0.40),
        Device("b200", 2250e12, 75e12, 178 * _GIB, 7.7 * _TB, 900 * _GB, 50 * _GB, 50 * _GB, 8, 5.00, 0.35),
        Device("cpu", 192e9, 192e9, 0, 20 * _GB, 2 * _GB, 1.25 * _GB, 20 * _GB, 1, 0.10, 0.5),
    )
}


def find_device(cluster: Cluster, workers: int) -> Device:
    """The device of `cluster.device`; where it says none, this machine's for a local run, and else an assumed H100.

    Raises:
        ConfigError: an unknown name without figures.
    """
    said = cluster.device
    if said is None:
        found = this_machine(workers) if cluster.is_local or cluster.gpus == 0 else None
        device = found or replace(DEVICES["h100"], is_assumed=True)
        if cluster.gpus == 0 and not cluster.is_local:
            device = replace(DEVICES["cpu"], is_assumed=True)
    else:
        figures = {key: value for key, value in said.model_dump(exclude={"name"}).items() if value is not None}
        if said.name in DEVICES:
            base = DEVICES[said.name]
        elif {"flops", "memory"} <= set(figures):
            base = replace(DEVICES["h100"], name=said.name)  # what is not said of links and the like
        else:
            raise ConfigError(
                f"cluster.device.name: {said.name!r} is not in the table{nearest(said.name, DEVICES)} (there: {', '.join(DEVICES)}); "
                "of another device give at least flops and memory"
            )
        device = replace(base, **figures)
        if device.is_cpu and not device.memory:
            device = replace(device, memory=host_memory() // workers if cluster.is_local else 0)
    return replace(device, price=cluster.price) if cluster.price else device


def this_machine(workers: int) -> Device:
    """This machine's, with the memory that it has: a GPU's, or a share of the host's."""
    if not torch.cuda.is_available():
        return replace(DEVICES["cpu"], memory=host_memory() // workers)
    name, memory = torch.cuda.get_device_name().lower(), torch.cuda.mem_get_info()[1]
    known = next((device for key, device in DEVICES.items() if key in name), None)
    return replace(known, memory=memory) if known else replace(DEVICES["a100"], name=name, memory=memory, is_assumed=True)


def host_memory() -> int:
    """Bytes that this machine has, or the control group that we are in may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
