"""Submit a config to a Ray cluster as a job, follow it, and tell how it ended. The only user of Ray's Jobs API."""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import yaml
from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

import pipeline
from pipeline.checkpoint.run import run_directory
from pipeline.config import Config
from pipeline.core.errors import ClusterUnreachable, ConfigError, CredentialsError, ExitCode

_CONNECT = 10  # seconds until an address counts as unreachable
_LOST_AFTER = 120  # seconds without an answer until a job that is followed counts as out of reach
_READY_WITHIN = 60  # seconds that a cluster which answers may take until it takes jobs
_NO_AGENT = "No available agent"  # how the head says so
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class RayCluster:
    """The Ray cluster whose dashboard answers at `address`, `http(s)://host:port`.

    Raises:
        ClusterUnreachable: nobody answers there. CredentialsError: the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.address = address if "://" in address else f"http://{address}"
        self._knock()
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # uploads and closed connections are no news
        self._errors: tuple[type[Exception], ...] = (requests.RequestException, aiohttp.ClientError, OSError, TimeoutError, RuntimeError)
        try:
            self.client = JobSubmissionClient(self.address)
        except AuthenticationError as e:
            given = "the token given is wrong" if _has_token() else "it asks for a token and none is given"
            raise CredentialsError(
                f"cluster.address: {self.address} refused the connection, {given}; "
                "set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            ) from e
        except self._errors as e:
            raise ClusterUnreachable(f"cluster.address: {self.address} does not answer as a Ray dashboard ({e})") from e

    def _knock(self) -> None:
        refusal = ConfigError(
            f"cluster.address: {self.address!r} is not an address of a Ray dashboard (allowed: http://host:8265 or https://..)"
        )
        try:
            parts = urlsplit(self.address)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise refusal from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise refusal
        try:
            socket.create_connection((parts.hostname, port), timeout=_CONNECT).close()
        except OSError as e:
            raise ClusterUnreachable(f"cluster.address: nobody answers at {self.address} ({e})") from e

    def submit(self, configs: Sequence[Config], command: str, fresh: bool) -> str:
        """Start the job of these runs, named by the first, or find it where it is running already; gives its submission id."""
        config = configs[0]
        base = submission_id(config)
        jobs = {j.submission_id: j for j in self.client.list_jobs() if j.submission_id and j.submission_id.startswith(f"{base}-")}
        for name, job in jobs.items():
            if job.status.value not in _ENDED:
                click.echo(f"this run is on the cluster already, as job {name}", err=True)
                return name
        attempt = 1 + max((int(name.rpartition("-")[2]) for name in jobs), default=0)
        with tempfile.TemporaryDirectory(prefix="tessera-job-") as folder:
            files = package(configs, Path(folder))
            words = [config.cluster.python, "-m", "pipeline", *files, "--command", command, *(["--fresh"] if fresh else [])]
            environment = _job_environment(config)
            # A head that has just started answers before it can take jobs.
            retry = Retrying(
                retry=retry_if_exception_message(match=f".*{_NO_AGENT}"),
                stop=stop_after_delay(_READY_WITHIN),
                wait=wait_fixed(1),
                reraise=True,
            )
            try:
                return retry(
                    self.client.submit_job,
                    entrypoint=shlex.join(words),
                    submission_id=f"{base}-{attempt}",
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata={"run": run_directory(config).url},
                )
            except RuntimeError as e:
                if _NO_AGENT not in str(e):
                    raise
                raise ClusterUnreachable(
                    f"cluster.address: {self.address} answers, but the head's agent, which takes jobs, has not come up for "
                    f"{_READY_WITHIN} s; dashboard_agent.log in the head's session directory says why (often its port is taken: "
                    "ray start --dashboard-agent-listen-port)"
                ) from e

    def follow(self, name: str) -> ExitCode | int:
        """Print the job's log to its end, through broken connections; gives the job's exit code."""
        printed = 0
        heard = time.monotonic()
        while True:
            try:
                printed = asyncio.run(self._print_log(name, printed))
                info = self.client.get_job_info(name)
                heard = time.monotonic()
                if info.status.value in _ENDED:
                    printed = asyncio.run(self._print_log(name, printed))  # what came between the two
                    return _exit_code(info)
            except self._errors as e:
                if time.monotonic() - heard > _LOST_AFTER:
                    raise ClusterUnreachable(f"cluster.address: lost contact with {self.address} ({e}); job {name} may be going on") from e
            time.sleep(1)

    async def _print_log(self, name: str, printed: int) -> int:
        """Print what the log holds beyond `printed` characters; the stream always begins at the start of the log."""
        seen = 0
        async for text in self.client.tail_job_logs(name):
            seen += len(text)
            if seen > printed:
                click.echo(text[-(seen - printed) :], nl=False)
                printed = seen
        return printed


def submission_id(config: Config) -> str:
    """The same for every submission of a run, so that submitting twice starts one job."""
    return f"tessera-{config.name}-{hashlib.sha256(run_directory(config).url.encode()).hexdigest()[:8]}"


def package(configs: Sequence[Config], folder: Path) -> list[str]:
    """Put into `folder` what the job needs: our code and the resolved configs, nothing else of the working directory. Gives the
    names of the configs' files."""
    source = Path(pipeline.__file__).parent
    shutil.copytree(source, folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    files = ["config.yaml", *(f"config-{i}.yaml" for i in range(1, len(configs)))]
    for file, config in zip(files, configs, strict=True):
        values = config.model_dump(mode="json", by_alias=True)
        (folder / file).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return files


def _job_environment(config: Config) -> dict[str, str]:
    """The variables that the config names, and whose run it is."""
    missing = [name for name in config.cluster.env if name not in os.environ]
    if missing:
        raise ConfigError(f"cluster.env: {missing[0]!r} is not set in this environment")
    return {
        "TESSERA_OWNER": os.environ.get("TESSERA_OWNER") or getpass.getuser(),
        **{name: os.environ[name] for name in config.cluster.env},
    }


def _exit_code(info: Any) -> int:
    if info.status.value == "SUCCEEDED":
        return ExitCode.DONE
    if info.status.value == "STOPPED":
        return ExitCode.STOPPED
    if info.driver_exit_code is not None and info.driver_exit_code > 0:
        return int(info.driver_exit_code)
    click.echo(f"error: the job died without an exit code of its own ({info.message})", err=True)
    return ExitCode.INFRASTRUCTURE


def _has_token() -> bool:
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray" / "auth_token").exists()


def use_token() -> None:
    """Ray sends a token only in token mode, which it looks for as it is imported; whoever has a token means it."""
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
