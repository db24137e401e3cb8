"""`launch/runs.py` on run directories as jobs leave them, on files and S3."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from launch.runs import find_status, main
from pipeline.checkpoint import Checkpoints, Run, claim_run
from pipeline.checkpoint.fragments import WEIGHT, Fragment
from pipeline.checkpoint.goodput import DIVERGED, FAILED, FINISHED, PREEMPTED, REGROUPED, Job, key_of
from pipeline.checkpoint.requests import Requests
from pipeline.config import parse_config
from pipeline.core.errors import ExitCode
from pipeline.core.storage import Storage
from tests.checkpoints import commit_fragments

ROOT = Path(__file__).parents[3]
NOW = 1_800_000_000.0


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def make_run(storage: Storage, name: str = "run", **changes: Any) -> Run:
    values = {
        "name": name, "storage": {"url": storage.url, "endpoint": storage.endpoint}, "tracking": {"uri": "http://m"}, "data": "/d",
        "pretrain": {"model": "vit_b16", "duration": "200 steps", "batch": 64, "micro_batch": 64},
    }  # fmt: skip
    return claim_run(parse_config({**values, **changes}))


def commit(run: Run, step: int) -> None:
    checkpoints = Checkpoints(run.directory)
    lease = checkpoints.newest_lease() or checkpoints.acquire()
    commit_fragments(checkpoints, lease, [Fragment(WEIGHT, "a", 0, torch.zeros(3))], step, {}, samples=64 * step)


def write_job(run: Run, generation: int, **values: Any) -> Job:
    given: dict[str, Any] = {
        "run": run.id, "generation": generation, "began": NOW - 200, "seconds": 190.0, "workers": 2, "gpus": 0, "starting": 20.0,
        "productive": 160.0, "waiting": 6.0, "saving": 4.0, "steps": 200, "first": 0, "step": 120, "commits": [(100, 130.0)],
    }  # fmt: skip
    job = Job(**{**given, **values})
    run.directory.write(key_of(generation), job.to_json())
    return job


@pytest.fixture
def died(store: Storage, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose first job died at step 120, and whose second has finished all of its 200 steps."""
    monkeypatch.setenv("TESSERA_OWNER", "ada")
    run = make_run(store)
    commit(run, 100)
    write_job(run, 1, price=1.8, currency="EUR")
    Checkpoints(run.directory).acquire()
    commit(run, 200)
    write_job(
        run, 2, began=NOW, seconds=120.0, productive=95.0, waiting=3.0, saving=2.0, first=100, origin=1, step=200, commits=[(200, 95.0)],
        end=FINISHED, workers=4, gpus=4, price=1.8, currency="EUR",
    )  # fmt: skip
    return run


def test_status(died: Run) -> None:
    url, endpoint = died.directory.url, died.directory.endpoint
    ended = call("status", url, *(["--endpoint", endpoint] if endpoint else []))
    assert ended.exit_code == 0, ended.output
    lines = ended.output.splitlines()
    assert lines[0] == f"run          {url}" and lines[1] == "name         run, of ada"
    assert lines[2].startswith("state        finished, ")
    assert (
        lines[3].startswith("job          2, ")
        and "; 4 GPU workers, began 2027-01-15 08:00:00 UTC, last seen 2027-01-15 08:02:00" in lines[3]
    )
    assert lines[4] == "checkpoint   step 200 of 200, 12.8k of 12.8k samples (100.0%)"
    assert lines[5] == (
        "goodput      70.3% of 5 min 20 s was training that counts; 2 jobs, 1 failure; 0.43 EUR, of which 0.32 EUR went into it"
    )
    table = {line[13:25].strip(): line[25:].split("  ") for line in lines[6:12]}
    assert list(table) == ["productive", "input wait", "save", "lost", "restart", "idle"]
    assert [cell.strip() for cell in table["lost"] if cell.strip()] == ["30.0 s", "9.4%", "0.03 EUR"]
    assert len(lines) == 12


def test_status_as_json(died: Run) -> None:
    died.directory.write("report/index.html", b"<html>")
    url, endpoint = died.directory.url, died.directory.endpoint
    found = json.loads(call("status", url, "--json", *(["--endpoint", endpoint] if endpoint else [])).output)
    assert (found["name"], found["owner"], found["id"], found["state"]) == ("run", "ada", died.id, "finished")
    assert (found["steps"], found["samples"], found["page"]) == (200, 12_800, f"{url}/report/index.html")
    assert (found["lease"]["generation"], found["job"]["workers"], found["job"]["last_seen"]) == (2, 4, NOW + 120)
    assert found["checkpoint"] == {"step": 200, "samples": 12_800, "generation": 2, "world_size": 1, "metrics": {}}
    goodput = found["goodput"]
    assert goodput["seconds"] == {"productive": 225.0, "input wait": 9.0, "save": 6.0, "lost": 30.0, "restart": 40.0, "idle": 10.0}
    assert (goodput["whole"], goodput["jobs"], goodput["failures"]) == (320.0, 2, 1)
    assert sum(goodput["cost"].values()) == pytest.approx((190 * 2 + 120 * 4) * 1.8 / 3600)


