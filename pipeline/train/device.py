"""What a rank's device has to give, and how much of it is used: its peak rate, its memory, its power."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from pipeline.config.pretrain import Pretrain
from pipeline.core.progress import say
from pipeline.core.world import World
from pipeline.plan.devices import DEVICES
from pipeline.train.speed import Row

_STATUS = Path("/proc/self/status")


class Device:
    """`peak` is the most floating-point operations a second that it could do at the run's precision; None where nobody says it."""

    def __init__(self, config: Pretrain, world: World) -> None:
        self._is_gpu = world.device.type == "cuda"
        self.peak = config.peak * 1e12 if config.peak else self._known_peak(config.precision)
        self._tells_power = self._is_gpu and self._try_power(world)

    def _known_peak(self, precision: str) -> float | None:
        name = torch.cuda.get_device_name().lower() if self._is_gpu else ""
        return next((device.peak(precision) for word, device in DEVICES.items() if word in name), None)

    def _try_power(self, world: World) -> bool:
        try:
            torch.cuda.power_draw()
        except Exception as e:  # noqa: BLE001  NVML's own errors, of a package that may not be there
            if world.is_main:
                say(f"pretrain     power is not recorded, this machine does not tell it ({type(e).__name__}: {e})")
            return False
        return True

    def read(self, world: World) -> Row:
        """Bytes of memory at most since the process began, of the rank that took most; watts of all devices together, over about the
        last second. All ranks call this together, and get the same."""
        own = [float(host_peak()), float(torch.cuda.max_memory_allocated()) if self._is_gpu else 0.0, self._watts()]
        ranks = world.table(own)
        row = {"memory/host_peak": max(host for host, _, _ in ranks)}
        if self._is_gpu:
            row["memory/device_peak"] = max(device for _, device, _ in ranks)
        watts = sum(watt for _, _, watt in ranks)
        return {**row, "power/watts": watts} if watts else row

    def _watts(self) -> float:
        return torch.cuda.power_draw() / 1000 if self._tells_power else 0.0


def host_peak() -> int:
    """Bytes of memory that this process had at most. Linux's `ru_maxrss` would be that of the process that started it, where that had
    more."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
