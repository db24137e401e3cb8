"""Pre-training on this machine, with two workers and its own Ray, for faults that need no network of hosts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.storage import Storage
from tests.cluster.data import make_data
from tests.cluster.runs import Job, Run, make_config
from tests.integration.services import BIN

STEPS_HERE, LONG_HERE = 120, 480  # steps of most runs, and of the longest


class Here:
    """`folder` holds configs, logs, MLflow's database and what belongs to the machine; runs are in the bucket of an S3 server."""

    def __init__(self, folder: Path, endpoint: str, bucket: str) -> None:
        self.folder, self.endpoint, self.bucket = folder, endpoint, bucket
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        make_data(Storage(f"{bucket}/data", endpoint))

    def config(
        self, name: str, steps: int = STEPS_HERE, *, endpoint: str | None = None, data: str = "data", tracking: str | None = None
    ) -> dict[str, Any]:
        """`data`: a directory of the bucket, read afresh where it is not the sound one."""
        storage = {"url": f"{self.bucket}/runs", "endpoint": endpoint or self.endpoint}
        values = make_config(name, f"{self.bucket}/{data}", storage, tracking or self.tracking, "local", steps)
        # What a machine has fetched is named by what the index says of it: damage would not show.
        values["pretrain"]["loader"] = {"cache": str(self.folder / "caches" / data)}
        return values

    def start(self, values: Mapping[str, Any], *overrides: str, machine: str = "machine", has_ray: bool = True) -> Job:
        """`machine`: two jobs with different ones share no directory, as on two machines. Without Ray it is torchrun that starts the
        workers, in a fraction of the time, and nobody restarts them."""
        number = len(list(self.folder.glob("*.log")))
        file = self.folder / f"{values['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False))
        home = self.folder / machine
        state = home / values["name"]  # of a run alone: what an earlier one recorded is not taken for its steps
        state.mkdir(parents=True, exist_ok=True)
        spools = [f"{place}/spool/*/records.jsonl" for place in (f"{state}/tessera", f"{values['storage']['url']}/{values['name']}")]
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline.train.worker"]
        command = [*([sys.executable, "launch/submit.py"] if has_ray else torchrun), str(file), *overrides]
        env = {
            "HOME": str(home),
            "XDG_STATE_HOME": str(state),
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }  # of data, where runs are on files
        return Job(command, self.folder / f"{number}.log", spools, env)

    def run(self, values: Mapping[str, Any]) -> Run:
        """Of a config, read past a proxy that it may go through."""
        storage, name = values["storage"], values["name"]
        endpoint = self.endpoint if "://" in storage["url"] else None
        return Run(Storage(f"{storage['url']}/{name}", endpoint), values["tracking"]["uri"], name)
