"""python -m pipeline CONFIG: what runs on the cluster. The stages of one config, in order, on the Ray it finds.

Without a cluster (no RAY_ADDRESS) it starts Ray on this machine.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from pipeline.config import Config, load_config
from pipeline.core.errors import ExitCode, TesseraError
from pipeline.core.tracking import redact


def connect_ray(local: bool) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task that asks for no GPU sees none
    import ray

    # What workers have to say comes through the relay of the stage; their raw output stays in Ray's log files.
    ray.init(
        address="local" if local else "auto", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if local else None
    )


def run_here(config: Config, *, command: str, fresh: bool = False, local: bool) -> None:
    """Check, run and sum up `config` in this process.

    Raises:
        TesseraError: with one plain sentence.
    """
    began = time.monotonic()
    from pipeline.checkpoint.run import check_claim
    from pipeline.stages import check_config, check_resources, run_stages

    check_config(config)
    check_claim(config, fresh)
    check_resources(config)
    connect_ray(local)
    outcome = run_stages(config, command=command, fresh=fresh)
    if outcome.results:
        click.echo("\nscore                                      value    95% interval      of")
        for r in outcome.results:
            click.echo(f"{r.suite + '/' + r.name:<40} {r.value:7.2%}   {r.low:6.2%} to {r.high:6.2%}  {r.n:5,}")
    click.echo(f"\nrun    {outcome.run.directory.url}")
    click.echo(f"page   {outcome.page}")
    uri = outcome.run.tracking_uri
    mlflow = os.path.relpath(Path(sys.executable).parent / "mlflow")
    click.echo(f"MLflow {f'{mlflow} ui --backend-store-uri {shlex.quote(uri)}' if uri.startswith('sqlite') else redact(uri)}")
    click.echo(f"ran in {time.monotonic() - began:.0f} s")


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process as the commands promise: what a person can mend in one sentence and with the exit code of its
    kind; anything else is a defect of ours, with its traceback."""
    try:
        yield
    except TesseraError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(int(e.exit_code))
    except Exception:  # noqa: BLE001  the last stop
        traceback.print_exc()
        sys.exit(int(ExitCode.FAILED))


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--fresh", is_flag=True, help="Start anew where a run of this name exists.")
@click.option("--command", "said", default="", help="What the person typed, for the report.")
def main(config: str, overrides: tuple[str, ...], fresh: bool, said: str) -> None:
    """Run the stages of CONFIG."""
    with exit_codes():
        command = said or f"python -m pipeline {config}"
        run_here(load_config(config, list(overrides)), command=command, fresh=fresh, local="RAY_ADDRESS" not in os.environ)


if __name__ == "__main__":
    main()
