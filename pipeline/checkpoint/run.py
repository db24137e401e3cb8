"""The run directory: whose it is, and whether a config may go on with what is there."""

from __future__ import annotations

import getpass
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.commit import Checkpoints
from pipeline.config import Config, fingerprint
from pipeline.config.data import Data
from pipeline.config.load import parse_config, parse_yaml
from pipeline.core.errors import ConfigError, NoSuchRun
from pipeline.core.storage import Storage
from pipeline.core.tracking import Tracker

# What may differ between two submissions of one run: where and how it runs, not what it computes.
_FREE = (
    "cluster",
    "tracking",
    "storage",
    "evaluate",
    "pretrain.save",
    "pretrain.guard",
    "pretrain.zero",
    "pretrain.validate",
    "pretrain.log",
    "pretrain.recompute",
    "pretrain.compile",
    "pretrain.deepspeed",
    "pretrain.statistics",
    "pretrain.profile",
    "pretrain.peak",
    "pretrain.loader.workers",
    "pretrain.loader.bad",
    "pretrain.loader.cache",
    "shard.workers",
    "shard.fetch",
    "shard.source.endpoint",
    # What is done to finished shards; a run that has begun to train keeps what it began with.
    "shard.duplicates",
    "shard.contamination",
    "shard.scores",
    "shard.takedown",
)

# What Tessera itself puts into a run directory; shards may be there before the run is, and stay after --fresh.
_OWN = ("evaluation", "goodput", "palette.npy", "profile", "report", "requests", "stacks", "timings.json", "tokenizer.json", "run.yaml")
_PARTS = (*_OWN, "checkpoints", "shards", "spool")
PAGE = "report/index.html"


@dataclass(frozen=True)
class Run:
    """A claimed run directory; `id` stays the same over all resumes and names its MLflow run."""

    config: Config
    id: str
    directory: Storage
    is_new: bool = True

    @property
    def data(self) -> list[Data]:
        """The datasets of this run: its own shards, or what the config names."""
        return self.config.data or [Data(url=f"{self.directory.url}/shards")]

    @property
    def dataset_url(self) -> str:
        """The dataset of this run; the first one of several."""
        return str(self.data[0].url)

    @property
    def tracking_uri(self) -> str:
        return tracking_uri(self.config)

    def tracker(self, stage: str | None = None) -> Tracker:
        """The MLflow run of one stage, nested in the run's own; or that one itself."""
        local = self.directory.is_local
        state = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "tessera"
        return Tracker(
            self.tracking_uri,
            self.config.tracking.experiment,
            f"{self.id}/{stage}" if stage else self.id,
            f"{self.config.name}/{stage}" if stage else self.config.name,
            (Path(self.directory.path) if local else state) / "spool",
            artifacts=f"{Path(self.directory.path).parent}/mlartifacts" if local else None,
            parent=self.id if stage else None,
        )


def run_directory(config: Config) -> Storage:
    return Storage(config.storage.url, config.storage.endpoint) / config.name


def tracking_uri(config: Config) -> str:
    """Raises ConfigError where storage is remote and no uri is given."""
    root = Storage(config.storage.url, config.storage.endpoint)
    if config.tracking.uri:
        return config.tracking.uri
    if not root.is_local:
        raise ConfigError(
            f"tracking.uri: is missing; storage {config.storage.url} is remote, so name an MLflow server, such as http://mlflow:5000"
        )
    return f"sqlite:///{root.path}/mlflow.db"


def claim_run(config: Config, fresh: bool = False) -> Run:
    """Make the run directory of `config`, or go on with the one that is there.

    Raises:
        ConfigError: the run there was made by somebody else, or by a config that differs in what it computes; or what is
            there is no run.
    """
    directory = run_directory(config)
    there = check_claim(config, fresh)
    if fresh:
        Checkpoints(directory).clear()
        for part in _OWN:
            directory.remove(part)
    if there is None or fresh:
        record: dict[str, Any] = {"id": uuid.uuid4().hex, "owner": _owner(), "config": config.model_dump(mode="json", by_alias=True)}
        if directory.create("run.yaml", yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode()):
            return Run(config, record["id"], directory)
        there = check_claim(config)  # another process was quicker
        assert there is not None, "a run.yaml that cannot be made is there"
    return Run(config, there["id"], directory, is_new=False)


def check_claim(config: Config, fresh: bool = False) -> dict[str, Any] | None:
    """The record of the run that is there already, or None. `fresh` would replace it, but never somebody else's.

    Raises:
        ConfigError: as `claim_run`.
    """
    directory = run_directory(config)
    try:
        there = _read(directory)
    except FileNotFoundError:
        strange = [name for name in directory.names() if name not in _PARTS and not name.startswith(".")]
        if strange:
            raise ConfigError(
                f"name: {directory.url} holds {strange[0]!r} and no run.yaml, so it is not a run; choose another name"
            ) from None
        return None
    if there["owner"] != _owner():
        raise ConfigError(
            f"name: {config.name!r} is a run of {there['owner']} in {directory.url}, and you are {_owner()}; choose another name"
        )
    if fresh:
        return there
    differing = _differences(_as_of_today(there["config"], directory), config.model_dump(mode="json", by_alias=True))
    if differing:
        raise ConfigError(
            f"name: the run in {directory.url} was made by a config that differs in {', '.join(differing)}; "
            "choose another name, give back those values, or start anew with --fresh"
        )
    return there


def _as_of_today(old: dict[str, Any], directory: Storage) -> dict[str, Any]:
    """A recorded config as this version would record it: keys that are new since then have their defaults."""
    try:
        return parse_config(old).model_dump(mode="json", by_alias=True)
    except ConfigError as e:
        raise ConfigError(
            f"name: the run in {directory.url} was made by a config that this version refuses ({e}); "
            "choose another name, or start anew with --fresh"
        ) from e


def find_run(url: str, endpoint: str | None = None) -> dict[str, Any]:
    """The config values of the run at `url`. Raises NoSuchRun where there is none."""
    return find_record(url, endpoint)["config"]


def kept_micro_batch(config: Config) -> int | None:
    """Of the run of `config` that is there already: what `auto` was for it. None where there is none."""
    try:
        kept = _read(run_directory(config))["config"].get("pretrain") or {}
    except FileNotFoundError:
        return None
    value = kept.get("micro_batch")
    return value if isinstance(value, int) else None


def find_record(url: str, endpoint: str | None = None) -> dict[str, Any]:
    """{id, owner, config} of the run at `url`; raises as `find_run`."""
    try:
        return _read(Storage(url, endpoint))
    except FileNotFoundError:
        raise NoSuchRun(f"run {url}: there is no run here (no run.yaml)") from None


def _read(directory: Storage) -> dict[str, Any]:
    where = f"{directory.url}/run.yaml"
    values = parse_yaml(directory.read("run.yaml"), where)
    if not isinstance(values, dict) or not {"id", "owner", "config"} <= set(values):
        raise ConfigError(f"{where}: is not the record of a run (needed: id, owner, config)")
    return values


def _owner() -> str:
    return os.environ.get("TESSERA_OWNER") or getpass.getuser()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    keys = [k for k in {**before, **after} if not any(k == f or k.startswith(f"{f}.") for f in _FREE)]
    return sorted(k for k in keys if fingerprint(before.get(k)) != fingerprint(after.get(k)))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.key`: value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
