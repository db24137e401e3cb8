"""Run a real service as a process of its own, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class RayHead:
    """A running cluster of one machine; `address` is its dashboard's."""

    address: str
    token: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextmanager
def service(
    command: list[str], log: Path, is_up: Callable[[], bool], env: dict[str, str] | None = None, seconds: float = 90
) -> Iterator[int]:
    """Run `command` in a session of its own until the block ends, once `is_up` says so; gives the session's id."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True, cwd=log.parent
        )
    try:
        deadline = time.monotonic() + seconds
        while not is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.3)
        yield process.pid
    finally:
        process.terminate()  # it ends its own children; where they are told too, Ray waits in vain for those gone before it
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    """Whether an HTTP server answers there, in whatever way."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def start_head(agent: int | None = None) -> Iterator[RayHead]:
    """`ray start --head` with token authentication. Its agents have ports of their own too: they do not look for another where theirs is
    taken, and without the agent at `agent` no job can be submitted."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    gcs, dashboard, client, http, grpc, environments, metrics = free_ports(7)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent or http}", f"--dashboard-agent-grpc-port={grpc}",
        f"--runtime-env-agent-port={environments}", f"--metrics-export-port={metrics}", f"--temp-dir={folder / 'r'}", "--disable-usage-stats",
    ]  # fmt: skip
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    address = f"http://127.0.0.1:{dashboard}"
    try:
        with service(command, folder / "log", lambda: answers(f"{address}/api/version"), env):
            yield RayHead(address, TOKEN)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
