"""A cluster to do harm to: three hosts with a Ray node each, and a fourth with an S3 server and an MLflow server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.storage import Storage
from tests.cluster.data import make_data
from tests.cluster.hosts import Host, Network, network
from tests.cluster.runs import KEYS, Job, Run, make_config
from tests.integration.services import BIN, answers

HEAD, OTHERS, STORES = "h1", ("h2", "h3"), "stores"
NAMES = (HEAD, *OTHERS)
DRIVER = "python -m pipeline"  # in the command line of the job's own process
MLFLOW = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a server without it starts seven processes that nobody asks for anything
_OBJECT_STORE = 80_000_000  # bytes, the least that Ray accepts is 75 MiB
# Ray finds a machine gone after four checks of 3 s, instead of five of 10.
_RAY = {
    "RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}  # fmt: skip


class Lab:
    """`folder` holds the hosts' disks and all logs."""

    def __init__(self, net: Network) -> None:
        self.net, self.folder = net, net.folder
        self.hosts, stores = {name: net.hosts[name] for name in NAMES}, net.hosts[STORES]
        self.endpoint, self.tracking = f"http://{stores.address}:5000", f"http://{stores.address}:5001"
        self.dashboard = f"http://{self.hosts[HEAD].address}:8265"
        self.gcs = f"{self.hosts[HEAD].address}:6379"
        self.jobs: list[Job] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._start(stores, [str(BIN / "moto_server"), "-H", stores.address, "-p", "5000"], "s3")
        self._start(stores, mlflow_command(stores.address, 5001, stores.home), "mlflow")
        for url in (self.endpoint, f"{self.tracking}/health"):
            self.wait_for(lambda url=url: answers(url), url)  # type: ignore[misc]
        Storage("s3://lab", self.endpoint).fs.mkdir("lab")
        make_data(Storage("s3://lab/data", self.endpoint))
        self.start()

    def _start(self, host: Host, command: Sequence[str], log: str, **more: str) -> None:
        self._started = [each for each in self._started if each.poll() is None]
        self._started.append(host.start(command, self.folder / f"{log}.log", {**self._environment(host), **more}))

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s:\n{self.logs()}"
            time.sleep(0.5)

    # Ray

    def start_node(self, name: str, **more: str) -> None:
        """`ray start` on a host, with `more` in its environment."""
        host = self.hosts[name]
        as_head = ["--head", "--port=6379", f"--dashboard-host={host.address}", "--dashboard-port=8265"]
        command = [
            str(BIN / "ray"), "start", "--block", *(as_head if name == HEAD else [f"--address={self.gcs}"]), f"--node-ip-address={host.address}",
            "--num-cpus=1", "--num-gpus=0", f"--object-store-memory={_OBJECT_STORE}", f"--temp-dir={host.home}/r", "--disable-usage-stats",
        ]  # fmt: skip
        self._start(host, command, name, **more)

    def _environment(self, host: Host) -> dict[str, str]:
        (host.folder / "tmp").mkdir(exist_ok=True)
        return {
            "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(host.home), "TMPDIR": f"{host.home}/tmp", "LANG": "C.UTF-8",
            "MPLCONFIGDIR": str(self.folder / "matplotlib"), **KEYS, **_RAY, **MLFLOW,
        }  # fmt: skip

    def nodes(self) -> dict[str, str]:
        """Ray's id of each host that it believes to be alive."""
        names = {host.address: name for name, host in self.hosts.items()}
        try:
            with urllib.request.urlopen(f"{self.dashboard}/api/v0/nodes", timeout=5) as reply:
                rows = json.load(reply)["data"]["result"]["result"]
        except (OSError, ValueError):
            return {}
        return {names[row["node_ip"]]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def wait_for_nodes(self, names: Sequence[str] = NAMES) -> None:
        self.wait_for(lambda: set(self.nodes()) == set(names), f"cluster of {', '.join(names)}")

    def start(self, names: Sequence[str] = NAMES) -> None:
        """A new cluster of these hosts; what ran on any is gone."""
        for host in self.hosts.values():
            host.mend()
            host.kill()
        self.start_node(HEAD)
        self.wait_for(lambda: answers(f"{self.dashboard}/api/version"), "head")
        for name in names:
            if name != HEAD:
                self.start_node(name)
        self.wait_for_nodes(names)

    def heal(self) -> None:
        """Give the next one a whole cluster with nothing running on it."""
        is_idle = all(job.process.poll() is not None for job in self.jobs)
        for job in self.jobs:
            job.kill()
        self.jobs = []
        for host in self.hosts.values():
            host.mend()
            host.signal(signal.SIGCONT)
        if not is_idle or HEAD not in self.nodes() or self.hosts[HEAD].processes(DRIVER):
            self.start()
            return
        for name in OTHERS:
            if name not in self.nodes() or not self.hosts[name].processes("raylet/raylet"):
                self.hosts[name].kill()
                self.start_node(name)
        self.wait_for_nodes()

    def drain(self, name: str, seconds: int) -> None:
        """Give a host notice that it will be taken back after so many seconds, as a provider of spot machines does."""
        subprocess.run(
            [
                str(BIN / "ray"), "drain-node", f"--address={self.gcs}", f"--node-id={self.nodes()[name]}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=taken back", f"--deadline-remaining-seconds={seconds}",
            ],
            env={**os.environ, "HOME": str(self.folder)}, capture_output=True, check=True,
        )  # fmt: skip

    def logs(self) -> str:
        """The end of each."""
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in sorted(self.folder.glob("*.log")))

    # Jobs

    def config(self, name: str, steps: int, endpoint: str | None = None) -> dict[str, Any]:
        storage = {"url": "s3://lab/runs", "endpoint": endpoint or self.endpoint}
        cluster = {"address": self.dashboard, "workers": 3, "min_workers": 1, "wait": "3 minutes", "env": ["XDG_STATE_HOME"]}
        return make_config(name, "s3://lab/data", storage, self.tracking, cluster, steps)

    def submit(self, values: Mapping[str, Any], *overrides: str) -> Job:
        """Submit from outside of the cluster, as a person does, and follow."""
        file = self.folder / f"{values['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False))
        log = self.folder / f"{values['name']}.{len(list(self.folder.glob('*.log')))}.log"
        # What a host keeps of a run is kept apart, so that it can be told whose steps are recorded there.
        env = {"HOME": str(self.folder), "XDG_STATE_HOME": f"{self.hosts[HEAD].home}/state/{values['name']}"}
        spools = [f"{host.folder}/state/{values['name']}/tessera/spool/*/records.jsonl" for host in self.hosts.values()]
        job = Job([str(BIN / "python"), "launch/submit.py", str(file), *overrides], log, spools, env)
        self.jobs.append(job)
        return job

    def run(self, name: str) -> Run:
        return Run(Storage(f"s3://lab/runs/{name}", self.endpoint), self.tracking, name)


@contextmanager
def open_lab() -> Iterator[Lab]:
    """A whole cluster, until the block ends."""
    os.environ.update(KEYS)
    with network((*NAMES, STORES)) as net:
        lab = Lab(net)
        try:
            yield lab
        finally:
            for job in lab.jobs:
                job.kill()


def mlflow_command(address: str, port: int, folder: Path) -> list[str]:
    return [
        str(BIN / "mlflow"), "server", f"--host={address}", f"--port={port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts",
    ]  # fmt: skip
