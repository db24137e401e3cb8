from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.progress import Event, set_sink
from pipeline.core.tracking import KEY_TAG, Tracker, redact


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite file for the tests that need no server: to make it takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def said() -> Iterator[list[Event]]:
    events: list[Event] = []
    set_sink(events.append)
    yield events
    set_sink(None)


def runs(uri: str, experiment: str) -> dict[str, Any]:
    """The experiment's runs by key."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    keys = [r.data.tags[KEY_TAG] for r in found]
    assert len(set(keys)) == len(keys), "one MLflow run a key"
    return dict(zip(keys, found, strict=True))


def history(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run.info.run_id, name)]


def test_everything_arrives(uri: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracker = Tracker(uri, "all", "id", "my-run", tmp_path / "spool", artifacts=str(tmp_path / "artifacts"))
    tracker.params({"pretrain.batch": 256, "long": "x" * 9000, **{f"p{n}": n for n in range(150)}})
    tracker.tags({"dataset.hash": "abc"})
    for step in range(3):
        tracker.metrics({"train/loss": 2.5 - step, "lr": 0.1}, step=step)
    tracker.artifact("report", "index.html", b"<p>")
    tracker.artifact("", "config.yaml", b"name: x")
    assert tracker.close()
    assert list((tmp_path / "spool").iterdir()) == []  # nothing is left to send

    run = runs(uri, "all")["id"]
    assert run.info.status == "FINISHED" and run.info.run_name == "my-run"
    assert run.data.params["pretrain.batch"] == "256" and len(run.data.params) == 152 and len(run.data.params["long"]) == 6000
    assert run.data.tags["dataset.hash"] == "abc" and run.data.metrics == {"train/loss": 0.5, "lr": 0.1}
    assert history(uri, run, "train/loss") == [(0, 2.5), (1, 1.5), (2, 0.5)]
    client = MlflowClient(uri)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"report", "config.yaml"}
    assert Path(client.download_artifacts(run.info.run_id, "report/index.html", str(tmp_path))).read_bytes() == b"<p>"


def test_the_same_key_is_the_same_run(uri: str, tmp_path: Path) -> None:
    for step, status in enumerate(("FAILED", "FINISHED")):
        tracker = Tracker(uri, "same", "id", "name", tmp_path)
        tracker.params({"batch": 256 + step, f"only{step}": step})
        tracker.metrics({"loss": step}, step=step)
        assert tracker.close(status)
    run = runs(uri, "same")["id"]
    assert run.info.status == "FINISHED" and history(uri, run, "loss") == [(0, 0), (1, 1)]
    assert run.data.params == {"batch": "256", "only0": "0", "only1": "1"}  # what is there never changes


def test_a_stage_is_nested_in_its_run(uri: str, tmp_path: Path) -> None:
    """Even where the stage is first: then the run is made for it, and still gets its own parameters."""
    stage = Tracker(uri, "nested", "id/pretrain", "name/pretrain", tmp_path, parent="id")
    stage.metrics({"loss": 1.0})
    assert stage.close()
    tracker = Tracker(uri, "nested", "id", "name", tmp_path)
    tracker.params({"batch": 256})
    assert tracker.close()
    found = runs(uri, "nested")
    assert set(found) == {"id", "id/pretrain"}
    assert found["id/pretrain"].data.tags["mlflow.parentRunId"] == found["id"].info.run_id
    assert found["id"].data.params == {"batch": "256"} and "mlflow.parentRunId" not in found["id"].data.tags


def test_a_cut_line_loses_itself_alone(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "cut", "id", "name", tmp_path)
    records = tracker.directory / "records.jsonl"
    tracker._closing.set()
    tracker._wake.set()
    tracker._sender.join()
    tracker._lock.close()  # as the kernel does for a process that was killed
    line = json.dumps({"kind": "metrics", "time": 1, "values": {"loss": 1.0}, "step": 1}) + "\n"
    records.write_text(line + line[:40])
    tracker = Tracker(uri, "cut", "id", "name", tmp_path)
    tracker.metrics({"loss": 2.0}, step=2)
    assert tracker.close()
    assert history(uri, runs(uri, "cut")["id"], "loss") == [(1, 1.0), (2, 2.0)]


def test_more_metrics_than_a_request_takes(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "many", "id", "my-run", tmp_path / "spool", artifacts=str(tmp_path / "artifacts"))
    tracker.metrics({f"layers/{n}/grad_norm": float(n) for n in range(2100)}, step=7)
    assert tracker.close()
    assert len(runs(uri, "many")["id"].data.metrics) == 2100
    assert history(uri, runs(uri, "many")["id"], "layers/2099/grad_norm") == [(7, 2099.0)]


def test_redact() -> None:
    assert redact("https://me:secret@mlflow:5000/x") == "https://***@mlflow:5000/x" and redact("sqlite:///a/b@c.db") == "sqlite:///a/b@c.db"


@pytest.mark.usefixtures("s3")  # whatever keys the environment has, the server keeps its artifacts in files
def test_a_server_that_is_down_and_comes_back(free_port: int, tmp_path: Path, said: list[Event]) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port}"
    began = time.monotonic()
    tracker = Tracker(uri, "down", "id", "name", tmp_path / "spool")
    assert time.monotonic() - began < 1  # nobody waits for the server
    tracker.params({"batch": 256})
    for step in range(5):
        tracker.metrics({"loss": float(step)}, step=step)
    tracker.artifact("report", "x.txt", b"kept")
    began = time.monotonic()
    assert not tracker.close("FAILED")
    assert time.monotonic() - began < 20
    assert len([e for e in said if "does not answer" in e.text]) == 1 and len([e for e in said if "not everything was sent" in e.text]) == 1
    assert "secret" not in "".join(e.text for e in said)
    tracker._sender.join(2)
    assert not tracker._sender.is_alive()  # a next tracker has the spool for itself
    kept = [json.loads(line) for line in (tracker.directory / "records.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in kept] == ["params", *["metrics"] * 5, "artifact", "end"]

    command = [
        str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(free_port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        _wait_for(free_port, server, tmp_path / "log")
        tracker = Tracker(uri, "down", "id", "name", tmp_path / "spool")
        tracker.metrics({"loss": 9.0}, step=9)
        assert tracker.close(timeout=60)
        run = runs(uri, "down")["id"]
        assert history(uri, run, "loss") == [*[(n, float(n)) for n in range(5)], (9, 9.0)]
        assert run.data.params == {"batch": "256"} and run.info.status == "FINISHED"
        assert (tmp_path / "artifacts").exists() and [p.read_bytes() for p in (tmp_path / "artifacts").rglob("x.txt")] == [b"kept"]
        assert list((tmp_path / "spool").iterdir()) == []
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.tracking._WAIT_FOR_LOCK", 0.3)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = Tracker(uri, "e", "key", "name", tmp_path / "spool")
    with pytest.raises(StorageError, match="is this run running twice"):
        Tracker(uri, "e", "key", "name", tmp_path / "spool")
    first.close()
    assert Tracker(uri, "e", "key", "name", tmp_path / "spool").close(), "free again"


def test_a_record_costs_training_next_to_nothing(free_port: int, tmp_path: Path) -> None:
    """Whatever the server does, while nobody is there, and while one hangs that takes connections and never answers."""
    hanging = socket.create_server(("127.0.0.1", 0))
    for port in (free_port, hanging.getsockname()[1]):
        tracker = Tracker(f"http://127.0.0.1:{port}", "tessera", f"key-{port}", "tiny", tmp_path / "spool")
        seconds = []
        for step in range(300):
            began = time.perf_counter()
            tracker.metrics({f"train/metric-{n}": 0.1 * n for n in range(10)}, step=step)
            seconds.append(time.perf_counter() - began)
            time.sleep(0.002)
        tracker.close(timeout=0.1)
        assert sorted(seconds)[len(seconds) // 2] < 1e-3 and sum(seconds) / len(seconds) < 1e-3
    hanging.close()
