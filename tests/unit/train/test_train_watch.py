"""Ranks that hang and lag: real processes under torchrun, one of them stopped; and the judgement on reports."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from workshop import Workshop

from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train import hub as hubs
from pipeline.train import watch
from pipeline.train.hub import INPUT, SAVING, STARTING, STEP, VALIDATING, Hub, Report, Verdict, connect, judge
from pipeline.train.watch import Lag
from pipeline.train.watcher import SIZE, Signs, Watcher

HANG = 6  # seconds
LIMIT = 60  # for this machine, which may have other work


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("watch")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    return Workshop(root)


@contextmanager
def training(shop: Workshop, name: str, *overrides: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Two ranks that train for long, by the command that people would use, and what they say."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**known, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--master-port", str(port), "--nproc-per-node", "2",
        "-m", "pipeline.train.worker", str(shop.root / "config.yaml"), f"name={name}", "pretrain.duration=100000 steps",
        "pretrain.log=10 steps", "pretrain.save.every=20 steps", "pretrain.validate=null", f"pretrain.guard.hang={HANG} seconds",
        f"tracking.uri=sqlite:///{shop.root}/mlflow.db", *overrides,
    ]  # fmt: skip
    said = shop.root / f"{name}.log"
    with said.open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield process, said
        finally:
            for each in (
                [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
            ):
                each.kill()
            process.wait()


def ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """In their order."""
    found = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "pipeline.train.worker" in p.cmdline() and "RANK" in p.environ()
    ]
    own = [p for p in found if p.ppid() == process.pid]
    return sorted(own, key=lambda p: int(p.environ()["RANK"]))


def await_line(said: Path, pattern: str, seconds: float) -> re.Match[str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := re.search(pattern, said.read_text(errors="replace")):
            return found
        time.sleep(0.1)
    raise AssertionError(f"nobody said {pattern!r}: {said.read_text(errors='replace')[-3000:]}")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_found_and_named(shop: Workshop, rank: int) -> None:
    with training(shop, f"stopped-{rank}") as (process, said):
        await_line(said, r"pretrain .* loss", 180)
        stopped = ranks(process)[rank]
        stopped.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        await_line(
            said,
            rf"warning: pretrain: rank {rank} \(.*, process {stopped.pid}\) is stopped and has not run for \d s, and all others",
            LIMIT,
        )
        await_line(said, rf"error: pretrain: rank {rank} .* the run ends; the same command goes on from the last checkpoint", LIMIT)
        process.wait(LIMIT)
        assert time.monotonic() - began < LIMIT
    assert re.search(rf"exitcode\s+: {'-9' if rank == 0 else '33'}|exitcode: 33", said.read_text()), said.read_text()[-2000:]
    stacks = {path.name: path.read_text() for path in (shop.root / "runs" / f"stopped-{rank}" / "stacks").iterdir()}
    texts = [next(text for name, text in stacks.items() if name.endswith(f"rank-0000{r}.txt")) for r in (0, 1)]
    assert "waits (rank" in texts[1 - rank] and "loop.py" in texts[1 - rank], "its own, by itself"
    assert "hangs (rank" in texts[rank] and "State:\tT (stopped)" in texts[rank]
    assert "loop.py" in texts[rank], "read from outside"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_is_stopped_while_it_starts_is_found(shop: Workshop) -> None:
    """As soon as it is watched, which is before it has a model."""
    with training(shop, "starting") as (process, said):
        deadline = time.monotonic() + 180
        watched: list[psutil.Process] = []
        while not watched and time.monotonic() < deadline:
            time.sleep(0.05)
            watched = [p for p in ranks(process)[1:] if any("pipeline.train.watcher" in child.cmdline() for child in p.children())]
        watched[0].send_signal(signal.SIGSTOP)
        await_line(said, rf"warning: pretrain: rank 1 \(.*, process {watched[0].pid}\) is stopped", LIMIT)
        process.wait(LIMIT)
    path = shop.root / "runs" / "starting" / "stacks" / "step-0-rank-00001.txt"
    assert "starting after step 0; hangs (rank 1" in path.read_text() and "train/loop.py" not in path.read_text(), path.read_text()


def report(rank: int, counter: int = 100, phase: int = STEP, idle: float = 1.0, mute: float = 0.0, state: str = "S") -> Report:
    return Report(rank, counter, 10, phase, idle, mute, state, 1000 + rank, f"host-{rank}")


@pytest.mark.parametrize(
    ("reports", "hung", "what"),
    [
        ([report(0), report(1)], [], ""),
        ([report(0, idle=95), report(1, idle=95, mute=95, state="T")], [1], "is stopped and has not run for 95 s"),
        ([report(0, idle=95), report(1, idle=95, mute=95, state="D")], [1], "is stuck in the kernel"),
        ([report(0, idle=95), report(1, idle=95, mute=80, state="T")], [], ""),
        ([report(0, idle=370), report(1, 99, idle=371)], [1], "has got no further for 371 s, in a training step"),
        ([report(0, idle=370), report(1, 99, idle=300)], [], ""),
        ([report(0, idle=1e4), report(1, 99, INPUT, idle=900)], [], ""),  # a store may be away for a while, and all wait for this one
        ([report(0, idle=1e4), report(1, 99, INPUT, idle=1000)], [1], "waiting for input"),
        ([report(0, idle=1e4), report(1, 99, VALIDATING, idle=1800)], [], ""),
        ([report(0, idle=1e6), report(1, 99, SAVING, idle=1e6)], [], ""),  # `save.patience` ends that
        ([report(r, 3, STARTING, idle=1790, mute=200) for r in range(2)], [], ""),  # compiles, and holds on to the interpreter
        ([report(r, 3, STARTING, idle=1810, mute=200) for r in range(2)], [0, 1], "has got no further for 1810 s, starting"),
        ([report(0, 4, STARTING, idle=1810), report(1, 3, STARTING, idle=1820)], [1], "starting"),  # in its first batch
        ([report(0, 4, STARTING, idle=1810), report(1, 3, STARTING, idle=1790)], [], ""),
        ([report(0, 3, STARTING), report(1, 3, STARTING, mute=91, state="T")], [1], "is stopped"),
        ([report(r, idle=361) for r in range(3)], [0, 1, 2], "in a training step"),
    ],
)  # fmt: skip
def test_who_hangs(reports: list[Report], hung: list[int], what: str) -> None:
    found, told = judge(reports, 90)
    assert [r.rank for r in found] == hung and what in told


def test_the_first_batch_is_not_given_less_time_than_others() -> None:
    for hang in (1, 90, 3600):
        late = [report(0), report(1, 99, INPUT, idle=hang + 899)]
        first = [report(0, 4, STARTING), report(1, 3, STARTING, idle=hang + 899)]
        assert judge(late, hang)[0] == judge(first, hang)[0] == []


def test_all_up_to_the_end_of_the_first_step_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as memory:
        memory.truncate(SIZE)
        monkeypatch.setattr(watch, "_signs", Signs(mmap.mmap(memory.fileno(), SIZE)))
        monkeypatch.setattr(watch, "_is_warm", False)
        seen = []
        for phase, step in ((INPUT, None), (STEP, None), (SAVING, 1), (INPUT, None)):
            watch.beat(phase, step)
            seen.append(watch._signs.read()[:3])  # type: ignore[union-attr]
        assert seen == [(1, 0, STARTING), (2, 0, STARTING), (3, 1, SAVING), (4, 1, INPUT)]


def test_the_hub_warns_and_then_ends(free_port: int) -> None:
    hub = Hub(3, 90, free_port, b"key")
    assert not hub.take(report(0)).ranks and not hub.take(report(1, mute=200, state="T")).ranks, "not before all have told"
    first = hub.take(report(2))
    assert (
        first.is_end
        and first.ranks == [1]
        and first.speaker == 0
        and first.text.startswith("error: pretrain: rank 1 (host-1, process 1001)")
    )
    other = Hub(2, 90, 0, b"key")
    other.take(report(0, mute=50, state="T"))
    warned = other.take(report(1))
    assert not warned.is_end and warned.ranks == [0] and warned.speaker == 1 and "stacks of all ranks are written" in warned.text
    other.take(report(0))
    assert not other.take(report(1)).ranks, "it goes on"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_watchers_reach_the_hub_by_either_protocol(free_port: int, host: str) -> None:
    try:
        socket.getaddrinfo(host, 0)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    hub = Hub(2, 90, free_port, b"key")
    line = connect((host, free_port), b"key")
    hub.take(report(0))
    line.send_bytes(json.dumps(asdict(report(1, mute=200, state="T"))).encode())
    assert Verdict(**json.loads(line.recv_bytes())).ranks == [1]
    with pytest.raises(OSError, match="is not our hub"):
        connect((host, free_port), b"another")


@pytest.mark.timeout(30)
def test_strangers_keep_nobody_waiting(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that connect and stay silent, go at once, or say what they like, as a port scanner does."""
    monkeypatch.setattr(hubs, "_SILENT", 1.0)
    hub = Hub(2, 90, free_port, b"key")
    strangers = [socket.create_connection(("127.0.0.1", free_port)) for _ in range(3)]
    strangers[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
    strangers[2].close()
    line = connect(("127.0.0.1", free_port), b"key")
    hub.take(report(0))
    line.send_bytes(json.dumps(asdict(report(1, mute=200, state="T"))).encode())
    assert Verdict(**json.loads(line.recv_bytes())).ranks == [1]
    began = time.monotonic()
    while strangers[0].recv(1 << 10):
        pass
    assert 0.2 < time.monotonic() - began < 10, "after a while it is let go"
    for each in (*strangers, line):
        each.close()


@pytest.mark.timeout(30)
def test_a_hub_that_says_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "_SILENT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="is not our hub"):
        connect(silent.getsockname(), b"key")


def test_ranks_that_report_nothing_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, whole = Hub(12, 90, 0, b"key"), Hub(1, 90, 0, b"key")
    hub.take(report(1))
    assert not hub.absent(), "they may come yet"
    monkeypatch.setattr(hubs, "_GATHERED", 0.0)
    assert "ranks 0, 2, 3, 4, 5, 6, 7, 8 .. reported nothing" in hub.absent()
    assert not hub.absent(), "once is enough"
    whole.take(report(0))
    assert not whole.absent()


@pytest.mark.timeout(60)
def test_a_watch_without_all_ranks_says_so(free_port: int) -> None:
    """By the process that runs beside rank 0, in the memory that both have."""
    code = "from pipeline.train import hub, watcher; hub._GATHERED = 1.0; watcher.main()"
    with tempfile.TemporaryFile() as memory:
        memory.truncate(SIZE)
        signs = Signs(mmap.mmap(memory.fileno(), SIZE))
        about = {
            "rank": 0, "size": 2, "pid": os.getpid(), "host": "here", "hang": 90, "signs": memory.fileno(),
            "address": ["127.0.0.1", free_port], "key": "00",
        }  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        beside = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[memory.fileno()], env=env)
        try:
            assert beside.stdin is not None
            beside.stdin.write(json.dumps(about).encode() + b"\n")
            beside.stdin.flush()
            deadline = time.monotonic() + 50
            while not signs.verdict()[1] and time.monotonic() < deadline:
                time.sleep(0.1)
            told = (
                f"warning: pretrain.guard.hang: rank 1 reported nothing to port {free_port} of rank 0 for 1 s: until all do, nobody watches"
            )
            assert signs.verdict() == (False, f"{told} for ranks that hang")
        finally:
            beside.kill()
            beside.wait()


