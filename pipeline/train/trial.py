"""A few real steps of a config's model on batches without meaning: what they take here, for `--plan --calibrate` and its bench.

    python -m pipeline.train.trial CONFIG.json CLASSES [ROUNDS STEPS]      # alone, or one process a rank under torchrun

prints one JSON line a rank: a `Trial`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.config import Config, parse_config
from pipeline.config.pretrain import Pretrain
from pipeline.core.command import run_rank
from pipeline.core.world import World
from pipeline.models import Model, build
from pipeline.objectives import Facts, Objective, build_objective
from pipeline.objectives.joint import JointObjective
from pipeline.stream.batches import MicroBatch
from pipeline.stream.palette import Palette
from pipeline.train.inputs import Prepared, open_inputs, options_of, planned_facts
from pipeline.train.library import join_group
from pipeline.train.optim import build_optimizer
from pipeline.train.worker import use_cores
from pipeline.train.zero import Engine

_LOOPBACK = Path("/proc/net/dev")


@dataclass(frozen=True)
class Trial:
    """Of one rank. Bytes are above those that the imports take; `peaks` are the most in each part of the work, seconds medians of all
    steps but the first. `first_pass_seconds`: of a micro-batch's pass without a graph, where a joint loss has one. `sent`: bytes that the
    loopback carried in a step, of all ranks together."""

    micro_batch_seconds: float
    first_pass_seconds: float
    update_seconds: float
    peak_bytes: int
    peaks: dict[str, int]
    resident: dict[str, int]
    sent: float
    parameters: int
    device: str


class Memory:
    """What this process has of the device's memory: of the GPU's, or of the host's where there is none."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.resident: dict[str, int] = {}
        self._gpu = torch.cuda.is_available()
        self._base = self._now()

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Keep the most memory that there is in this block, and what is left after it."""
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back (proc(5))
        yield
        if self._gpu:
            torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() if self._gpu else _status("VmHWM")
        self.peaks[name] = max(self.peaks.get(name, 0), most - self._base)
        self.resident[name] = self._now() - self._base

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self._gpu else _status("VmRSS")


def _status(key: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _sent() -> int:
    """Bytes sent over the loopback of this network namespace, headers among them."""
    if not _LOOPBACK.exists():
        return 0
    line = next(line for line in _LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def try_steps(config: Config, classes: int, world: World, rounds: int = 1, steps: int = 3) -> Trial:
    """`steps` optimiser steps of `rounds` micro-batches each, by the real engine. All ranks together."""
    p = config.pretrain
    assert p is not None, "only pre-training is tried"
    join_group(world)
    world.barrier()
    memory = Memory()
    facts = planned_facts(p, classes)
    with memory.during("model"):
        model: Model = build(p.model.name, options_of(p, classes), seed=config.seed).to(world.device)
        parameters = model.parameter_count
    with memory.during("engine"):
        engine = Engine(model, build_optimizer(model, p.optimizer), p, rounds, world)
    palette = Palette(torch.rand(facts.colors, 3) * 2 - 1) if facts.colors else None
    inputs = open_inputs(config, Prepared(palette, None, facts.context), [str(n) for n in range(classes)], engine.dtype, world.device)
    objective = build_objective(p.objective.name, p.objective.arguments, inputs)
    batch = meaningless(p, facts).to(world.device)
    backs: list[float] = []
    updates: list[float] = []
    sent: list[float] = []
    for _ in range(steps):
        world.barrier()
        before = _sent()
        micro, update = _step(engine, objective, engine.module, batch, rounds, memory)
        world.barrier()
        sent.append(_sent() - before)
        backs.append(micro)
        updates.append(update)
    passes = [_first_pass(engine, objective, batch) for _ in range(steps)]
    later = slice(1 if steps > 1 else 0, None)
    return Trial(
        micro_batch_seconds=_median(backs[later]),
        first_pass_seconds=_median(passes[later]),
        update_seconds=_median(updates[later]),
        peak_bytes=max(memory.peaks.values()),
        peaks=memory.peaks,
        resident=memory.resident,
        sent=_median(sent[later]),
        parameters=parameters,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )


def _first_pass(engine: Engine, objective: Objective, batch: MicroBatch) -> float:
    """Seconds of the pass that a joint loss makes before each micro-batch's own where there are several (`accumulate.py`)."""
    if not isinstance(objective, JointObjective):
        return 0.0
    began = time.perf_counter()
    with torch.no_grad():
        objective.embed(engine.module, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _step(engine: Engine, objective: Objective, module: nn.Module, batch: MicroBatch, rounds: int, memory: Memory) -> tuple[float, float]:
    """Seconds a micro-batch, and of the update."""
    seconds, update = 0.0, 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        with memory.during("forward"):
            loss, _ = objective.loss(module, batch)
        with memory.during("backward"):
            engine.backward(loss)
        seconds += time.perf_counter() - began
        began = time.perf_counter()
        with memory.during("update"):
            del loss
            engine.step()
        update = time.perf_counter() - began
    return seconds / rounds, update


def meaningless(p: Pretrain, facts: Facts) -> MicroBatch:
    """A micro-batch of the shapes that the config says, of noise."""
    n, random = p.micro_batch, torch.Generator().manual_seed(0)
    tokens = torch.randint(1, facts.vocabulary, (n, facts.context), generator=random) if facts.vocabulary else None
    return MicroBatch(
        index=0,
        images=torch.randint(0, 256, (n, p.image.pixels, p.image.pixels, 3), dtype=torch.uint8, generator=random),
        labels=torch.randint(0, max(1, facts.classes), (n,), generator=random),
        keys=[str(i) for i in range(n)],
        texts=[""] * n,
        weight=1.0,
        tokens=tokens,
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    file, classes, *rest = sys.argv[1:]
    rounds, steps = (int(n) for n in rest) if rest else (1, 3)
    world = World.from_environment()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    trial = try_steps(parse_config(json.loads(Path(file).read_text())), int(classes), world, rounds, steps)
    print(json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    run_rank(main)
