"""python -m tests.cluster.trace: replay a preemption trace on the three hosts, and print where the time went.

Two hosts come and go as spot machines do, at random but by the seed alone: each stays for a time and is away for a time, both drawn from
exponential distributions; every second departure, on average, is told beforehand. The first host stays, and training goes on with what
there is. That is a year of failures in a few minutes, so the goodput is that of a bad day.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.checkpoint.goodput import Goodput, read_jobs, summarise
from pipeline.checkpoint.requests import ask
from pipeline.core.errors import ExitCode
from pipeline.core.units import format_seconds
from tests.cluster.evidence import check_checkpoints, check_samples
from tests.cluster.hosts import why_not
from tests.cluster.lab import OTHERS, Lab, open_lab
from tests.cluster.results import machine, update_trace
from tests.cluster.runs import Job

STAYS, AWAY, NOTICE = 75.0, 20.0, 20  # seconds: means of the first two
_TOLD = 0.5  # of departures, by probability
_STEPS = 1_000_000  # more than there is time for
_NAME = "trace"


@dataclass(frozen=True, order=True)
class Event:
    """At `at` seconds `host` does `what`: `is told to go`, `goes` or `comes`."""

    at: float
    host: str
    what: str


def make_trace(seconds: float, seed: int) -> list[Event]:
    """All that happens to the hosts in so many seconds, in order."""
    return sorted(event for host in OTHERS for event in _life(host, random.Random(f"{seed} {host}"), seconds))


def _life(host: str, dice: random.Random, seconds: float) -> Iterator[Event]:
    now = 0.0
    while (now := now + dice.expovariate(1 / STAYS)) < seconds:
        if dice.random() < _TOLD:
            yield Event(now, host, "is told to go")
            now += NOTICE
        yield Event(now, host, "goes")
        now += dice.expovariate(1 / AWAY)
        yield Event(now, host, "comes")


def replay(lab: Lab, job: Job, events: list[Event], seconds: float) -> None:
    """Do to the hosts what the trace says, from now on."""
    began = time.monotonic()
    for event in events:
        if event.at > seconds:
            break
        time.sleep(max(0.0, began + event.at - time.monotonic()))
        click.echo(f"{time.monotonic() - began:6.1f} s  {event.host} {event.what}  (step {job.step():,})")
        if event.what == "is told to go":
            if event.host in lab.nodes():  # or it goes before it has joined
                lab.drain(event.host, NOTICE)
        elif event.what == "goes":
            lab.hosts[event.host].kill()
        else:
            lab.start_node(event.host)
    time.sleep(max(0.0, began + seconds - time.monotonic()))


def train_through(lab: Lab, seconds: float, seed: int) -> tuple[list[Event], int, Goodput]:
    """What happened, the step that was reached, and where the time went; checks that nothing but time was lost."""
    events = [event for event in make_trace(seconds, seed) if event.at <= seconds]
    job = lab.submit(lab.config(_NAME, _STEPS), "cluster.retries=20")
    job.at_step(1)
    replay(lab, job, events, seconds)
    run = lab.run(_NAME)
    ask(run.directory, "stop")
    job.ends_with(ExitCode.PREEMPTED)
    step = run.checkpoints.commits()[-1].step
    assert [row["step"] for row in run.history()] == list(range(1, step + 1)), "every step once"
    check_samples(run, step)
    check_checkpoints(run)
    return events, step, summarise(read_jobs(run.directory))


def as_markdown(events: list[Event], step: int, goodput: Goodput, seconds: float, seed: int) -> str:
    counts = {what: sum(event.what == what for event in events) for what in ("goes", "is told to go", "comes")}
    shares = "".join(f"| {kind} | {goodput.seconds[kind]:.0f} s | {share:.0%} |\n" for kind, share in goodput.shares().items())
    return (
        f"{machine()}. `python -m tests.cluster.trace --minutes {seconds / 60:g} --seed {seed}`: two of three hosts "
        f"stay for {STAYS:g} s and are away for {AWAY:g} s, on average; {counts['goes']} departures, {counts['is told to go']} of them told "
        f"{NOTICE} s before, {counts['comes']} arrivals. {step:,} steps, each once, with all samples in order. {goodput.in_words()}.\n\n"
        f"| kind | time | share |\n|---|---|---|\n{shares}"
    )


@click.command()
@click.option("--minutes", type=float, default=4.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Put what came of it into this file, too.")
def main(minutes: float, seed: int, results: Path | None) -> None:
    """Replay a preemption trace."""
    if (reason := why_not()) is not None:
        click.echo(f"skipped: {reason}", err=True)
        sys.exit(0)
    seconds = 60 * minutes
    with open_lab() as lab:
        events, step, goodput = train_through(lab, seconds, seed)
    for kind, share in goodput.shares().items():
        click.echo(f"{kind:<12} {format_seconds(goodput.seconds[kind]):>10}  {share:6.1%}")
    click.echo(f"goodput      {goodput.in_words()}; {step:,} steps")
    if results is not None:
        update_trace(results, as_markdown(events, step, goodput, seconds, seed))


if __name__ == "__main__":
    main()
