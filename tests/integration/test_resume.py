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

STEPS = 40

pytestmark = pytest.mark.chaos  # a second look, through the quickstart, at what tests/cluster does to smaller runs


def _arguments(storage: Path, digits: Path) -> list[str]:
    return [
        "configs/quickstart.yaml", f"storage={storage}", f"shard.source.url={digits}", f"pretrain.duration={STEPS} steps", "pretrain.save.every=10 steps",
        "pretrain.schedule.warmup=10 steps",
        "pretrain.log=1 steps", "pretrain.validate.every=20 steps", "pretrain.model.dropout=0.1", "evaluate=null",
    ]  # fmt: skip


def _tree(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    yield from process.children(recursive=True)


def _await_step(job: subprocess.Popen[str], checkpoints: Checkpoints, step: int, log: Path) -> None:
    """Wait until `step` or a later one is committed."""
    deadline = time.monotonic() + 240
    while not (steps := checkpoints.steps()) or steps[-1] < step:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, int, str]:
    """(storage, step of the last commit before the end, what the second command said): a run that was killed and begun again."""
    storage = tmp_path_factory.mktemp("broken")
    command, log = [sys.executable, "launch/submit.py", *_arguments(storage, digits)], storage / "log"
    checkpoints = Checkpoints(Storage(str(storage / "quickstart")))
    with log.open("w") as out:
        job = subprocess.Popen(command, cwd=ROOT, stderr=out, text=True)
    _await_step(job, checkpoints, 10, log)
    for process in list(_tree(psutil.Process(job.pid))):
        process.kill()
    job.wait()
    killed_at = checkpoints.steps()[-1]
    assert killed_at < STEPS, "it was killed before its end"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    return storage, killed_at, again.stderr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits: Path, broken: tuple[Path, int, str]) -> Path:
    """The storage of a run that nobody disturbed: by torchrun, on a machine that has no Ray, from the same shards."""
    storage = tmp_path_factory.mktemp("unbroken")
    (storage / "quickstart").mkdir()
    (storage / "quickstart" / "shards").symlink_to(broken[0] / "quickstart" / "shards")
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline.train.worker", *_arguments(storage, digits)]
    env = {**os.environ, "PYTHONPATH": str(_hide_ray(storage)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return storage


def _hide_ray(folder: Path) -> Path:
    """A directory for PYTHONPATH in which `import ray` fails, as on a machine that has none."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "ray.py").write_text("raise ImportError('this machine has no Ray')\n")
    return blocked


def _losses(storage: Path) -> dict[int, float]:
    history = read_history(Storage(str(storage / "quickstart")))
    rows = [(int(r["step"]), r["train/loss"]) for r in history if "train/loss" in r]
    assert [step for step, _ in rows] == list(range(1, STEPS + 1)), "every step once"
    return dict(rows)


def test_killed_and_typed_again(broken: tuple[Path, int, str], unbroken: Path) -> None:
    storage, killed_at, said = broken
    assert f"resuming at step {killed_at}" in said
    whole, resumed = _losses(unbroken), _losses(storage)
    print("step  unbroken            killed and resumed")
    for step in range(killed_at - 2, STEPS + 1):
        print(f"{step:>4}  {whole[step]!r:<18}  {resumed[step]!r:<18}")
    assert resumed == whole, "bit for bit, with Ray and without"


def test_it_is_one_run_in_mlflow(broken: tuple[Path, int, str]) -> None:
    """One MLflow run a stage over all lives of the job, with every step in it."""
    from mlflow.tracking import MlflowClient

    storage = broken[0]
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("tessera").experiment_id])}
    assert sorted(runs) == ["quickstart", "quickstart/pretrain", "quickstart/shard"]
    history = client.get_metric_history(runs["quickstart/pretrain"].info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == _losses(storage)
