"""python launch/submit.py CONFIG .. [section.key=value ..]: run a config here, or submit it to a Ray cluster.

CONFIG is a YAML file, or the URL of a run to go on with; several run one after the other. The same command again goes on where the
last one stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline.__main__ import run_here
from pipeline.config import Config, load_config
from pipeline.config.load import apply_override, parse_config, split_words
from pipeline.core.command import exit_codes
from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.storage import Storage


@click.command()
@click.argument("words", nargs=-1, metavar="CONFIG .. [section.key=value ..]")
@click.option("--local", is_flag=True, help="Run on this machine, whatever the config's cluster.")
@click.option("--address", help="The Ray dashboard to submit to, such as http://head:8265.")
@click.option("--detach", is_flag=True, help="Submit, and do not wait for the end.")
@click.option("--fresh", is_flag=True, help="Start anew where a run of this name exists: its checkpoints are removed.")
@click.option("--plan", is_flag=True, help="Print what would happen; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --plan: as JSON.")
@click.option("--profile", is_flag=True, help="Trace a few steps of pre-training, as pretrain.profile={} does.")
@click.option("--calibrate", is_flag=True, help="With --plan: measure a few steps on this machine first; later plans use what it found.")
@click.option("--schema", is_flag=True, help="Print the config's JSON schema, for editors.")
def main(
    words: tuple[str, ...],
    local: bool,
    address: str | None,
    detach: bool,
    fresh: bool,
    plan: bool,
    as_json: bool,
    profile: bool,
    calibrate: bool,
    schema: bool,
) -> None:
    """Run CONFIG, or submit it to a cluster. CONFIG is a YAML file, or the URL of a run to go on with; several run one after the
    other on one Ray, and end in one page."""
    if schema:
        click.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    if not words:
        raise click.UsageError("Missing argument 'CONFIG'.")
    if local and address:
        raise click.UsageError("--local and --address exclude each other.")
    if calibrate and not plan:
        raise click.UsageError("--calibrate goes with --plan.")
    with exit_codes():
        try:
            files, overrides = split_words(words)
            overrides = ["pretrain.profile={}", *overrides] if profile else overrides  # what is said of it comes after
            configs = [_load(file, list(overrides), local, address) for file in files]
            code = _run(configs, address, detach=detach, fresh=fresh, plan=plan, as_json=as_json, calibrate=calibrate)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
            code = ExitCode.STOPPED
    sys.exit(int(code))


def _load(config: str, overrides: list[str], local: bool, address: str | None) -> Config:
    if local:
        overrides.append("cluster.name=local")
    elif address:
        overrides += ["cluster.name=ray", f"cluster.address={json.dumps(address)}"]
    if "://" in config or Path(config).is_dir():
        return _load_run(config, overrides)
    return load_config(config, overrides)


def _load_run(url: str, overrides: list[str]) -> Config:
    """The config of the run at `url`; it goes on there, wherever it was made."""
    from pipeline.checkpoint.run import find_run

    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    storage = given.get("storage")
    directory = Storage(url, storage.get("endpoint") if isinstance(storage, dict) else None)
    values = find_run(url, directory.endpoint)
    parent, _, last = directory.url.rpartition("/")
    config = parse_config(values, [*overrides, f"storage.url={json.dumps(parent or '/')}"])
    if config.name != last:
        raise ConfigError(f"run {url}: the run here is named {config.name!r}, and its directory must be; give the directory that name back")
    return config


def _run(
    configs: list[Config], address: str | None, *, detach: bool, fresh: bool, plan: bool, as_json: bool, calibrate: bool = False
) -> int:
    if plan:
        for i, config in enumerate(configs):
            _plan(config, configs[:i], fresh, as_json, calibrate)
        return ExitCode.DONE
    config = configs[0]
    if any(c.cluster != config.cluster for c in configs):
        raise ConfigError("cluster: the configs name different clusters; submit those of each cluster by themselves")
    command = "python launch/submit.py " + shlex.join(arg for arg in sys.argv[1:] if arg != "--fresh")
    if config.cluster.is_local:
        run_here(configs, command=command, fresh=fresh, local=True)
        return ExitCode.DONE
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(
            "cluster.address: is missing, and RAY_ADDRESS is not set; "
            "name the cluster's dashboard, such as http://head:8265, or say --local"
        )
    from launch.cluster import RayCluster, use_token

    use_token()  # before anything imports Ray, which looks once
    from pipeline.preflight import check_config

    for each in configs:
        check_config(each)
    cluster = RayCluster(address)
    name = cluster.submit(configs, command, fresh)
    click.echo(f"job {name} on {cluster.address}; ctrl-C stops following, not the job", err=True)
    if detach:
        return ExitCode.DONE
    try:
        return cluster.follow(name)
    except KeyboardInterrupt:
        click.echo(f"\njob {name} goes on; the same command follows it again", err=True)
        return ExitCode.NOT_FINISHED


def _plan(config: Config, before: list[Config], fresh: bool, as_json: bool, calibrate: bool) -> None:
    """Print what `config` would do after those `before` it."""
    from pipeline.checkpoint.run import check_claim, run_directory
    from pipeline.plan import calibration
    from pipeline.plan.describe import as_text, describe
    from pipeline.preflight import check_config, check_resources, made_by, plan_config, settle_config
    from pipeline.shards.forecast import forecast
    from pipeline.shards.job import find_made

    check_config(config)
    config = settle_config(config, before, fresh)
    check_claim(config, fresh)
    check_resources(config, write=False, coming=made_by(before), fresh=fresh)
    plan, estimated, workers = plan_config(config, before, fresh)
    if calibrate and plan:
        plan = replace(plan, measured=calibration.calibrate(config, plan.load, plan.device))
    is_to_come = config.shard is not None and not find_made(config.shard, run_directory(config) / "shards")
    facts = describe(config, plan, estimated, workers, forecast(config.shard, config.storage) if config.shard and is_to_come else None)
    click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts, yaml.safe_dump(facts["config"], sort_keys=False)))


if __name__ == "__main__":
    main()
