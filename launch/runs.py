"""python launch/runs.py list|status|stop: look after runs, wherever they train. All of it is read from their storage."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipeline.checkpoint import Checkpoints, Commit, Lease
from pipeline.checkpoint.__main__ import stop
from pipeline.checkpoint.goodput import DIVERGED, FAILED, FINISHED, PREEMPTED, REGROUPED, STOPPED, Goodput, Job, read_jobs, summarise
from pipeline.checkpoint.run import PAGE, find_record
from pipeline.config import Config
from pipeline.config.load import parse_config
from pipeline.core.command import exit_codes
from pipeline.core.errors import NoSuchRun, TesseraError
from pipeline.core.storage import Storage
from pipeline.core.units import format_count, format_seconds

_SILENT_AFTER = 120.0  # seconds; a job gives a sign of life every 30
_ENDS = {
    FINISHED: "finished",
    REGROUPED: "saved, to go on with another group of workers",
    PREEMPTED: "asked to end; it saved",
    STOPPED: "stopped at the keyboard",
    DIVERGED: "diverged",
    FAILED: "failed",
}
_ENDPOINT = click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store.")


@dataclass(frozen=True)
class Status:
    """What is known of a run. `steps`: of all of its pre-training, None where no job has told yet; `state` is a word."""

    url: str
    name: str
    owner: str
    id: str
    batch: int | None  # None where it does not pre-train
    steps: int | None
    state: str
    told: str
    lease: Lease | None
    job: Job | None
    commit: Commit | None
    goodput: Goodput | None
    page: str | None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look after runs. RUN is a run's directory or URL, STORAGE what holds several."""


@main.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_ENDPOINT
def status(run: str, as_json: bool, endpoint: str | None) -> None:
    """How RUN stands: its state, its newest checkpoint, and where its time and money went."""
    with exit_codes():
        found = find_status(run, endpoint)
        click.echo(json.dumps(as_values(found), indent=2) if as_json else as_text(found))


@main.command("list")
@click.argument("storage")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@_ENDPOINT
def list_(storage: str, as_json: bool, endpoint: str | None) -> None:
    """The runs in STORAGE, each with its state and newest checkpoint."""
    with exit_codes():
        root = Storage(storage, endpoint)
        names = [name for name in root.names() if not root.is_local or Path(root.path, name).is_dir()]
        with ThreadPoolExecutor(16) as pool:
            runs = [r for r in pool.map(lambda name: _try_status(f"{root.url}/{name}", endpoint), names) if r is not None]
        for each in runs if as_json else ():
            click.echo(json.dumps(each if isinstance(each, dict) else as_values(each)))
        if not as_json:
            click.echo(_table(runs) if runs else f"{root.url}: there are no runs here")


main.add_command(stop)


def find_status(url: str, endpoint: str | None = None, now: float | None = None) -> Status:
    """Of the run at `url`; `now`: seconds since 1970.

    Raises:
        NoSuchRun: there is none. TesseraError: what it holds cannot be read.
    """
    record, run = find_record(url, endpoint), Storage(url, endpoint)
    config = parse_config(record["config"])
    checkpoints, jobs = Checkpoints(run), read_jobs(run, record["id"])
    lease, job = checkpoints.newest_lease(), jobs[-1] if jobs else None
    commit = next(reversed(checkpoints.commits()), None)
    state, told = _state(config, lease, job, time.time() if now is None else now)
    return Status(
        url=run.url,
        name=config.name,
        owner=record["owner"],
        id=record["id"],
        batch=config.pretrain.batch if config.pretrain else None,
        steps=max((job.steps for job in jobs), default=0) or None,
        state=state,
        told=told,
        lease=lease,
        job=job,
        commit=commit,
        goodput=summarise(jobs, config.cluster.price, config.cluster.currency) if jobs else None,
        page=f"{run.url}/{PAGE}" if run.exists(PAGE) else None,
    )


