"""python -m pipeline.checkpoint list|verify|export|save|stop: look after the checkpoints of a run, wherever it lies."""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time
from collections.abc import Sequence

import click

from pipeline.checkpoint.commit import Checkpoints, Commit
from pipeline.checkpoint.export import export as export_model
from pipeline.checkpoint.export import find_commits
from pipeline.checkpoint.read import verify as verify_all
from pipeline.checkpoint.requests import ask, is_heard, withdraw
from pipeline.checkpoint.retain import retention_of, to_keep
from pipeline.checkpoint.run import Run, find_run
from pipeline.config.load import parse_config
from pipeline.core.command import exit_codes
from pipeline.core.errors import CheckpointError, ClusterUnreachable, ExitCode, NoSuchRun, UserError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.core.units import format_bytes, format_count, parse_bytes
from pipeline.models.formats import TARGETS
from pipeline.stream import open_collection

_ENDPOINT = click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store.")
_WAIT = click.option("--wait", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds for a job to hear of it.")
_LOOK_EVERY = 0.5  # seconds
_MMAP_THRESHOLD = -3  # mallopt(3)
_MIB = 1 << 20


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look after the checkpoints of RUN, a run's directory or URL; RUN@STEP is the one of that step."""


@main.command("list")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@_ENDPOINT
def list_(run: str, as_json: bool, endpoint: str | None) -> None:
    """The committed checkpoints of RUN, the newest last, and which of them `pretrain.save` would keep."""
    with exit_codes():
        checkpoints, commits = find_commits(run, endpoint)
        kept = _kept(checkpoints, endpoint)
        for commit in commits if as_json else ():
            click.echo(json.dumps({
                "step": commit.step, "generation": commit.generation, "samples": commit.samples, "ranks": commit.world_size,
                "stage": commit.zero_stage, "bytes": _bytes(commit), "kept": None if kept is None else commit.step in kept,
                "metrics": commit.metrics,
            }))  # fmt: skip
        if not as_json:
            click.echo(_table(commits, kept) if commits else f"{run}: nothing has been committed yet")


@main.command()
@click.argument("run", metavar="RUN[@STEP]")
@_ENDPOINT
def verify(run: str, endpoint: str | None) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of RUN, and compare it with what was saved; nothing is changed."""
    code = ExitCode.DONE
    with exit_codes():
        checkpoints, commits = find_commits(run, endpoint)
        if not commits:
            raise NoSuchRun(f"run {checkpoints.run.url}: there is no committed checkpoint here")
        for commit in commits:
            try:
                _verify(checkpoints, commit)
            except CheckpointError as e:
                click.echo(f"error: {e}", err=True)
                code = e.exit_code
            else:
                click.echo(f"step {commit.step:,}: all {format_bytes(_bytes(commit))} are as they were saved")
    sys.exit(code)


@main.command()
@click.argument("run", metavar="RUN[@STEP]")
@click.argument("dst")
@click.option("--to", required=True, type=click.Choice(sorted(TARGETS)), help="hf loads with transformers' from_pretrained.")
@click.option("--force", is_flag=True, help="Write to DST though it is not empty.")
@click.option("--max-file", metavar="SIZE", help="Of hf: weights of more than so many bytes go to several files.  [default: 5 GB]")
@_ENDPOINT
def export(run: str, dst: str, to: str, force: bool, max_file: str | None, endpoint: str | None) -> None:
    """Write the model of a checkpoint, by default of RUN's newest, to the directory DST, a path or URL, as others load it.

    It is put together piece by piece: memory holds a few tensors at a time, TMPDIR one file.
    """
    with exit_codes():
        _give_memory_back()
        commit = export_model(run, dst, to, endpoint=endpoint, force=force, most=_size(max_file))
        click.echo(f"{dst}: step {commit.step:,}, as {to}")


@main.command()
@click.argument("run")
@_WAIT
@_ENDPOINT
def save(run: str, wait: float, endpoint: str | None) -> None:
    """Ask the job that trains RUN to save now."""
    with exit_codes():
        _ask(run, "save", wait, endpoint)
        click.echo(f"{run}: its job has heard of it, and saves after the step that it is at")


@main.command()
@click.argument("run")
@_WAIT
@_ENDPOINT
def stop(run: str, wait: float, endpoint: str | None) -> None:
    """Ask the job that trains RUN to save and end; submitting the run again goes on from there."""
    with exit_codes():
        _ask(run, "stop", wait, endpoint)
        click.echo(f"{run}: its job has heard of it, and saves and ends after the step that it is at")


def _give_memory_back() -> None:
    """Have glibc give each large block to the kernel as it is freed. Else it keeps them for others, which seldom fit into them, and an
    export comes to hold several times what it needs."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 20)


def _verify(checkpoints: Checkpoints, commit: Commit) -> None:
    with Progress("verify", _bytes(commit) / _MIB, "MiB") as progress:
        verify_all(checkpoints, commit, lambda count: progress.update(count / _MIB))


def _ask(url: str, kind: str, wait: float, endpoint: str | None) -> None:
    """Raises NoSuchRun; ClusterUnreachable where no job hears of it."""
    find_run(url, endpoint)
    run, deadline = Storage(url, endpoint), time.monotonic() + wait
    ask(run, kind)
    try:
        while not is_heard(run, kind):
            if time.monotonic() > deadline:
                raise ClusterUnreachable(
                    f"run {url}: no job has heard of it in {wait:g} s, so none seems to train it; the request is taken back"
                )
            time.sleep(_LOOK_EVERY)
    except BaseException:  # ctrl-C as well
        withdraw(run, kind)
        raise


def _kept(checkpoints: Checkpoints, endpoint: str | None) -> set[int] | None:
    """Steps that stay by the run's config; None where it has none."""
    try:
        config = parse_config(find_run(checkpoints.run.url, endpoint))
    except NoSuchRun:
        return None
    if (p := config.pretrain) is None:
        return None
    samples = 0  # an epoch; asked for where it matters
    if p.save.permanent and p.save.permanent.unit == "epoch":
        samples = open_collection(Run(config, "", checkpoints.run).data, p.split, endpoint).samples
    return to_keep(checkpoints.commits(), retention_of(p, samples))


def _bytes(commit: Commit) -> int:
    return sum(receipt.bytes for receipt in commit.files)


def _size(text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as e:
        raise UserError(f"--max-file: {text!r} {e}") from e


def _table(commits: Sequence[Commit], kept: set[int] | None) -> str:
    rows = [("step", "generation", "samples", "ranks", "stage", "size", "kept", "metrics")]
    for c in commits:
        stays = "?" if kept is None else "yes" if c.step in kept else "no"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in c.metrics.items())
        rows.append((
            f"{c.step:,}", str(c.generation), format_count(c.samples), str(c.world_size), str(c.zero_stage), format_bytes(_bytes(c)), stays,
            metrics,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join([*(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip() for row in rows)


if __name__ == "__main__":
    main()
