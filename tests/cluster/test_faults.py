"""Machines, processes and networks that fail under a pre-training on three hosts."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ExitCode
from tests.cluster.conftest import LONG
from tests.cluster.evidence import ANY_SIZE, SAME_SIZE, check_run, loss_of, standstill
from tests.cluster.here import STEPS_HERE, Here
from tests.cluster.lab import DRIVER, HEAD, Lab
from tests.cluster.runs import EVERY, RANK, Row, resumed_at, running
from tests.faults import faulty_store

STEPS, AT = 180, 64  # steps of a run, and the step of a fault
OUTAGE = 60.0  # seconds

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

Told = dict[str, Any]


@pytest.mark.fault("kill -9 of a rank", "the training process on one of three hosts")
def test_rank_killed(lab: Lab, unbroken: list[Row], told: Told) -> None:
    job = lab.submit(lab.config("rank", STEPS))
    moment = job.at_step(AT)
    assert lab.hosts["h2"].kill(RANK) == 1
    job.ends_with(0)
    assert job.text(moment).count("starting 3 workers") == 1
    run = lab.run("rank")
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken, STEPS, SAME_SIZE)}


@pytest.mark.fault("kill -9 of a raylet", "on one of three hosts; two go on; the host comes back, and three go on")
def test_raylet_killed(lab: Lab, unbroken: list[Row], told: Told) -> None:
    job = lab.submit(lab.config("raylet", LONG))
    moment = job.at_step(AT)
    assert lab.hosts["h3"].kill("raylet/raylet") == 1
    smaller = job.until_says("starting 2 workers", moment)
    job.until_says("resuming at step", smaller)
    lab.hosts["h3"].kill()
    lab.start_node("h3")
    grown = job.until_says("starting 3 workers", smaller)
    job.ends_with(0)
    assert "more machines have come" in job.text(smaller)
    run = lab.run("raylet")
    assert {commit.world_size for commit in run.checkpoints.commits()} == {3}
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken, LONG, ANY_SIZE)}
    told["seconds"] = standstill(run, moment, until=grown.at)


@pytest.mark.fault("kill -9 of the head", "everything on it: Ray's head, the job's own process, a rank; a new cluster; the same command")
def test_head_killed(lab: Lab, unbroken: list[Row], told: Told) -> None:
    values = lab.config("head", STEPS)
    job = lab.submit(values)
    moment = job.at_step(AT)
    lab.hosts[HEAD].kill()
    job.process.send_signal(signal.SIGINT)
    job.ends_with(ExitCode.NOT_FINISHED)
    lab.start()
    again = lab.submit(values)
    again.ends_with(0)
    assert "going on with the run" in again.text()
    run = lab.run("head")
    told |= loss_of(job, moment, run, again) | {"losses": check_run(run, unbroken, STEPS, SAME_SIZE)}


@pytest.mark.fault("a host cut off", "its cable is pulled; two go on; 45 s later it is back, restarted as Ray asks, and three go on")
def test_host_cut_off(lab: Lab, unbroken: list[Row], told: Told) -> None:
    job = lab.submit(lab.config("cut", LONG))
    moment = job.at_step(AT)
    lab.hosts["h2"].cut()
    smaller = job.until_says("starting 2 workers", moment)
    time.sleep(max(0.0, moment.at + 45 - time.time()))
    lab.hosts["h2"].mend()
    # A raylet that learns that the others gave it up ends, and its rank with it.
    job.until(lambda: not lab.hosts["h2"].processes("raylet/raylet"), "end of the old raylet")
    lab.hosts["h2"].kill()
    lab.start_node("h2")
    grown = job.until_says("starting 3 workers", smaller)
    job.ends_with(0)
    run = lab.run("cut")
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken, LONG, ANY_SIZE)}
    told["seconds"] = standstill(run, moment, until=grown.at)


@pytest.mark.fault("preemption notice", "Ray is told that a host goes in 60 s; all is saved at once, and two go on elsewhere")
def test_notice(lab: Lab, unbroken: list[Row], told: Told) -> None:
    job = lab.submit(lab.config("notice", STEPS), "pretrain.save.every=10 minutes")
    job.at_step(AT)
    lab.drain("h3", 60)
    moment = job.until_says("a machine is about to be taken back")
    smaller = job.until_says("starting 2 workers", moment)
    assert smaller.at - moment.at < 60, "in time"
    lab.hosts["h3"].kill()
    job.ends_with(0)
    assert "warning: a worker failed" not in job.text(), "no failure"
    run = lab.run("notice")
    [done] = {step for _, step in run.records("train/save_s")} - {STEPS}
    assert sorted(step for _, step in run.records()) == list(range(1, STEPS + 1)), "no step is done twice"
    told |= {"lost": 0, "seconds": standstill(run, moment), "losses": check_run(run, unbroken, STEPS, ANY_SIZE)}
    assert done >= moment.step


@pytest.mark.fault("S3 answers 503 for a minute", "to every request; training goes on, the save is tried again")
def test_store_fails(lab: Lab, unbroken: list[Row], told: Told) -> None:
    with faulty_store(lab.endpoint, lab.net.address) as (endpoint, store):
        job = lab.submit(lab.config("outage", LONG, endpoint))
        moment = job.at_step(AT)
        store.plan = lambda method, path: "error"
        time.sleep(OUTAGE)
        after = job.moment()
        store.plan = lambda method, path: None
        job.ends_with(0)
    assert store.seen["error"] > 0
    assert after.step > moment.step + 3 * EVERY, "training went on"
    assert "trying again" in job.text(moment) and "resuming" not in job.text()
    run = lab.run("outage")
    told |= {"lost": 0, "seconds": standstill(run, moment, until=after.at), "losses": check_run(run, unbroken, LONG, SAME_SIZE)}
    assert told["seconds"] < 5


@pytest.mark.fault("SIGTERM", "to the job's own process; exit 34; the same command")
def test_sigterm(lab: Lab, unbroken: list[Row], told: Told) -> None:
    values = lab.config("sigterm", STEPS)
    job = lab.submit(values, "pretrain.save.every=10 minutes")
    moment = job.at_step(AT)
    [driver] = [p for p in lab.hosts[HEAD].processes(DRIVER) if p.name().startswith("python")]
    driver.send_signal(signal.SIGTERM)
    job.ends_with(ExitCode.PREEMPTED, seconds=60)
    run = lab.run("sigterm")
    saved = run.checkpoints.steps()[-1]
    assert saved >= moment.step
    assert f"all is saved at step {saved}" in job.text(moment)
    again = lab.submit(values, "pretrain.save.every=10 minutes")
    again.ends_with(0)
    assert f"resuming at step {saved}" in again.text()
    told |= {"lost": 0, "seconds": standstill(run, moment), "losses": check_run(run, unbroken, STEPS, SAME_SIZE)}
    assert sorted(step for _, step in run.records()) == list(range(1, STEPS + 1)), "no step is done twice"


@pytest.mark.fault("SIGSTOP of a rank", "for 10 s, then SIGCONT: it goes on")
def test_rank_stopped(lab: Lab, unbroken: list[Row], told: Told) -> None:
    job = lab.submit(lab.config("stopped", STEPS))
    moment = job.at_step(AT)
    assert lab.hosts["h3"].signal(signal.SIGSTOP, RANK) == 1
    time.sleep(10)
    assert job.step() <= moment.step + 2, "all wait for it"
    lab.hosts["h3"].signal(signal.SIGCONT, RANK)
    job.ends_with(0)
    assert "resuming" not in job.text()
    run = lab.run("stopped")
    told |= {"lost": 0, "seconds": standstill(run, moment), "losses": check_run(run, unbroken, STEPS, SAME_SIZE)}


@pytest.mark.fault(
    "SIGSTOP of a rank for good",
    "one of two on one machine: it is named, its stack kept, it does not answer for 60 s, and a new group goes on",
)
def test_rank_stopped_for_good(here: Here, unbroken_here: list[Row], told: Told) -> None:
    values = here.config("stopped")
    with running(here.start(values)) as job:
        moment = job.at_step(AT)
        job.ranks()[-1].suspend()
        job.until_says("is stopped and has not run for", moment)
        found = job.until_says("starting 2 workers", moment)
        assert found.at - moment.at < 120
        job.ends_with(0)
    run = here.run(values)
    stacks = {name: run.directory.read(f"stacks/{name}").decode() for name in run.directory.names("stacks")}
    assert len(stacks) == 2 and sum("T (stopped)" in text for text in stacks.values()) == 1
    assert all("loop.py" in text for text in stacks.values()), "of the one that is stopped too"
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)}


@pytest.mark.fault("clock skew of a day", "a host's wall clock is a day ahead; a rank on another is killed")
def test_clock_ahead(lab: Lab, unbroken: list[Row], told: Told) -> None:
    lab.hosts["h3"].kill()
    lab.start_node("h3", LD_PRELOAD=_wrong_clock(lab.folder), CLOCK_OFFSET="86400")
    lab.wait_for_nodes()
    job = lab.submit(lab.config("clock", STEPS))
    moment = job.at_step(AT)
    [ahead] = lab.hosts["h3"].processes(RANK)
    assert "clock.so" in Path(f"/proc/{ahead.pid}/maps").read_text(), "its clock is wrong"
    assert lab.hosts["h2"].kill(RANK) == 1
    job.ends_with(0)
    lost = moment.step - resumed_at(job.text(moment))[0]
    assert 0 <= lost < 2 * EVERY
    told |= {"lost": lost, "losses": check_run(lab.run("clock"), unbroken, STEPS, SAME_SIZE)}


def _wrong_clock(folder: Path) -> str:
    """The library that makes a clock wrong, compiled."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    made = folder / "clock.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", made, Path(__file__).with_name("clock.c"), "-ldl"], check=True)
    return str(made)
