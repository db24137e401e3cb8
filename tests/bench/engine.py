"""Our full training step against the bare PyTorch loop of the same model.

    python -m tests.bench.engine [--precision fp32 --precision bf16] [--ranks 1 --ranks 2] [--feed shards --feed memory] [--pairs 20]

Ours is the worker as it runs (`train/worker.py`: DeepSpeed, guards, signals, history, progress, a row to MLflow in SQLite after every step,
tar shards). The bare loop is forward, cross-entropy, backward, clipping and a fused AdamW, of the same architecture, in DDP where there
are two ranks. Both live in the same processes and take turns: one step of ours, one of the bare loop on the batch that ours just had, and
so on; so whatever else the machine does meets both. The arithmetic is equal: fp32; or weights, activations and gradients in bf16 over fp32
masters and moments, as DeepSpeed's bf16 has it (no autocast). Torch's threads share the cores among the ranks.

Everything that ours does counts as ours: the loader decodes in line (`loader.workers: 0`), where threads would decode beside the bare
loop's turn, and a turn of ours ends only when MLflow's thread has sent the row. The bare loop is handed the batch decoded and normalised.

    shards    ours reads and decodes its batches. The goal is measured by this one: at least 0.97 of the bare loop's speed, the 95% lower
              bound within 0.02 of that. On a machine with a GPU decoding would run beside it; here it takes the cores' time, so it counts
    memory    ours is handed batches decoded before, as the bare loop is: what the engine alone costs

Printed: seconds a step (medians), the ratio of the medians with its 95% interval (bootstrap over the pairs), where each step's time
goes (the parts are medians of their own, so that they need not add up), and what all threads of rank 0 took of the cores, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.checkpoint import claim_run
from pipeline.config import load_config
from pipeline.core.command import run_rank
from pipeline.core.tracking import Tracker
from pipeline.core.world import World
from pipeline.stream import Stream
from pipeline.stream.batches import MicroBatch
from pipeline.stream.decode import normalize
from pipeline.train import worker
from pipeline.train.keeper import Signals
from pipeline.train.recorder import Recorder
from tests.bench.mfu import optimizers
from tests.bench.pairs import machine, ratio_of_medians
from tests.bench.streaming import make_shards
from tests.integration.services import BIN, free_ports

GOAL, WITHIN = 0.97, 0.02
LR, CLIP = 1e-4, 1.0
WARM_UP = 3  # turns of each that do not count: memory is taken, MLflow imported
READY = 4  # batches that are held in memory


class Times:
    """Seconds by part, from `begin_turn` to `end_turn`; and those of all of this process's threads on a core."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.cores: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)

    def timed(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, whose seconds count as `part`."""

        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return act(*arguments, **named)
            finally:
                self._now[part] += time.perf_counter() - began

        return run

    def begin_turn(self) -> None:
        self._began, self._on_core = time.perf_counter(), time.process_time()

    def end_turn(self) -> None:
        seconds = time.perf_counter() - self._began
        self.steps.append(seconds)
        self.cores.append(time.process_time() - self._on_core)
        for part, took in self._now.items():
            self.parts[part].append(took)
        self.parts["the rest"].append(seconds - sum(self._now.values()))
        self._now.clear()

    def medians(self) -> dict[str, float]:
        return {part: statistics.median(took[WARM_UP:]) for part, took in self.parts.items()}


class Bare:
    """The loop that a person would write; `losses` are this rank's."""

    def __init__(self, model: nn.Module, precision: str, world: World) -> None:
        self.dtype, self.times = torch.bfloat16 if precision == "bf16" else torch.float32, Times()
        self.optimizer = optimizers.make(model, "fused", self.dtype, LR, compiled=None, capturable=False)
        self.parameters = list(model.parameters())
        self.losses: list[float] = []
        self.model = DistributedDataParallel(model.train()) if world.size > 1 else model.train()

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        timed = self.times.timed
        self.times.begin_turn()
        loss = timed("forward", lambda: F.cross_entropy(self.model(images).float(), labels))()
        timed("backward", loss.backward)()
        timed("step", self._update)()
        self.times.end_turn()
        self.losses.append(float(loss.detach()))

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()


class Noting(Stream):
    """Keeps hold of the micro-batch that it gave last."""

    last: MicroBatch
    times: Times

    def __iter__(self) -> Iterator[MicroBatch]:
        batches = self.times.timed("loader", super().__iter__().__next__)
        while True:
            self.last = batches()
            yield self.last


class Ready(Stream):
    """Decodes a few micro-batches once, and gives these in turn."""

    last: MicroBatch

    def __iter__(self) -> Iterator[MicroBatch]:
        decoded = [batch for batch, _ in zip(super().__iter__(), range(READY), strict=False)]
        index = 0
        while True:
            self.last = replace(decoded[index % READY], index=index)
            index += 1
            self.consumed = index * self.global_batch
            yield self.last


class TakingTurns(Recorder):
    """The hooks of our loop; after each of its steps the bare loop takes one."""

    feed = "shards"
    latest: TakingTurns

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        TakingTurns.latest = self
        p = self.run.config.pretrain
        assert p is not None, "a run that trains"
        self.image, self.times = p.image, Times()
        model = self.card.make()
        model.load_state_dict(self.engine.engine.module.state_dict())
        self.bare = Bare(model, p.precision, self.world)
        self.stream.__class__ = Ready if self.feed == "memory" else Noting
        self.stream.times = self.times  # type: ignore[attr-defined]
        # Each of these has the one before it inside.
        inner, timed = self.engine, self.times.timed
        inner.engine.forward = timed("forward", inner.engine.forward)
        inner.backward = timed("backward", inner.backward)  # type: ignore[method-assign]
        inner.step = timed("step", inner.step)  # type: ignore[method-assign]
        self.record = timed("record", self.record)  # type: ignore[method-assign]
        self.times.begin_turn()

    def after_step(self, step: int, waited: float, loss: torch.Tensor) -> int:
        goes_on_from = self.times.timed("hooks", super().after_step)(step, waited, loss)
        if self.tracker:
            self.times.timed("MLflow's thread", _wait_until_sent)(self.tracker)
        self.times.end_turn()
        batch: MicroBatch = self.stream.last  # type: ignore[attr-defined]
        images = normalize(batch.images, self.image.mean, self.image.std, self.bare.dtype)
        self.world.barrier()
        self.bare.step(images, batch.labels)
        self.world.barrier()
        self.times.begin_turn()
        return int(goes_on_from)


def _wait_until_sent(tracker: Tracker) -> None:
    sent, records = tracker.directory / "sent", tracker.directory / "records.jsonl"
    while not sent.exists() or int(sent.read_text() or 0) < records.stat().st_size:
        time.sleep(0.0005)


def run_child(config: str, feed: str, threads: int | None) -> None:
    """One rank: trains, and on rank 0 prints what it timed."""
    world = World.from_environment()
    worker.use_cores(world.size)
    if threads:
        torch.set_num_threads(threads)
    TakingTurns.feed = feed
    worker.Recorder = TakingTurns  # type: ignore[misc]
    run = claim_run(load_config(config, []))
    trackers = [run.tracker(), worker.stage_tracker(run)] if world.is_main else []
    worker.run_worker(run, world, trackers[1] if trackers else None, Signals())
    for tracker in trackers:
        tracker.close()
    hooks = TakingTurns.latest
    losses = [total / world.size for total in world.sum(hooks.bare.losses)]
    if world.is_main:
        print(json.dumps({
            "ours": hooks.times.steps[WARM_UP:], "bare": hooks.bare.times.steps[WARM_UP:],
            "ours_on_cores": hooks.times.cores[WARM_UP:], "bare_on_cores": hooks.bare.times.cores[WARM_UP:],
            "parts": hooks.times.medians(), "bare_parts": hooks.bare.times.medians(),
            "loss": [json.loads(row)["train/loss"] for row in hooks.history], "bare_loss": losses,
        }), flush=True)  # fmt: skip


def time_turns(
    folder: Path,
    model: dict[str, Any],
    pixels: int,
    micro: int,
    precision: str,
    ranks: int,
    feed: str,
    pairs: int,
    threads: int | None = None,
) -> dict[str, Any]:
    """What `run_child` tells of one comparison; the shards are in folder/data."""
    name = f"{precision}-{ranks}-{feed}"
    config = {
        "name": name, "storage": str(folder / "runs"), "cluster": "local", "data": str(folder / "data"),
        "pretrain": {
            "model": model, "image": {"pixels": pixels}, "batch": micro * ranks, "micro_batch": micro, "duration": f"{WARM_UP + pairs} steps",
            "precision": precision, "optimizer": {"lr": LR, "weight_decay": optimizers.DECAY, "clip": CLIP}, "schedule": {"name": "constant"}, "log": "1 step",
            "save": {"every": "1000000 steps"}, "loader": {"workers": 0},
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    torchrun = [str(BIN / "torchrun"), "--master-port", str(port), "--nproc-per-node", str(ranks), "-m"]
    command = [
        *(torchrun if ranks > 1 else [sys.executable, "-m"]),
        "tests.bench.engine",
        "--child",
        json.dumps([str(path), feed, threads]),
    ]
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**outside, "CUDA_VISIBLE_DEVICES": ""})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def told(parts: dict[str, float]) -> str:
    return ", ".join(f"{part} {seconds * 1000:,.1f}" for part, seconds in parts.items())


@click.command()
@click.option("--precision", "precisions", multiple=True, type=click.Choice(["fp32", "bf16"]), default=("fp32", "bf16"), show_default=True)
@click.option("--ranks", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True)
@click.option("--feed", "feeds", multiple=True, type=click.Choice(["shards", "memory"]), default=("shards", "memory"), show_default=True)
@click.option("--pairs", default=20, show_default=True)
@click.option("--batch", default=8, show_default=True, help="images a step of one rank")
@click.option("--model", default="vit_s16", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="of torch, each rank; by default they share the cores (fewer on a busy machine)")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="every step's seconds are added here, as lines of JSON")
@click.option("--child", hidden=True)
def main(
    precisions: tuple[str, ...], ranks: tuple[int, ...], feeds: tuple[str, ...], pairs: int, batch: int, model: str, threads: int | None,
    out: Path | None,
    child: str | None,
) -> None:  # fmt: skip
    if child:
        return run_child(*json.loads(child))
    print(
        f"{machine()}, torch {torch.__version__}, CPU\n\n| {model}, {batch} images a rank | ours, s a step | bare, s a step "
        "| bare / ours: low, ratio, high | goal |\n|---|---|---|---|---|",
        flush=True,
    )
    notes = []
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        make_shards(Path(folder) / "data", each=200)
        for precision in precisions:
            for size in ranks:
                for feed in feeds:
                    found = time_turns(Path(folder), {"name": model}, 224, batch, precision, size, feed, pairs, threads)
                    low, ratio, high = ratio_of_medians(found["ours"], found["bare"])
                    name = f"{precision}, {size} rank{'s' * (size > 1)}, {feed}"
                    verdict = "holds" if ratio >= GOAL and low >= GOAL - WITHIN else "does not hold"
                    print(
                        f"| {name} / {'DDP' if size > 1 else 'a bare loop'}, {pairs} pairs | {statistics.median(found['ours']):.3f} "
                        f"| {statistics.median(found['bare']):.3f} | {low:.3f}, **{ratio:.3f}**, {high:.3f} "
                        f"| {f'{GOAL}: {verdict}' if feed == 'shards' else ''} |",
                        flush=True,
                    )
                    cores = [statistics.median(found[f"{side}_on_cores"]) for side in ("ours", "bare")]
                    notes.append(
                        f"- {name}, ms: {told(found['parts'])}. Bare: {told(found['bare_parts'])}. "
                        f"On the cores, rank 0: {cores[0]:.3f} s and {cores[1]:.3f} s, ratio {cores[1] / cores[0]:.3f}."
                    )
                    if out is not None:
                        with out.open("a") as f:
                            f.write(json.dumps({"model": model, "precision": precision, "ranks": size, "feed": feed, **found}) + "\n")
    print("\n" + "\n".join(notes))
    return None


if __name__ == "__main__":
    run_rank(main)
