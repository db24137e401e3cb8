"""python -m pipeline CONFIG: what runs on the cluster. The stages of one config, in order, on the Ray it finds.

Without a cluster (no RAY_ADDRESS) it starts Ray on this machine.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import click

from pipeline.config import Config, load_config
from pipeline.core.cluster import connect_ray
from pipeline.core.command import exit_codes
from pipeline.core.tracking import redact


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
