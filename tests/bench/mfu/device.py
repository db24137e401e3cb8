"""What the device is, does and says of itself: times by its own clock, the rate of its matrix units, clock and power."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

PEAK = 989e12  # H100's and H200's dense bf16 rate, operations a second, by their data sheet; fp8's is twice that
# (M, K, N) of the products whose best rate is "the matrix rate": squares, and the shapes of ViT-H/14's MLP at 256 images.
SHAPES = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384), (65792, 1280, 5120), (65792, 5120, 1280)]
SMALL_SHAPES = [(64, 64, 64), (128, 64, 256)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(act: Callable[[], Any], device: torch.device, seconds: float, least: int = 5, most: int = 200) -> list[float]:
    """Seconds that each call of `act` takes, for about `seconds`, after one that tells how many fit. On a GPU between events in its own
    stream, with no wait between the calls, so that it idles only where the host is too slow for it."""
    synchronize(device)
    began = time.perf_counter()
    act()
    synchronize(device)
    count = min(most, max(least, int(seconds / (time.perf_counter() - began))))
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            act()
            mark.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    times = []
    for _ in range(count):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return times


def matrix_rates(device: torch.device, shapes: Sequence[tuple[int, int, int]], seconds: float = 0.4) -> dict[str, float]:
    """Floating-point operations a second of bf16 products of random numbers (zeros run faster), by shape "M x K x N"."""
    rates = {}
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(k, n, device=device).bfloat16()
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        torch.mm(a, b, out=out)
        times = time_calls(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)  # type: ignore[misc]
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / statistics.median(times)
    return rates


class Readings:
    """What the GPU reads of itself while this is open: medians of clock (MHz), power (W) and temperature (C), several times a second.
    Nothing where there is no GPU, or it cannot be read."""

    def __init__(self, device: torch.device) -> None:
        self._read = reader() if device.type == "cuda" else None
        self._found: list[Mapping[str, float]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def _collect(self) -> None:
        while self._read is not None:
            found = self._read()
            if found:
                self._found.append(found)
            if self._closing.wait(0.25):
                return

    def __enter__(self) -> Readings:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def medians(self) -> dict[str, float]:
        names = self._found[0] if self._found else []
        return {name: statistics.median(each[name] for each in self._found) for name in names}


def reader() -> Callable[[], Mapping[str, float]]:
    """Reads the first GPU by NVML's Python binding, or by nvidia-smi where that is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # noqa: BLE001 - it is not there, or cannot be used: both leave nvidia-smi
        return _ask_nvidia_smi

    def read() -> Mapping[str, float]:
        try:
            return {
                "clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "temperature_c": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            }
        except pynvml.NVMLError:
            return {}

    return read


def name() -> str:
    """Of the first GPU, asked for without taking any of its memory."""
    return query("name") or "a GPU"


def query(what: str) -> str:
    """What nvidia-smi says of the first GPU; nothing where it cannot."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _ask_nvidia_smi() -> Mapping[str, float]:
    try:
        values = [float(each) for each in query("clocks.sm,power.draw,temperature.gpu").split(",")]
    except ValueError:
        return {}
    return dict(zip(("clock_mhz", "power_w", "temperature_c"), values, strict=True))