@pytest.mark.parametrize(
    ("values", "now", "state", "told"),
    [
        ({}, NOW + 5, "training", "training at step 120 of 200, 15.0 s ago"),
        ({"first": None, "step": 0, "commits": []}, NOW, "starting", "starting, 10.0 s ago"),
        ({}, NOW + 600, "silent", "silent: its last sign of life was 10 min 10 s ago, while training at step 120 of 200; it is dead, cut off, or"),
        ({}, NOW - 86_400, "training", "training at step 120 of 200, 0.0 s ago"),
        ({"end": PREEMPTED}, NOW, PREEMPTED, "asked to end; it saved, 10.0 s ago"),
        ({"end": REGROUPED}, NOW, REGROUPED, "saved, to go on with another group of workers, 10.0 s ago"),
        ({"end": FAILED, "reason": "peer gone"}, NOW, FAILED, "failed, 10.0 s ago: peer gone"),
        ({"end": DIVERGED, "reason": "loss is nan"}, NOW, DIVERGED, "diverged, 10.0 s ago: loss is nan"),
    ],
)  # fmt: skip
def test_states(tmp_path: Path, values: dict[str, Any], now: float, state: str, told: str) -> None:
    run = make_run(Storage(str(tmp_path)))
    assert (find_status(run.directory.url).state, find_status(run.directory.url).goodput) == ("waiting", None)
    assert "no job has begun to train it" in call("status", run.directory.url).output
    Checkpoints(run.directory).acquire()
    assert find_status(run.directory.url).state == "starting"
    write_job(run, 1, **values)
    found = find_status(run.directory.url, now=now)
    assert found.state == state and found.told.startswith(told)
    Checkpoints(run.directory).acquire()
    found = find_status(run.directory.url, now=now)
    assert found.state == "starting" and found.told.startswith("job 2 (") and found.told.endswith("told nothing yet")


def test_the_price_may_be_told_later(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)), cluster={"name": "local", "price": 7.2, "currency": "CHF"})
    Checkpoints(run.directory).acquire()
    write_job(run, 1)
    assert "0.76 CHF, of which 0.64 CHF went into it" in call("status", run.directory.url).output


def test_a_run_that_does_not_pre_train(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)), pretrain=None, evaluate={"model": "/m", "suites": [{"name": "a", "data": "/a"}]})
    output = call("status", run.directory.url).output
    assert "state        does not pre-train" in output and "checkpoint" not in output


def test_no_such_run(store: Storage) -> None:
    for command in ("status", "stop"):
        ended = call(command, f"{store.url}/none", *(["--endpoint", store.endpoint] if store.endpoint else []))
        assert ended.exit_code == ExitCode.NO_SUCH_RUN and f"run {store.url}/none: there is no run here" in ended.output


def test_list(died: Run, store: Storage) -> None:
    endpoint = ["--endpoint", store.endpoint] if store.endpoint else []
    broken = make_run(store, "broken")
    broken.directory.write("checkpoints/step-1/COMMIT.json", b'{"format": 2}')
    make_run(store, "new")
    store.write("mlflow.db", b"")
    store.write("data/shards/manifest.json", b"{}")
    ended = call("list", store.url, *endpoint)
    assert ended.exit_code == 0, ended.output
    rows = [line.split() for line in ended.output.splitlines()]
    assert rows[0] == ["name", "owner", "state", "step", "of", "goodput"]
    assert rows[1][0] == "broken" and rows[1][2] == "unreadable"
    assert rows[2] == ["new", "ada", "waiting", "-", "-", "-"]
    assert rows[3] == ["run", "ada", "finished", "200", "200", "70.3%"]
    assert ended.output.splitlines()[4].startswith("broken: checkpoint ") and "its format is 2" in ended.output
    objects = [json.loads(line) for line in call("list", store.url, "--json", *endpoint).output.splitlines()]
    assert [o["state"] for o in objects] == ["unreadable", "waiting", "finished"] and objects[2]["goodput"]["failures"] == 1


def test_list_of_nothing(store: Storage) -> None:
    ended = call("list", store.url, *(["--endpoint", store.endpoint] if store.endpoint else []))
    assert (ended.exit_code, ended.output) == (0, f"{store.url}: there are no runs here\n")


def test_stop_is_heard_by_the_job(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    event = threading.Event()
    with Requests(run.directory, {"stop": event}):
        ended = call("stop", run.directory.url)
        assert ended.exit_code == 0 and "its job has heard of it" in ended.output and event.is_set()


def test_stop_without_a_job_leaves_nothing_behind(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    ended = call("stop", run.directory.url, "--wait", "0.2")
    assert ended.exit_code == ExitCode.UNREACHABLE and "the request is taken back" in ended.output
    assert run.directory.names("requests") == []


def test_storage_that_cannot_be_reached(free_port: int, s3: tuple[str, Callable[[], str]]) -> None:
    began = time.monotonic()
    ended = call("status", "s3://nowhere/run", "--endpoint", f"http://127.0.0.1:{free_port}")
    assert ended.exit_code == ExitCode.PREFLIGHT and ended.output.startswith("error: storage s3://nowhere/run"), ended.output
    assert time.monotonic() - began < 60


def test_as_people_type_it(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "launch/runs.py", "status", run.directory.url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "no job has begun to train it" in done.stdout
    wrong = call("status")
    assert wrong.exit_code == ExitCode.USAGE
