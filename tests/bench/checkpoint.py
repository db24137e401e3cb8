"""What a checkpoint costs: the stall of a save, a resume, an upload, each against a bound measured beside it in turn.

    python -m tests.bench.checkpoint [stall] [resume] [upload] [--pairs 5] [--model vit_b16] [--folder DIR]

stall: seconds that training stands still for a save, against the bytes of the rank's state over the rate at which this machine copies, and
beside one training step and DeepSpeed's own save_checkpoint of the same state. resume: find, verify and load the newest checkpoint,
against reading the same files and hashing them once. upload: hash, put and check, against s3fs' put of the same bytes, to an S3 server
(moto) on this machine. Printed: the median of the ratios and the least and the most of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from pipeline.checkpoint import Checkpoints, Commit, ModelCard
from pipeline.checkpoint.fragments import BLOCK, Fragment
from pipeline.checkpoint.memory import HostMemory
from pipeline.checkpoint.retain import Retention
from pipeline.checkpoint.save import Saver, new_attempt
from pipeline.config.pretrain import Optimizer, Pretrain
from pipeline.core.storage import Storage
from pipeline.core.upload import Uploader
from pipeline.core.world import World
from pipeline.models import create
from pipeline.train.library import join_group
from pipeline.train.optim import build_optimizer
from pipeline.train.saving import files, restore
from pipeline.train.worker import use_cores
from pipeline.train.zero import Engine
from tests.bench.pairs import machine
from tests.integration.services import BIN, answers, free_ports, service

VIEW = "view"
_PART = 4  # what part of the fragments is uploaded: this S3 server takes long to put gigabytes together


class Subject:
    """A model under training, alone, at stage 0 in fp32: parameters and two moments, 12 bytes a parameter."""

    def __init__(self, name: str, batch: int) -> None:
        use_cores(1)
        self.world = World()
        join_group(self.world)
        self.model, self.batch = create(name, seed=0), batch
        config = Pretrain.model_validate(
            {"model": name, "batch": batch, "micro_batch": batch, "duration": "10 steps", "precision": "fp32", "optimizer": {"lr": 1e-4}}
        )
        self.engine = Engine(self.model, build_optimizer(self.model, Optimizer(lr=1e-4)), config, 1, self.world)
        self.card = ModelCard(name, self.model.options.model_dump(mode="json"), "classify", [], (0.5,) * 3, (0.5,) * 3, "", "bench", 0)

    def step(self) -> float:
        """Seconds of one optimiser step."""
        began = time.perf_counter()
        loss = self.engine.module(torch.randn(self.batch, 3, 224, 224)).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        return time.perf_counter() - began

    @property
    def fragments(self) -> list[Fragment]:
        return self.engine.fragments()

    def files(self) -> dict[str, bytes]:
        return files(self.engine, self.card, {"consumed": 0, "view": VIEW}, [])


class Saves:
    """A saver of the subject, below `folder`."""

    def __init__(self, subject: Subject, run: Storage) -> None:
        self.subject, self.checkpoints = subject, Checkpoints(run)
        self.lease = self.checkpoints.acquire()
        self.saver = Saver(self.checkpoints, self.lease, subject.fragments, Retention(1), 60.0, subject.world)
        self.count = 0

    def save(self) -> tuple[float, float]:
        """(seconds that the caller stood still, seconds until it was committed)."""
        self.count += 1
        commit = Commit(self.count, 0, self.lease.generation, new_attempt(self.lease), 1, 0, VIEW, "bench", [])
        began = time.perf_counter()
        self.saver.begin(self.subject.fragments, commit, self.subject.files())
        stalled = time.perf_counter() - began
        outcome = self.saver.take(timeout=600)
        assert outcome is not None, "it took more than ten minutes"
        if outcome.error is not None:
            raise outcome.error
        return stalled, outcome.seconds

    def uploader_memory(self) -> int:
        """The most bytes that the uploading process had for itself, beside the memory that it shares with this one."""
        uploader = self.saver._uploader
        assert uploader is not None, "it has saved"
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{uploader.pid}/status").read_text().splitlines())
        return max(0, int(rows["VmHWM"].split()[0]) * 1024 - self.saver.memory.bytes)


def copy_rate(memory: HostMemory, source: torch.Tensor) -> float:
    """Bytes a second of one plain copy by torch, of as many bytes into the same kind of memory: none of what a save does itself."""
    room = memory._rooms[0].view(source.dtype)
    began = time.perf_counter()
    room.copy_(source)
    return memory.bytes / (time.perf_counter() - began)


def race_stall(subject: Subject, folder: Path, pairs: int) -> None:
    steps = [subject.step() for _ in range(3)][1:]
    before = psutil.Process().memory_info().rss
    saves = Saves(subject, Storage(str(folder / "run")))
    saves.save()
    taken = psutil.Process().memory_info().rss - before + saves.uploader_memory()
    source = torch.ones(saves.saver.memory.bytes // 4)  # pages of zeros would all be one
    plain = HostMemory([Fragment("weight", "all", 0, source)])
    copy_rate(plain, source)
    stalls, ratios, committed, theirs = [], [], [], []
    for _ in range(pairs):
        bound = saves.saver.memory.bytes / copy_rate(plain, source)
        stall, whole = saves.save()
        began = time.perf_counter()
        subject.engine.engine.save_checkpoint(str(folder / "deepspeed"), tag="bench", save_latest=False)
        theirs.append(time.perf_counter() - began)
        shutil.rmtree(folder / "deepspeed")
        stalls.append(stall), ratios.append(stall / bound), committed.append(whole)
        steps.append(subject.step())
    size = saves.saver.memory.bytes / 2**30
    saves.saver.close()
    print(f"| stall of a save of {size:.2f} GiB / the copy alone, {pairs} pairs | {_told(stalls)} s | {_told(ratios)} | at most 1.2 |")
    print(
        f"| the same / one step of {subject.batch} samples | {_told(steps)} s | {_told([a / statistics.median(steps) for a in stalls])} | under 1 |"
    )
    print(
        f"| the same / DeepSpeed's save_checkpoint to the same disk | {_told(theirs)} s | {_told([a / b for a, b in zip(stalls, theirs, strict=True)])} | |"
    )
    ratio = taken / saves.saver.memory.bytes
    print(f"| host memory for saves, the uploading process included: {taken / 2**30:.2f} GiB / the rank's state | | **{ratio:.3g}** | |")
    print(f"| until it is committed, on this disk | {_told(committed)} s | | |", flush=True)


def race_resume(subject: Subject, folder: Path, pairs: int) -> None:
    run = Storage(str(folder / "run"))
    saves = Saves(subject, run)
    saves.save()
    saves.saver.close()
    commit = saves.checkpoints.commits()[-1]
    paths = [folder / "run" / "checkpoints" / commit.prefix / r.name for r in commit.files]

    def bound() -> None:
        for path in paths:
            with path.open("rb") as f:
                hashlib.file_digest(f, "sha256")

    def resume() -> None:
        assert restore(subject.engine, Checkpoints(run), VIEW, subject.world) is not None

    ratios = _race(bound, resume, pairs)
    print(f"| read and hash the files once / resume: find, verify, load, {pairs} pairs | | {_told(ratios)} | at least 0.8 |", flush=True)


def race_upload(subject: Subject, folder: Path, pairs: int) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "tessera", "AWS_SECRET_ACCESS_KEY": "tessera", "AWS_DEFAULT_REGION": "us-east-1"}
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    some = subject.fragments[: len(subject.fragments) // _PART]
    memory = HostMemory(some)
    memory.fill(some)
    command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]  # a process of its own: it is to hold up neither
    with tempfile.NamedTemporaryFile() as local, service(command, folder / "log", lambda: answers(url)):
        store = Storage("s3://bench/run", url)
        store.fs.mkdir("bench")
        uploader = Uploader(store, memory.fd, memory.bytes, 60.0)
        local.write(os.pread(memory.fd, memory.bytes, 0))
        local.flush()

        def bound() -> None:
            store.fs.put_file(local.name, f"{store.path}/plain")

        ratios = _race(bound, lambda: uploader.upload("ours", BLOCK), pairs)
        uploader.close()
    print(
        f"| s3fs' put of {memory.bytes / 2**30:.2f} GiB / hash, put and check, {pairs} pairs | | {_told(ratios)} | at least 0.8 |",
        flush=True,
    )


def _race(bound: Callable[[], Any], ours: Callable[[], Any], pairs: int) -> list[float]:
    """Seconds of the bound over ours, pair by pair, after one of each that does not count."""
    seconds = []
    for _ in range(pairs + 1):
        took = []
        for act in (bound, ours):
            began = time.perf_counter()
            act()
            took.append(time.perf_counter() - began)
        seconds.append(took)
    return [a / b for a, b in seconds[1:]]


def _told(values: Sequence[float]) -> str:
    return f"{min(values):.3g}, **{statistics.median(values):.3g}**, {max(values):.3g}"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(["stall", "resume", "upload"]))
@click.option("--pairs", default=5, show_default=True)
@click.option("--model", default="vit_b16", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="where to save; by default in TMPDIR")
def main(names: tuple[str, ...], pairs: int, model: str, batch: int, folder: Path | None) -> None:
    print(f"{machine()}, torch {torch.__version__}\n\n| what | seconds | ratio | goal |\n|---|---|---|---|", flush=True)
    subject = Subject(model, batch)
    for name in names or ("stall", "resume", "upload"):
        with tempfile.TemporaryDirectory(prefix="tessera-bench-", dir=folder) as scratch:
            if name == "stall":
                race_stall(subject, Path(scratch), pairs)
            elif name == "resume":
                race_resume(subject, Path(scratch), pairs)
            else:
                race_upload(subject, Path(scratch), pairs)


if __name__ == "__main__":
    main()
