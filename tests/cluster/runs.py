"""A pre-training that faults are injected into: its config, the command that runs it, and what it leaves behind."""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.checkpoint import Checkpoints, Commit, read_history
from pipeline.checkpoint.commit import STATE
from pipeline.core.storage import Storage
from tests.integration.services import ROOT

RANK = "RayTrainWorker"  # in the command line of a rank
BATCH, EVERY = 24, 10  # samples; steps between saves
KEYS = {"AWS_ACCESS_KEY_ID": "tessera", "AWS_SECRET_ACCESS_KEY": "tessera", "AWS_DEFAULT_REGION": "us-east-1"}
_SPEED = ("train/images_per_s", "train/tflops_per_s", "train/data_wait_fraction", "time/", "slowest/", "communication/", "memory/")
_TAIL = 1 << 16  # bytes of a spool that are sure to hold a few steps

Row = dict[str, float]


def make_config(name: str, data: str, storage: Mapping[str, Any], tracking: str, cluster: Any, steps: int) -> dict[str, Any]:
    """A tiny ViT in fp32, whose learning rate does not depend on how long it is trained, and whose loss falls all the while."""
    return {
        "name": name, "seed": 20_260_101, "storage": dict(storage), "tracking": {"uri": tracking}, "cluster": cluster, "data": data,
        "pretrain": {
            "model": {"name": "vit", "width": 64, "depth": 4, "heads": 4, "patch": 4, "pool": "gap", "dropout": 0.1},
            "objective": {"name": "classify", "smoothing": 0.1}, "image": {"pixels": 16}, "batch": BATCH, "micro_batch": 4,
            "duration": f"{steps} steps", "optimizer": {"lr": 1e-4, "weight_decay": 0.1, "clip": 1.0},
            "schedule": {"name": "constant", "warmup": "10 steps"}, "precision": "fp32", "zero": {"stage": 1},
            "save": {"every": f"{EVERY} steps"}, "log": "1 step",
        },
    }  # fmt: skip


class Moment(NamedTuple):
    """When a fault is injected: seconds since 1970, the newest step that was recorded, and where the log ended."""

    at: float
    step: int
    log: int


class Job:
    """A command that trains, started here. `spools` are patterns of the files in which it records its steps before anything else is done
    with them."""

    def __init__(self, command: Sequence[str], log: Path, spools: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.log, self._spools, self._step = log, spools, 0
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **KEYS, **(env or {})}
            )

    def text(self, since: Moment | None = None) -> str:
        return self.log.read_bytes()[since.log if since else 0 :].decode(errors="replace")

    def step(self) -> int:
        """The newest step that it recorded."""
        newest = max(
            (found for pattern in self._spools for file in glob.glob(pattern) if (found := _newest_step(Path(file)))), default=None
        )
        self._step = newest[1] if newest else self._step
        return self._step

    def moment(self) -> Moment:
        return Moment(time.time(), self.step(), self.log.stat().st_size)

    def at_step(self, step: int, seconds: float = 240) -> Moment:
        """Wait until `step` is recorded."""
        self.until(lambda: self.step() >= step, f"step {step}", seconds)
        return self.moment()

    def until_says(self, text: str, since: Moment | None = None, seconds: float = 240) -> Moment:
        self.until(lambda: text in self.text(since), f"{text!r} in its log", seconds)
        return self.moment()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.returncode} before {what}:\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s:\n{self.text()[-4000:]}"
            time.sleep(0.05)

    def ends_with(self, code: int, seconds: float = 400) -> None:
        """Wait for the end, and check the exit code."""
        try:
            ended = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on after {seconds:g} s:\n{self.text()[-4000:]}") from None
        assert ended == code, f"it ended with {ended}:\n{self.text()[-4000:]}"

    def tree(self) -> list[psutil.Process]:
        """Its process and all below it, Ray's among them where that runs here too."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def signal_all(self, number: signal.Signals) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, where they run here."""
        return [p for p in self.tree() if RANK in " ".join(p.cmdline())]

    def kill(self) -> None:
        """kill -9 of the whole tree, as a machine dies."""
        if self.process.poll() is not None:
            return
        tree = self.tree()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(tree, timeout=20)


@contextmanager
def running(job: Job) -> Iterator[Job]:
    """`job`, of which nothing is left when the block ends."""
    try:
        yield job
    finally:
        job.kill()


@dataclass(frozen=True)
class Run:
    """What is left of a run, wherever it trained."""

    directory: Storage
    tracking: str
    name: str

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory)

    def history(self) -> list[Row]:
        """Without what differs from run to run by nature."""
        return [{k: v for k, v in row.items() if not k.startswith(_SPEED)} for row in read_history(self.directory)]

    def loader(self, commit: Commit | None = None) -> dict[str, Any]:
        """The loader's state in a checkpoint, by default the newest."""
        commit = commit or self.checkpoints.commits()[-1]
        return json.loads(self.checkpoints.fetch(commit, STATE))["loader"]

    def records(self, metric: str = "train/loss") -> list[tuple[float, int]]:
        """(seconds since 1970, step) of all that MLflow knows of a metric, steps that were done again included, in the order of time."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking)
        experiment = client.get_experiment_by_name("tessera")
        [run] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{self.name}/pretrain'")
        return sorted((m.timestamp / 1000, m.step) for m in client.get_metric_history(run.info.run_id, metric))


def resumed_at(log: str) -> list[int]:
    return [int(step.replace(",", "")) for step in re.findall(r"resuming at step ([\d,]+)", log)]


def _newest_step(spool: Path) -> tuple[float, int] | None:
    """(time, step) of the newest step in a file of records."""
    with suppress(OSError), spool.open("rb") as file:
        file.seek(max(0, spool.stat().st_size - _TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "train/loss" in record.get("values", {}):
                    return record["time"], record["step"]
    return None
