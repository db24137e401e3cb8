"""kill -9 of the whole job, and the same command again: the curve goes on as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.checkpoint import Checkpoints, read_history
from pipeline.core.storage import Storage
from tests.integration.services import BIN, ROOT

STEPS = 60

pytestmark = pytest.mark.alone


def _arguments(storage: Path, digits: Path) -> list[str]:
    return [
        "configs/quickstart.yaml", f"storage={storage}", f"shard.source.url={digits}", f"pretrain.duration={STEPS} steps", "pretrain.save.every=10 steps",
        "pretrain.schedule.warmup=10 steps",
        "pretrain.log=1 steps", "pretrain.validate.every=20 steps", "pretrain.model.dropout=0.1", "evaluate=null",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The storage of a run that nobody disturbed."""
    storage = tmp_path_factory.mktemp("unbroken")
    done = subprocess.run(
        [sys.executable, "launch/submit.py", *_arguments(storage, digits)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return storage


def _losses(storage: Path) -> dict[int, float]:
    history = read_history(Storage(str(storage / "quickstart")))
    rows = [(int(r["step"]), r["train/loss"]) for r in history if "train/loss" in r]
    assert [step for step, _ in rows] == list(range(1, STEPS + 1)), "every step once"
    return dict(rows)


def _tree(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    yield from process.children(recursive=True)


def test_kill_everything_and_type_it_again(unbroken: Path, tmp_path: Path, digits: Path) -> None:
    command = [sys.executable, "launch/submit.py", *_arguments(tmp_path, digits)]
    checkpoints = Checkpoints(Storage(str(tmp_path / "quickstart")))
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (steps := checkpoints.steps()) or steps[-1] < 20:
        assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()[-3000:] if job.stderr else ""
        time.sleep(0.05)
    for process in list(_tree(psutil.Process(job.pid))):
        process.kill()
    job.wait()
    killed_at = checkpoints.steps()[-1]
    assert killed_at < STEPS, "it was killed before its end"

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming at step {killed_at}" in again.stderr

    whole, resumed = _losses(unbroken), _losses(tmp_path)
    print("step  unbroken            killed and resumed")
    for step in range(killed_at - 2, STEPS + 1):
        print(f"{step:>4}  {whole[step]!r:<18}  {resumed[step]!r:<18}")
    assert resumed == whole, "bit for bit"
    _check_tracking(tmp_path, whole)


def _check_tracking(storage: Path, losses: dict[int, float]) -> None:
    """One MLflow run a stage over both lives of the job, with every step in it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("tessera").experiment_id])}
    assert sorted(runs) == ["quickstart", "quickstart/pretrain", "quickstart/shard"]
    history = client.get_metric_history(runs["quickstart/pretrain"].info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == losses


def test_a_killed_worker_is_restarted(unbroken: Path, tmp_path: Path, digits: Path) -> None:
    command = [sys.executable, "launch/submit.py", *_arguments(tmp_path, digits)]
    checkpoints = Checkpoints(Storage(str(tmp_path / "quickstart")))
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not checkpoints.steps():
        assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()[-3000:] if job.stderr else ""
        time.sleep(0.05)
    workers = [p for p in _tree(psutil.Process(job.pid)) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[-1].kill()
    _, log = job.communicate(timeout=300)
    assert job.returncode == 0, log[-3000:]
    assert "resuming at step" in log
    assert _losses(tmp_path) == _losses(unbroken), "bit for bit"


def test_without_ray(unbroken: Path, tmp_path: Path, digits: Path) -> None:
    """torchrun trains from the same shards, to the same losses."""
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "shards").symlink_to(unbroken / "quickstart" / "shards")
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline.train.worker", *_arguments(tmp_path, digits)]
    env = {**os.environ, "PYTHONPATH": str(_hide_ray(tmp_path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _losses(tmp_path) == _losses(unbroken)


def _hide_ray(folder: Path) -> Path:
    """A directory for PYTHONPATH in which `import ray` fails, as on a machine that has none."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "ray.py").write_text("raise ImportError('this machine has no Ray')\n")
    return blocked
