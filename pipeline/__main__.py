"""python -m pipeline CONFIG ..: what runs on the cluster. The stages of each config, in order, on the Ray it finds.

Without a cluster (no RAY_ADDRESS) it starts Ray on this machine.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.config import Config, load_config
from pipeline.config.load import split_words
from pipeline.core.cluster import connect_ray
from pipeline.core.command import exit_codes
from pipeline.core.errors import ConfigError
from pipeline.core.progress import say
from pipeline.core.tracking import redact

if TYPE_CHECKING:  # Ray and DeepSpeed are imported as a run begins
    from pipeline.stages import Outcome


def run_here(configs: Sequence[Config], *, command: str, fresh: bool = False, local: bool) -> None:
    """Check all of `configs`, then run and sum up one after the other in this process, on one Ray; a later one may use what an
    earlier one makes. Several end in one page, at the first's.

    Raises:
        TesseraError: with one plain sentence.
    """
    began = time.monotonic()
    from pipeline.checkpoint.run import check_claim
    from pipeline.preflight import check_config, check_resources, made_by, settle_config
    from pipeline.stages import run_stages, write_joint_page

    if repeated := [c.name for i, c in enumerate(configs) if c.name in [other.name for other in configs[:i]]]:
        raise ConfigError(f"name: {repeated[0]!r} is the name of two of the configs; each run needs one of its own")
    configs = list(configs)
    for i, config in enumerate(configs):
        check_config(config)
        configs[i] = config = settle_config(config, configs[:i], fresh)
        check_claim(config, fresh)
        check_resources(config, coming=made_by(configs[:i]), fresh=fresh)
    connect_ray(local)
    outcomes = []
    for config in configs:
        if len(configs) > 1:
            say(f"run          {config.name}")
        outcomes.append(run_stages(config, command=command, fresh=fresh))
    page = outcomes[0].page if len(outcomes) == 1 else write_joint_page(outcomes, command)
    _sum_up(outcomes)
    click.echo(f"page   {page}")
    uri = outcomes[0].run.tracking_uri
    mlflow = os.path.relpath(Path(sys.executable).parent / "mlflow")
    click.echo(f"MLflow {f'{mlflow} ui --backend-store-uri {shlex.quote(uri)}' if uri.startswith('sqlite') else redact(uri)}")
    click.echo(f"ran in {time.monotonic() - began:.0f} s")


def _sum_up(outcomes: Sequence[Outcome]) -> None:
    if any(outcome.results for outcome in outcomes):
        click.echo("\nscore                                      value    95% interval      of")
    for outcome in outcomes:
        prefix = f"{outcome.run.config.name}: " if len(outcomes) > 1 else ""
        for r in outcome.results:
            click.echo(f"{prefix + r.suite + '/' + r.name:<40} {r.value:7.2%}   {r.low:6.2%} to {r.high:6.2%}  {r.n:5,}")
    click.echo("")
    for outcome in outcomes:
        click.echo(f"run    {outcome.run.directory.url}")


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG .. [section.key=value ..]")
@click.option("--fresh", is_flag=True, help="Start anew where a run of this name exists.")
@click.option("--command", "said", default="", help="What the person typed, for the report.")
def main(words: tuple[str, ...], fresh: bool, said: str) -> None:
    """Run the stages of each CONFIG."""
    with exit_codes():
        files, overrides = split_words(words)
        command = said or f"python -m pipeline {' '.join(files)}"
        configs = [load_config(file, overrides) for file in files]
        run_here(configs, command=command, fresh=fresh, local="RAY_ADDRESS" not in os.environ)


if __name__ == "__main__":
    main()
