"""Training in processes of its own, for tests: a config, jobs that vary it, and what they recorded."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint import read_history
from pipeline.core.storage import Storage

STEPS = 6
SEED = 20_260_101  # people use dates
# What metrics begin with that differ from run to run by nature, or with the number of ranks.
SPEED = ("train/images_per_s", "train/tflops_per_s", "train/data_wait_fraction", "time/", "slowest/", "communication/", "memory/")


class Workshop:
    """A dataset, a config, and a way to train it in processes of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.beats: list[int | None] = []  # of each job trained last: how often validation showed a sign of life
        config = {
            "name": "run", "seed": SEED, "storage": str(root / "runs"), "cluster": "local", "data": str(root / "data"),
            "pretrain": {
                "model": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4, "pool": "gap", "dropout": 0.1},
                "objective": {"name": "classify", "smoothing": 0.1},
                "image": {"pixels": 8},
                "batch": 20, "micro_batch": 4,  # five pieces: with two or three ranks there are fillers
                "duration": f"{STEPS} steps", "log": "1 step", "validate": {"every": "3 steps"}, "save": {"every": "3 steps", "keep": 5},
                "optimizer": {"lr": 5e-3, "weight_decay": 0.1, "clip": 1.0}, "schedule": {"name": "cosine", "warmup": "2 steps"},
                "precision": "fp32",
            },
        }  # fmt: skip
        (root / "config.yaml").write_text(yaml.safe_dump(config))

    def change(self, **values: Any) -> None:
        """Other values of the section `pretrain`, for all jobs; None takes one away."""
        path = self.root / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["pretrain"] = {key: value for key, value in (config["pretrain"] | values).items() if value is not None}
        path.write_text(yaml.safe_dump(config))

    def job(self, name: str, *overrides: str) -> dict[str, Any]:
        return {"config": str(self.root / "config.yaml"), "overrides": [f"name={name}", *overrides]}

    def train(self, world_size: int, jobs: list[dict[str, Any]], script: Path | None = None) -> list[list[str] | None]:
        """The error of each job, or None; `script` stands in for drive.py."""
        (self.root / "jobs.json").write_text(json.dumps(jobs))
        self.fork(
            world_size, [str(script or Path(__file__).with_name("drive.py")), str(self.root / "jobs.json"), str(self.root / "results.json")]
        )
        results = json.loads((self.root / "results.json").read_text())
        self.beats = [r.get("beats") for r in results]
        return [r["error"] for r in results]

    def start(self, world_size: int, arguments: list[str], seconds: int = 300) -> str:
        """By the command that people would use; what it says."""
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--master-port", str(_port()), "--nproc-per-node", str(world_size)]
        command = [*torchrun, *arguments] if world_size > 1 else [sys.executable, *arguments]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stderr

    def fork(self, world_size: int, arguments: list[str], seconds: int = 300) -> None:
        """A script of the tests, by ranks that need not import what others have."""
        said = self.root / "said"
        said.unlink(missing_ok=True)
        env = self._environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port())}
        codes = _Nursery.open().ask({"arguments": arguments, "size": world_size, "env": env, "said": str(said)}, seconds)
        assert not any(codes.values()), f"{codes}\n{said.read_text(errors='replace')[-5000:]}"

    def _environment(self) -> dict[str, str]:
        return _environment() | {"TORCH_EXTENSIONS_DIR": str(self.root / "extensions")}

    def directory(self, name: str) -> Storage:
        return Storage(str(self.root / "runs" / name))

    def rows(self, name: str) -> list[dict[str, float]]:
        """The history without what differs from run to run by nature."""
        return [{k: v for k, v in row.items() if not k.startswith(SPEED)} for row in read_history(self.directory(name))]


class _Nursery:
    """The process of `nursery.py`, one for all tests of this one."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("nursery.py"))]
        self.process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    @staticmethod
    @cache
    def open() -> _Nursery:
        return _Nursery()

    def ask(self, group: dict[str, Any], seconds: int) -> dict[str, int]:
        """Exit codes, by rank; it ends with this process, which holds its input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{json.dumps(group)}\n")
            self.process.stdin.flush()
            is_answered = bool(select.select([self.process.stdout], [], [], seconds)[0])
            assert is_answered, f"no answer within {seconds} s: {group['said']} may tell more"
            line = self.process.stdout.readline()
            assert line, "nursery.py has ended; what it said stands above"
            return json.loads(line)
        except BaseException:  # such as a test's own time limit: the next test must not get the answer to this one
            _Nursery.open.cache_clear()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise


def _environment() -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # a fork has but the one that forked
    return {**known, **threads, "PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": ""}


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def close(one: list[dict[str, float]], two: list[dict[str, float]], tolerance: float) -> bool:
    """`tolerance` is absolute up to 1, and relative beyond."""
    return [set(r) for r in one] == [set(r) for r in two] and all(
        abs(a[k] - b[k]) <= tolerance * max(1.0, abs(b[k])) for a, b in zip(one, two, strict=True) for k in a
    )
