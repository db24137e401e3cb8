"""What must hold of a run that met a fault, whatever the fault was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipeline.checkpoint.read import verify as read_all
from tests.cluster.runs import BATCH, EVERY, Job, Moment, Row, Run, resumed_at

ANY_SIZE = 1e-5  # relative: the number of workers changed, and with it the order in which fp32 numbers are added up
SAME_SIZE = 0.0


def check_curve(run: Run, reference: Sequence[Row], steps: int, tolerance: float) -> float:
    """Every step is there once, and its loss is the undisturbed run's; gives the largest relative difference."""
    rows = run.history()
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "every step once"
    if tolerance == SAME_SIZE:
        assert rows == list(reference[:steps]), "bit for bit"
    worst = max(
        abs(row["train/loss"] - other["train/loss"]) / abs(other["train/loss"]) for row, other in zip(rows, reference[:steps], strict=True)
    )
    assert worst <= tolerance, f"losses differ by {worst:.2g}"
    return worst


def check_samples(run: Run, steps: int, replaced: Sequence[str] = ()) -> None:
    """As many samples were consumed as the order has up to there; those of the keys `replaced` gave way to others, and no more."""
    commit = run.checkpoints.commits()[-1]
    loader = run.loader(commit)
    assert commit.step == steps
    assert loader["consumed"] == commit.samples == steps * BATCH
    assert sorted(entry["key"] for entry in loader["replaced"]) == sorted(replaced)


def check_checkpoints(run: Run) -> None:
    """Every byte of every checkpoint is as it was saved, and nothing lies between them that belongs to none."""
    checkpoints = run.checkpoints
    commits = checkpoints.commits()
    for commit in commits:
        assert read_all(checkpoints, commit) > 0
    steps = [name for name in checkpoints.directory.names() if name != "leases"]
    assert sorted(steps) == sorted(f"step-{commit.step}" for commit in commits)
    for commit in commits:
        assert checkpoints.directory.names(f"step-{commit.step}") == sorted(["COMMIT.json", commit.attempt])


def check_run(run: Run, reference: Sequence[Row], steps: int, tolerance: float, replaced: Sequence[str] = ()) -> str:
    """All of it; gives the losses' comparison in words."""
    worst = check_curve(run, reference, steps, tolerance)
    check_samples(run, steps, replaced)
    check_checkpoints(run)
    return "bit for bit" if tolerance == SAME_SIZE else f"within {max(worst, 1e-9):.0e}"


def loss_of(job: Job, moment: Moment, run: Run, again: Job | None = None) -> dict[str, Any]:
    """What the fault at `moment` cost: the steps that were done twice, and the seconds until training went on. `again`: the job that was
    submitted afterwards, where the first one ended.

    At most what one save covers is lost: the steps since the newest one that was begun, or since the one before, if that one was still on
    its way. The store says how many steps a save is on its way.
    """
    [first, *_] = resumed_at(again.text() if again else job.text(moment)) or [0]
    lost, flight = moment.step - first, longest_flight(run)
    assert 0 <= lost <= EVERY + flight, f"{lost} steps were lost, with {EVERY} between saves that last up to {flight}"
    return {"lost": lost, "flight": flight, "seconds": standstill(run, moment)}


def standstill(run: Run, moment: Moment, until: float = math.inf) -> float:
    """The longest time without a step, in seconds, that ended after `moment` (and before `until`)."""
    return max((b - a for (a, _), (b, _) in pairwise(run.records()) if moment.at < b < until), default=0.0)


def longest_flight(run: Run) -> int:
    """Steps that were done while the slowest save was on its way: from the step that was saved to where its commit was known."""
    records = run.records()
    flights = []
    for told, step in run.records("train/save_s"):
        began = max((at for at, done in records if done == step and at <= told), default=told)
        flights.append(sum(began < at <= told for at, _ in records))
    return max(flights, default=0)
