"""The goodput ledger of real training: a run of two ranks, a second job that repeats its last steps, and one that diverges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from workshop import STEPS, Workshop

from launch.runs import main
from pipeline.checkpoint import read_history
from pipeline.checkpoint.goodput import DIVERGED, FINISHED, Job, read_jobs, summarise
from pipeline.core.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("goodput")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    return Workshop(root)


@pytest.fixture(scope="module")
def jobs(shop: Workshop) -> list[Job]:
    """Of one run: two ranks train it, its last checkpoint goes, and one rank trains the last steps again."""
    words = [str(shop.root / "config.yaml"), "name=twice", f"tracking.uri=sqlite:///{shop.root}/mlflow.db", "cluster.price=3600"]
    shop.start(2, ["-m", "pipeline.train.worker", *words])
    shutil.rmtree(shop.root / "runs" / "twice" / "checkpoints" / "step-6")
    shop.start(1, ["-m", "pipeline.train.worker", *words, "pretrain.save.every=auto"])
    return read_jobs(shop.directory("twice"))


def test_both_jobs_tell_what_they_did(jobs: list[Job]) -> None:
    first, second = jobs
    assert [(j.generation, j.workers, j.first, j.origin, j.step, j.steps, j.end) for j in jobs] == [
        (1, 2, 0, None, STEPS, STEPS, FINISHED),
        (2, 1, 3, 1, STEPS, STEPS, FINISHED),
    ]
    assert [step for step, _ in first.commits] == [3, 6] and [step for step, _ in second.commits] == [6]
    for job in jobs:
        assert min(job.starting, job.productive, job.waiting, job.saving) > 0
        assert job.starting + job.productive + job.waiting + job.saving == pytest.approx(job.seconds, abs=1e-6)
    assert first.last_seen < second.began


def test_the_repeated_steps_are_lost(jobs: list[Job]) -> None:
    first, second = jobs
    found = summarise(jobs)
    kept = dict(first.commits)[3]
    assert found.seconds["productive"] == pytest.approx(kept + second.productive)
    assert found.seconds["lost"] == pytest.approx(first.productive - kept) and 0 < kept < first.productive
    assert found.whole == pytest.approx(second.last_seen - first.began, abs=1e-3) and found.failures == 0
    assert found.cost is not None, "3600 an hour are 1 a second"
    assert sum(found.cost.values()) == pytest.approx(2 * first.seconds + second.seconds)


def test_mlflow_has_the_sums_at_each_commit(shop: Workshop, jobs: list[Job]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{shop.root}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("tessera").experiment_id], "tags.`mlflow.runName` = 'twice/pretrain'")
    sent = {
        name: [(m.step, m.value) for m in sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.timestamp)]
        for name in ("goodput/fraction", "goodput/productive_s", "goodput/lost_s", "goodput/jobs", "goodput/cost")
    }
    assert {tuple(step for step, _ in values) for values in sent.values()} == {(3, 6, 6)}
    assert [value for _, value in sent["goodput/jobs"]] == [1, 1, 2]
    found = summarise(jobs)
    assert sent["goodput/lost_s"][-1][1] == pytest.approx(found.seconds["lost"])
    assert sent["goodput/productive_s"][-1][1] == pytest.approx(found.seconds["productive"], rel=0.2), "the end was near"
    assert 0 < sent["goodput/fraction"][-1][1] < 1


def test_status_tells_it(shop: Workshop, jobs: list[Job]) -> None:
    ended = CliRunner().invoke(main, ["status", shop.directory("twice").url, "--json"])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.output)
    assert (found["state"], found["steps"], found["samples"]) == ("finished", STEPS, STEPS * 20)
    assert (found["checkpoint"]["step"], found["checkpoint"]["generation"]) == (STEPS, 2)
    assert found["goodput"]["seconds"] == summarise(jobs).seconds


def test_a_run_that_diverged_says_so(shop: Workshop) -> None:
    [error] = shop.train(1, [shop.job("diverged", "pretrain.optimizer={name: sgd, lr: 1e+30}")])
    assert error is not None and error[0] == "Diverged"
    [job] = read_jobs(shop.directory("diverged"))
    assert job.end == DIVERGED and job.reason == error[1] and 0 < job.step < STEPS
    assert summarise([job]).failures == 0 and summarise([job]).seconds["lost"] > 0


def test_waiting_for_data_is_what_each_step_recorded(shop: Workshop) -> None:
    assert shop.train(1, [shop.job("inline", "pretrain.loader.workers=0", "pretrain.duration=20 steps")]) == [None]
    [job] = read_jobs(shop.directory("inline"))
    rows = [row for row in read_history(shop.directory("inline")) if "train/loss" in row]
    waited = sum(20 / row["train/images_per_s"] * row["train/data_wait_fraction"] for row in rows)
    assert len(rows) == 20 and job.waiting == pytest.approx(waited, rel=1e-6)