def _state(config: Config, lease: Lease | None, job: Job | None, now: float) -> tuple[str, str]:
    """In a word, and in a sentence."""
    if config.pretrain is None:
        return "-", "does not pre-train"
    if lease is None:
        return "waiting", "no job has begun to train it"
    if job is None or job.generation < lease.generation:
        return "starting", f"job {lease.generation} ({lease.owner}) has taken it up, and told nothing yet"
    ago = f"{format_seconds(max(0.0, now - job.last_seen))} ago"  # by two clocks
    if job.end is not None:
        return job.end, f"{_ENDS.get(job.end, job.end)}, {ago}{f': {job.reason}' if job.reason else ''}"
    doing = "starting" if job.first is None else "training"
    at = "" if job.first is None else f" at step {job.step:,} of {job.steps:,}"
    if now - job.last_seen > _SILENT_AFTER:
        return "silent", f"silent: its last sign of life was {ago}, while {doing}{at}; it is dead, cut off, or its clock is wrong"
    return doing, f"{doing}{at}, {ago}"


def as_values(status: Status) -> dict[str, Any]:
    """Plain values, for JSON."""
    goodput, commit, batch = status.goodput, status.commit, status.batch
    return {
        **{key: getattr(status, key) for key in ("url", "name", "owner", "id", "state", "told", "steps", "page")},
        "samples": status.steps * batch if status.steps and batch else None,
        "lease": {"generation": status.lease.generation, "owner": status.lease.owner} if status.lease else None,
        "job": {**asdict(status.job), "last_seen": status.job.last_seen} if status.job else None,
        "checkpoint": {key: getattr(commit, key) for key in ("step", "samples", "generation", "world_size", "metrics")} if commit else None,
        "goodput": {**asdict(goodput), "whole": goodput.whole, "fraction": goodput.fraction} if goodput else None,
    }


def as_text(status: Status) -> str:
    lines = [("run", status.url), ("name", f"{status.name}, of {status.owner}"), ("state", status.told)]
    if (job := status.job) is not None:
        kind = "GPU" if job.gpus else "CPU"
        workers = f"{job.workers} {kind} worker{'' if job.workers == 1 else 's'}"
        holder = f", {status.lease.owner}" if status.lease and status.lease.generation == job.generation else ""
        lines.append(("job", f"{job.generation}{holder}; {workers}, began {_at(job.began)}, last seen {_at(job.last_seen)}"))
    if status.batch is not None:
        lines.append(("checkpoint", _checkpoint(status)))
    if (goodput := status.goodput) is not None:
        lines.append(("goodput", goodput.in_words()))
        for kind, seconds in goodput.seconds.items():
            lines.append(("", f"{kind:<12}{format_seconds(seconds):>14}{goodput.shares()[kind]:>8.1%}   {goodput.money(kind)}".rstrip()))
    if status.page:
        lines.append(("page", status.page))
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _checkpoint(status: Status) -> str:
    if status.commit is None:
        return "none yet"
    text = f"step {status.commit.step:,}"
    if not status.steps or status.batch is None:
        return f"{text}, {format_count(status.commit.samples)} samples"
    whole = f"{format_count(status.commit.samples)} of {format_count(status.steps * status.batch)} samples"
    return f"{text} of {status.steps:,}, {whole} ({status.commit.step / status.steps:.1%})"


def _at(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _try_status(url: str, endpoint: str | None) -> Status | dict[str, Any] | None:
    """None for what is no run; a run that cannot be read does not hide the others."""
    try:
        return find_status(url, endpoint)
    except NoSuchRun:
        return None
    except TesseraError as e:
        return {"url": url, "name": url.rpartition("/")[2], "state": "unreadable", "told": str(e)}


def _table(runs: list[Status | dict[str, Any]]) -> str:
    rows = [("name", "owner", "state", "step", "of", "goodput")]
    errors = []
    for run in runs:
        if isinstance(run, dict):
            rows.append((run["name"], "?", run["state"], "?", "?", "?"))
            errors.append(f"{run['name']}: {run['told']}")
            continue
        step = f"{run.commit.step:,}" if run.commit else "-"
        share = f"{run.goodput.fraction:.1%}" if run.goodput else "-"
        rows.append((run.name, run.owner, run.state, step, f"{run.steps:,}" if run.steps else "-", share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([line.rstrip() for line in lines] + errors)


if __name__ == "__main__":
    main()