LATE = """
import datetime, os, sys
from pipeline.core.errors import InfrastructureError
from pipeline.core.world import World
from pipeline.train.library import join_group
for rank in (0, 1):
    os.environ["RANK"] = str(rank)
    try:
        join_group(World(rank, 2, 0), datetime.timedelta(seconds=2))
    except InfrastructureError as e:
        print(int(e.exit_code), e)
"""


GROUP = """
import os
import torch
import torch.distributed as dist
from pipeline.core.world import JOINED, World
from pipeline.train.library import join_group
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=JOINED)
seconds = lambda: int(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
before = seconds()
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
join_group(World())
print("timeouts:", before, seconds())
"""


def test_ranks_wait_longer_for_each_other_once_they_have_joined() -> None:
    """Also those in a group that was there before, as Ray Train makes it."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", GROUP], env=env, capture_output=True, text=True, timeout=120)
    assert "timeouts: 600 1800" in done.stdout, done.stderr[-3000:]


def test_ranks_that_never_come_are_not_waited_for(free_port: int) -> None:
    """By rank 0, whose store the others would come to; and by rank 1, which finds none."""
    env = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LATE], env=env, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if "pretrain:" in line]
    assert len(said) == 2, done.stderr[-3000:]
    for rank, line in enumerate(said):
        assert line.startswith(f"33 pretrain: rank {rank} of 2 could not join the others at 127.0.0.1:{free_port} within 2 s (")


def test_time_for_which_all_stood_still_does_not_count() -> None:
    """Somebody stopped the whole job and had it go on: the ranks, and those that watch them."""
    with tempfile.TemporaryFile() as memory:
        memory.truncate(SIZE)
        signs = Signs(mmap.mmap(memory.fileno(), SIZE))
        signs.beat(STEP, 7)
        signs.live()
        watcher = Watcher({"rank": 3, "pid": os.getpid(), "signs": memory.fileno(), "host": "here"})
        first = watcher.report()
        assert (first.rank, first.counter, first.step, first.phase, first.idle, first.mute) == (3, 1, 7, STEP, 0, 0)
        watcher._at -= 600
        assert 1 < watcher.report().idle <= 2
        watcher._at -= 1
        assert watcher.report().idle > 2, "time goes on"
        signs.beat(INPUT)
        assert watcher.report().idle == 0
        signs.tell("warning: é", True)
        assert signs.verdict() == (True, "warning: é") and watcher.report().counter == 2


def test_a_rank_that_runs_is_not_mute_though_it_keeps_the_interpreter() -> None:
    """It uses its processor; one that is stopped does not."""
    with tempfile.TemporaryFile() as memory:
        memory.truncate(SIZE)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            watcher = Watcher({"rank": 0, "pid": busy.pid, "signs": memory.fileno(), "host": "here"})
            watcher.report()
            for _ in range(100):
                time.sleep(0.2)
                if watcher.report().mute == 0:
                    break
            else:
                raise AssertionError("it never ran")
            busy.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            watcher.report()
            time.sleep(1)
            assert (stopped := watcher.report()).mute > 0.9 and stopped.state == "T"
        finally:
            busy.kill()
            busy.wait()


def test_who_lags() -> None:
    said: list[Event] = []
    set_sink(said.append)
    try:
        lag = Lag(1.5, World(0, 4), lasts=0)
        assert lag.judge([1.0, 1.1, 0.9, 1.2]) == pytest.approx(1.2)
        for _ in range(2):
            assert lag.judge([1.0, 2.2, 1.0, 1.1]) == pytest.approx(2.2)
        assert not said
        lag.judge([1.0, 2.0, 1.0, 1.1])
        lag.judge([1.0, 2.0, 1.0, 1.1])
        assert len(said) == 1 and "rank 1 lags: for input and computing it takes 2.0 times as long" in said[0].text
        lag.judge([1.0, 1.0, 1.0, 1.1])
        for _ in range(3):
            lag.judge([1.0, 9.0, 1.0, 1.1])
        assert len(said) == 2, "again, after it had not"
        brief = Lag(1.5, World(0, 4))
        for _ in range(9):
            brief.judge([1.0, 9.0, 1.0, 1.1])
        assert len(said) == 2, "not for a minute"
        assert Lag(None, World(0, 4)).look([1.0] * 4) is None and Lag(1.5, World()).look([1.0]) is None
    finally:
        set_sink(None)
