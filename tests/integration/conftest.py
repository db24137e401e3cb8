"""Real services, each a process of its own: a Ray cluster with token authentication, an S3 server, an MLflow server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.services import BIN, RayHead, answers, free_ports, service, start_head


@pytest.fixture(scope="session")
def ray_head(s3: object) -> Iterator[RayHead]:
    """`ray start --head` with token authentication; it knows the keys of the S3 server."""
    with start_head() as head:
        yield head


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
