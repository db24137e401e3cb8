"""Three faults that every change must survive: a rank that is killed, an upload that is cut, an MLflow server that goes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.evidence import SAME_SIZE, check_run, loss_of, standstill
from tests.cluster.here import Here
from tests.cluster.lab import MLFLOW, mlflow_command
from tests.cluster.runs import EVERY, Row, running
from tests.faults import faulty_store
from tests.integration.services import answers, free_ports, service

STEPS, AT = 60, 34  # steps of a run, and the step of a fault

pytestmark = pytest.mark.slow

Told = dict[str, Any]


@pytest.mark.fault("kill -9 of a rank", "one of two on one machine")
def test_rank_killed(here: Here, unbroken_here: list[Row], told: Told) -> None:
    values = here.config("rank", STEPS)
    with running(here.start(values)) as job:
        moment = job.at_step(AT)
        ranks = job.ranks()
        assert len(ranks) == 2
        ranks[-1].kill()
        job.ends_with(0)
    run = here.run(values)
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken_here, STEPS, SAME_SIZE)}


@pytest.mark.fault("upload cut in the middle", "once: it is tried again; then with kill -9 of the whole job; the same command")
def test_upload_cut(here: Here, unbroken_here: list[Row], told: Told) -> None:
    cut: list[int] = []  # the step whose upload is cut once
    is_killed = threading.Event()

    def plan(method: str, path: str) -> str | None:
        found = re.search(r"/step-(\d+)/.*\.safetensors$", path)
        if method != "PUT" or found is None:
            return None
        step = int(found[1])
        if step >= 2 * EVERY and not cut:
            cut.append(step)
            return "half"
        if cut and step > cut[0]:
            job.kill()  # while half of it is on its way
            is_killed.set()
            return "half"
        return None

    with faulty_store(here.endpoint) as (endpoint, store):
        values = here.config("cut", STEPS, endpoint=endpoint)
        store.plan = plan
        with running(here.start(values, has_ray=False)) as job:
            assert is_killed.wait(240), job.text()[-4000:]
            moment = job.moment()
            job.process.wait(60)
    run = here.run(values)
    steps = run.checkpoints.steps()
    assert steps[-1] == cut[0], "the first one was made good, of the second there is no commit"
    with running(here.start(here.config("cut", STEPS), has_ray=False)) as again:
        again.ends_with(0)
    assert f"resuming at step {steps[-1]}" in again.text()
    told |= loss_of(job, moment, run, again) | {"losses": check_run(run, unbroken_here, STEPS, SAME_SIZE)}


@pytest.mark.fault("MLflow down", "for the rest of the run; the same command once it is back")
def test_mlflow_down(here: Here, unbroken_here: list[Row], told: Told, tmp_path: Path) -> None:
    [port] = free_ports(1)
    url, command = f"http://127.0.0.1:{port}", mlflow_command("127.0.0.1", port, tmp_path)
    values = here.config("untold", STEPS, tracking=url)
    server = service(command, tmp_path / "log", lambda: answers(f"{url}/health"), MLFLOW)
    with server as session, running(here.start(values, has_ray=False)) as job:
        moment = job.at_step(AT)
        os.killpg(session, signal.SIGKILL)  # at once: asked to end it would take a second, in which training ends too
        down = time.time()
        job.ends_with(0)
    assert "does not answer" in job.text(moment)
    run = here.run(values)
    losses = check_run(run, unbroken_here, STEPS, SAME_SIZE)
    with service(command, tmp_path / "log", lambda: answers(f"{url}/health"), MLFLOW):
        with running(here.start(values, has_ray=False)) as again:
            again.ends_with(0)
        assert f"resuming at step {STEPS}" in again.text()
        records = run.records()
        assert [step for _, step in records] == list(range(1, STEPS + 1)), "every step, once and in order"
        assert records[-1][0] > down > records[0][0], "the server was gone while it trained"
        told |= {"lost": 0, "seconds": standstill(run, moment), "losses": losses}
    assert told["seconds"] < 2, "a step never waits for the server"
