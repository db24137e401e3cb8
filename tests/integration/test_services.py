"""The quickstart's config on real services: a Ray cluster that asks for a token, S3, an MLflow server over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint import Checkpoints, find_model
from pipeline.core.storage import Storage
from pipeline.stream import open_dataset
from tests.integration.services import ROOT, RayHead, start_head

pytestmark = pytest.mark.slow


def test_quickstart_on_a_cluster(
    ray_head: RayHead, s3: tuple[str, Callable[[], str]], mlflow_server: str, digits: Path, tmp_path: Path
) -> None:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    arguments = [
        "configs/quickstart.yaml", f"storage={{url: {bucket}/runs, endpoint: '{endpoint}'}}", f"tracking.uri={mlflow_server}", f"shard.source.url={digits}",
        "pretrain.duration=40 steps", "pretrain.schedule.warmup=10 steps", "pretrain.save.every=20 steps", "pretrain.validate.every=20 steps", "evaluate.fine_tune.steps=4", "evaluate.seeds=2",
    ]  # fmt: skip
    env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": ray_head.token}
    command = [sys.executable, "launch/submit.py", *arguments, "--address", ray_head.address]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    print(done.stdout, done.stderr)  # the log, for whoever runs with -s
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "digits/supervised" in done.stdout and "ran in" in done.stdout, "the job's log is followed to its end"

    run = Storage(f"{bucket}/runs/quickstart", endpoint)
    assert len(open_dataset(f"{run.url}/shards", "train", endpoint)) + len(open_dataset(f"{run.url}/shards", "test", endpoint)) == 1797
    assert Checkpoints(run).steps() == [20, 40]
    assert find_model(run)[0].step == 40
    scores = {name: json.loads(run.read(f"evaluation/{name}"))["value"] for name in run.names("evaluation")}
    assert len(scores) == 7 and all(0 <= v <= 1 for v in scores.values())
    assert b"<html" in run.read("report/index.html")
    _check_tracking(mlflow_server, scores["digits-supervised.json"])

    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "finished already" in again.stdout, "the same command again finds everything done"
    assert Checkpoints(run).steps() == [20, 40]


def _check_tracking(uri: str, supervised: float) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tessera")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"quickstart", "quickstart/shard", "quickstart/pretrain", "quickstart/evaluate"}
    assert all(r.info.status == "FINISHED" for r in runs.values())
    parent = runs["quickstart"]
    for name, run in runs.items():
        assert name == "quickstart" or run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    trained = runs["quickstart/pretrain"].data.metrics
    assert {
        "train/loss",
        "train/images_per_s",
        "train/tflops_per_s",
        "train/grad_norm",
        "train/lr",
        "validate/loss",
        "validate/top1",
    } <= set(trained)
    steps = [m.step for m in client.get_metric_history(runs["quickstart/pretrain"].info.run_id, "train/loss")]
    assert steps == [1, 10, 20, 30, 40]
    assert runs["quickstart/shard"].data.metrics["shard/written"] == 1797
    assert parent.data.metrics["evaluate/digits/supervised/top1"] == supervised
    assert runs["quickstart/evaluate"].data.metrics["evaluate/digits/supervised/top1"] == supervised
    assert parent.data.params["pretrain.batch"] == "128" and len(parent.data.params["dataset.hash"]) == 64
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"config.yaml", "report"}
    assert [a.path for a in client.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]


def test_head_that_takes_no_jobs(tmp_path: Path) -> None:
    """Its agent's port is taken, as by another cluster's on the same machine."""
    run = """
import sys, launch.cluster
from launch.submit import main
launch.cluster._READY_WITHIN = 1
main()
"""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with start_head(agent=taken.getsockname()[1]) as head:
            env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": head.token}
            command = [
                sys.executable,
                "-c",
                run,
                "configs/quickstart.yaml",
                f"storage={tmp_path}",
                "tracking.uri=null",
                "--address",
                head.address,
            ]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "agent, which takes jobs, has not come up" in done.stderr and "Traceback" not in done.stderr
