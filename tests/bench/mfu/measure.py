"""What one process measures of one model: its variants one after the other, the micro-batch sweep, fp8's loss, the peers in pairs.

Each row is a dictionary; where something could not be done it has a `failure`, in the words of what was raised.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.models import training_flops
from tests.bench.mfu import peers
from tests.bench.mfu.device import PEAK, Readings, synchronize, time_calls
from tests.bench.mfu.recipes import BASE, THEIRS, Recipe, recipe
from tests.bench.mfu.step import DeepSpeedStep, Graphed, Step
from tests.bench.mfu.subjects import SUBJECTS
from tests.bench.pairs import interval

Row = dict[str, Any]
SWEEP, FP8_LOSS = "sweep", "fp8-loss"
# The loss in 8 bits against that in 16: the mean of their differences may be this fraction of the mean loss.
LOSS_STEPS, LOSS_TOLERANCE = 40, 0.02
WARM_UP = 3  # calls, after the first, which compiles


@dataclass(frozen=True)
class Settings:
    model: str
    device: torch.device
    small: bool = False
    seconds: float = 4.0  # that each figure is timed for
    pairs: int = 8
    backend: str = "inductor"
    batch: int | None = None
    kernels: bool = False  # profile, and name the kernels that took most
    rate: float = 0.0  # the matrix rate measured here, operations a second


class Bench:
    """`best` is the recipe that gave most images a second so far, in 16 bits or more."""

    def __init__(self, settings: Settings, best: str = BASE) -> None:
        self.settings, self.subject, self.best = settings, SUBJECTS[settings.model], best
        self._best_rate = 0.0
        device = settings.device
        model = self.subject.make(torch.device("meta"), settings.small)
        self.options, self.flops = model.options, training_flops(model)
        self.batch = settings.batch or (16 if settings.small else self.subject.batch)
        self.base = Recipe(backend=settings.backend)
        self.device = device

    def rows(self, variant: str) -> Iterator[Row]:
        """What the variant gives: a row, or several of a sweep."""
        peer = variant.partition("+")[0]
        if variant.split("@")[0] == SWEEP:
            yield from self._sweep(variant)
        elif variant == FP8_LOSS:
            yield self._row(variant, self.batch, lambda: self._compare_losses())
        elif peer.partition("@")[0] in peers.PEERS:
            yield self._row(variant, self.batch, lambda: self._race(variant))
        else:
            found, batch = recipe(variant, self.base)
            yield self._row(variant, batch or self.batch, lambda: self._time(variant, found, batch or self.batch))

    def _row(self, variant: str, batch: int, measure: Callable[[], Row]) -> Row:
        row: Row = {"model": self.subject.model, "variant": variant, "batch": batch}
        began = time.perf_counter()
        try:
            row |= measure()
        except Exception as e:  # noqa: BLE001 - a variant that does not work is a result of this bench
            row["failure"] = failure(e)
        self._clear()
        return row | {"whole_s": time.perf_counter() - began}

    def _clear(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        gc.collect()
        synchronize(self.device)  # an error that ends all work on this device comes out here
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _step(self, how: Recipe, batch: int, batches: int = 1) -> Callable[[], torch.Tensor]:
        model = self.subject.make(self.device, self.settings.small)
        losses = [self.subject.loss(batch, self.options, self.device, seed) for seed in range(batches)]
        if how.engine == "deepspeed":
            return DeepSpeedStep(self.subject.model, model, losses, how, batch)
        step = Step(model, losses, how, self.device)
        return Graphed(step) if how.graph else step

    def _warm(self, step: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """(seconds of the first call, which compiles; its loss)."""
        synchronize(self.device)
        began = time.perf_counter()
        loss = float(step())
        first = time.perf_counter() - began
        for _ in range(WARM_UP):
            step()
        synchronize(self.device)
        return first, loss

    def _time(self, variant: str, how: Recipe, batch: int) -> Row:
        step = self._step(how, batch)
        first, before = self._warm(step)
        with Readings(self.device) as readings:
            times = time_calls(step, self.device, self.settings.seconds)
        after = float(step())
        if not (math.isfinite(before) and math.isfinite(after)):
            raise ArithmeticError(f"the loss went from {before} to {after}")
        row = self._figures(batch * how.rounds, times) | readings.medians() | {"first_s": first, "loss": [before, after]}
        if self.settings.kernels:
            row["kernels"] = top_kernels(step, self.device)
        if row["images_per_s"] > self._best_rate and not how.fp8 and how.engine == "plain":
            self.best, self._best_rate = variant.partition("@")[0], row["images_per_s"]
        return row

    def _figures(self, images: int, times: list[float]) -> Row:
        """Recomputation is not counted; causal attention counts as computed in full."""
        seconds = statistics.median(times)
        rate = images / seconds
        row = {
            "images_per_s": rate, "step_s": seconds, "least_s": min(times), "most_s": max(times), "steps": len(times),
            "tflops": rate * self.flops / 1e12, "mfu": rate * self.flops / PEAK,
        }  # fmt: skip
        if self.settings.rate:
            row["of_measured"] = rate * self.flops / self.settings.rate
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row

    def _sweep(self, variant: str) -> Iterator[Row]:
        """Micro-batches of half, once, twice .. the usual size, until one does not fit; then one between."""
        how, _ = recipe(self.best, self.base)
        batch = max(1, self.batch // 2)
        while True:
            size = batch
            row = self._row(f"{self.best}@{size}", size, lambda size=size: self._time(f"{self.best}@{size}", how, size))  # type: ignore[misc]
            yield row
            if "failure" in row or (self.settings.small and size >= 4 * self.batch):
                break
            batch *= 2
        between = batch * 3 // 4
        if "failure" in row and between > batch // 2:
            yield self._row(f"{self.best}@{between}", between, lambda: self._time(f"{self.best}@{between}", how, between))

    def _compare_losses(self) -> Row:
        """Some steps in 8 and in 16 bits from the same weights, over the same few batches, which both learn by heart."""
        curves = []
        for changes in ({"fp8": True}, {}):
            how = replace(self.base, lr=1e-3 if self.settings.small else 3e-4, **changes)
            step = self._step(how, self.batch if self.settings.small else max(1, self.batch // 4), batches=4)
            curves.append([float(step()) for _ in range(LOSS_STEPS)])
            del step
            self._clear()
        eight, sixteen = curves
        apart = statistics.mean(abs(a - b) for a, b in zip(eight, sixteen, strict=True)) / statistics.mean(sixteen)
        return {
            "loss": eight, "loss_bf16": sixteen, "apart": apart,
            "note": f"loss {eight[0]:.3f} to {eight[-1]:.3f}, in bf16 to {sixteen[-1]:.3f}: {apart:.2%} apart over "
            f"{LOSS_STEPS} steps (at most {LOSS_TOLERANCE:.0%}: {'holds' if apart <= LOSS_TOLERANCE else 'does not hold'})",
        }  # fmt: skip

    def _race(self, variant: str) -> Row:
        """Ours as it was best and the peer's, in turn, on the same batches; smaller ones where both do not fit. The peer's is compiled as
        a whole under autocast with a fused AdamW unless the variant says otherwise."""
        peer, _, rest = variant.partition("@")[0].partition("+")
        if peer not in self.subject.peers:
            raise LookupError(f"{peer} has no {self.subject.model}")
        if not peers.installed(peer):
            raise ModuleNotFoundError(f"{peer} is not installed")
        theirs = replace(THEIRS, backend=self.settings.backend)
        theirs = recipe(rest, theirs)[0] if rest else theirs
        ours = recipe(self.best, self.base)[0]
        batch = recipe(f"{BASE}@{asked}", self.base)[1] or self.batch if (asked := variant.partition("@")[2]) else self.batch
        while True:
            try:
                return {"batch": batch, **self._pairs(peer, ours, theirs, batch)}
            except torch.cuda.OutOfMemoryError:
                if batch == 1:
                    raise
            batch //= 2
            self._clear()

    def _pairs(self, peer: str, ours: Recipe, theirs: Recipe, batch: int) -> Row:
        model = peers.make(peer, self.subject.peers[peer], self.options, self.device)
        both = [
            self._step(ours, batch),
            Step(model, [self.subject.loss(batch, self.options, self.device, how=peer)], theirs, self.device),
        ]
        for step in both:
            self._warm(step)
        found: list[list[float]] = [[], []]
        for _ in range(self.settings.pairs):
            for step, times in zip(both, found, strict=True):
                times.append(statistics.median(time_calls(step, self.device, self.settings.seconds / 8, least=2)))
        low, middle, high = interval([b / a for a, b in zip(*found, strict=True)])
        other = batch * theirs.rounds / statistics.median(found[1])
        return {
            **self._figures(batch * ours.rounds, found[0]), "theirs_images_per_s": other, "ratio": [low, middle, high],
            "note": f"{peer}: {other:,.1f} images/s; ours ({self.best}) {low:.2f}, **{middle:.2f}**, {high:.2f} times, {len(found[0])} pairs",
        }  # fmt: skip


def failure(e: Exception) -> str:
    """The first line of what was raised, and which kind it is."""
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0] if lines else ''}"[:300]


def top_kernels(step: Callable[[], Any], device: torch.device, most: int = 15) -> list[tuple[str, float, float]]:
    """(name, milliseconds a step, fraction of all) of the kernels that take most of two steps; of operators on a CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(2):
            step()
        synchronize(device)
    events = profiler.key_averages()
    if is_cuda:  # operators would count what their kernels took a second time
        took = [(e.key, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    else:
        took = [(e.key, e.self_cpu_time_total) for e in events]
    whole = sum(time for _, time in took) or 1.0
    largest = sorted(took, key=lambda each: -each[1])[:most]
    return [(name[:120], time / 2000, time / whole) for name, time in largest]
