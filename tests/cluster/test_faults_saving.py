"""What fails while a checkpoint is made: the job, the disk, the model; and jobs that come back from the dead."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.read import newest_sound
from pipeline.core.errors import ExitCode
from tests.cluster.evidence import SAME_SIZE, check_run, loss_of, standstill
from tests.cluster.here import LONG_HERE, STEPS_HERE, Here
from tests.cluster.runs import Row, running
from tests.faults import faulty_store
from tests.integration.test_bad_input import mounted

AT, DAY = 44, 86_400

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

Told = dict[str, Any]


@pytest.mark.fault("killed between upload and commit", "kill -9 of the whole job as it asks for COMMIT.json; the same command")
def test_killed_before_the_commit(here: Here, unbroken_here: list[Row], told: Told) -> None:
    before: list[int] = []  # steps whose commits were let through
    asked: list[int] = []  # the step whose commit was not

    def plan(method: str, path: str) -> str | None:
        found = re.search(r"/step-(\d+)/COMMIT\.json$", path)
        if method != "PUT" or found is None:
            return None
        if int(found[1]) < AT:
            before.append(int(found[1]))
            return None
        asked.append(int(found[1]))
        job.kill()  # before the request reaches the store
        return "reset"

    with faulty_store(here.endpoint) as (endpoint, store):
        values = here.config("uncommitted", endpoint=endpoint)
        store.plan = plan
        with running(here.start(values)) as job:
            job.process.wait(240)
            moment = job.moment()
    run = here.run(values)
    last = run.checkpoints.commits()[-1]
    assert last.step == before[-1] < asked[0], "the one before counts"
    assert run.checkpoints.directory.names(f"step-{asked[0]}"), "and what was uploaded lies there"
    with running(here.start(here.config("uncommitted"))) as again:
        again.ends_with(0)
    assert f"resuming at step {last.step}" in again.text()
    told |= loss_of(job, moment, run, again) | {"losses": check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)}


@pytest.mark.fault("disk full", "for 10 s; saves are skipped with an alarm, training goes on")
def test_disk_full(here: Here, told: Told, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64m") as disk:
        values = {**here.config("full", LONG_HERE), "storage": {"url": str(disk / "runs")}}
        with running(here.start(values, "pretrain.save.retry=1 second")) as job:
            job.at_step(AT)
            with (disk / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space left"):
                while True:
                    ballast.write(bytes(1 << 20))
                    ballast.flush()
            moment = job.moment()
            alarm = job.until_says("is not saved, training goes on", moment, seconds=60)
            (disk / "ballast").unlink()
            job.ends_with(0)
        assert "the disk is full" in job.text(moment)
        assert alarm.step < LONG_HERE
        run = here.run(values)
        told |= {"lost": 0, "losses": check_run(run, _longer(here), LONG_HERE, SAME_SIZE)}


@pytest.mark.timeout(1200)
@pytest.mark.fault("S3 answers 503 for ten minutes", "to every request; training goes on to its last step, whose save waits for the store")
def test_store_fails_for_long(here: Here, unbroken_here: list[Row], told: Told) -> None:
    with faulty_store(here.endpoint) as (endpoint, store):
        values = here.config("outage", endpoint=endpoint)
        with running(here.start(values, has_ray=False)) as job:
            moment = job.at_step(2 * AT)
            store.plan = lambda method, path: "error"
            time.sleep(600)
            after = job.moment()
            assert after.step == STEPS_HERE and job.process.poll() is None
            store.plan = lambda method, path: None
            job.ends_with(0)
    assert store.seen["error"] > 0 and "resuming" not in job.text()
    run = here.run(values)
    standing = standstill(run, moment, until=after.at)
    told |= {"lost": 0, "seconds": standing, "losses": check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)}
    assert standing < 5


def _longer(here: Here) -> list[Row]:
    """An undisturbed run that lasts as long as disks need to fill."""
    values = here.config("longer", LONG_HERE)
    with running(here.start(values, "pretrain.save.every=10 minutes")) as job:
        job.ends_with(0)
    return here.run(values).history()


@pytest.mark.parametrize("log", ["1 step", "10000 steps"], ids=["each step recorded", "none recorded"])
@pytest.mark.fault("a NaN", "weights that grow by half a step until the gradient overflows; exit 65; the commits before are sound")
def test_diverged(here: Here, told: Told, log: str) -> None:
    """Weight decay of 250 at a learning rate of 0.01 multiplies weights by -1.5 a step (decoupled, as AdamW's)."""
    values = here.config(f"diverged-{log.split()[0]}")
    values["pretrain"]["optimizer"] = {"lr": 0.01, "weight_decay": 250.0}
    with running(here.start(values, f"pretrain.log={log}", "pretrain.save.every=4 steps")) as job:
        job.ends_with(ExitCode.DIVERGED)
    run = here.run(values)
    steps = run.checkpoints.steps()
    assert steps and max(steps) < STEPS_HERE
    newest = newest_sound(run.checkpoints)
    assert newest is not None and newest.step == max(steps), "the newest one is whole"
    assert all(_is_finite(run, step) for step in steps)
    told |= {"losses": "not applicable"}


def _is_finite(run: Any, step: int) -> bool:
    import torch

    from pipeline.checkpoint import find_model

    _, weights = find_model(run.directory, step)
    return all(bool(torch.isfinite(w).all()) for w in weights.values())


@pytest.mark.fault("a zombie job", "SIGSTOP of a whole job; the same run elsewhere, to its end; SIGCONT: exit 103, nothing of its is used")
def test_zombie(here: Here, unbroken_here: list[Row], told: Told) -> None:
    values = here.config("zombie")
    with running(here.start(values)) as old:
        moment = old.at_step(AT)
        old.signal_all(signal.SIGSTOP)
        with running(here.start(values, machine="elsewhere")) as new:
            new.ends_with(0)
        run = here.run(values)
        before = [(c.step, c.attempt) for c in run.checkpoints.commits()]
        losses = check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)
        old.signal_all(signal.SIGCONT)
        old.ends_with(ExitCode.STOPPED, seconds=120)
    assert "another job" in old.text(moment) and "no longer saved" in old.text(moment)
    assert [(c.step, c.attempt) for c in run.checkpoints.commits()] == before
    assert check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE) == losses
    told |= {"losses": losses}


@pytest.mark.fault("clock skew of a day", "the files of half a run are dated a day ahead, or back, in turn; kill -9; the same command")
def test_dates_of_files(here: Here, unbroken_here: list[Row], told: Told, tmp_path: Path) -> None:
    """Nothing is decided by time: what a machine with a wrong clock wrote is neither preferred nor passed over."""
    values = {**here.config("dates"), "storage": {"url": str(tmp_path / "runs")}}
    with running(here.start(values)) as job:
        moment = job.at_step(AT)
        job.kill()
    now = time.time()
    for number, path in enumerate(sorted((tmp_path / "runs").rglob("*"))):
        off = now + (DAY if number % 2 else -DAY)
        os.utime(path, (off, off))
    run = here.run(values)
    newest = run.checkpoints.steps()[-1]
    with running(here.start(values)) as again:
        again.ends_with(0)
    assert f"resuming at step {newest}" in again.text()
    told |= loss_of(job, moment, run, again) | {"losses": check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)}
    shutil.rmtree(tmp_path / "runs")
