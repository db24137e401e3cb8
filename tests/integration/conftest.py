"""Real services, each a process of its own: a Ray cluster with token authentication, an S3 server, an MLflow server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.services import BIN, TOKEN, RayHead, answers, free_ports, service


@pytest.fixture(scope="session")
def ray_head(s3: object) -> Iterator[RayHead]:
    """`ray start --head` with token authentication; it knows the keys of the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    gcs, dashboard, client = free_ports(3)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--temp-dir={folder / 'r'}", "--disable-usage-stats",
    ]  # fmt: skip
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    address = f"http://127.0.0.1:{dashboard}"
    try:
        with service(command, folder / "log", lambda: answers(f"{address}/api/version"), env):
            yield RayHead(address, TOKEN)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` over HTTP on SQLite; its URL."""
    folder = tmp_path_factory.mktemp("mlflow")
    [port] = free_ports(1)
    command = [
        str(BIN / "mlflow"), "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    # A server without this starts seven processes that nobody asks for anything.
    with service(command, folder / "log", lambda: answers(f"{url}/health"), {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield url


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scanned digits as a class-per-folder tree."""
    from pipeline.shards.digits import write_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder
