"""What is looked at before a training starts or goes on: checkpoints are read where that decides something, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import Checkpoints, Commit, ModelCard, Run, claim_run
from pipeline.checkpoint.commit import COMMIT
from pipeline.config import Config, parse_config
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.storage import Storage
from pipeline.preflight import check_resources, open_data
from pipeline.stages import _Stages
from tests.checkpoints import commit_model

STEPS = 5  # an epoch: 50 samples, 10 a step
VIT = {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}


@pytest.fixture
def config(tmp_path: Path, make_dataset: Callable[..., Any]) -> Config:
    """Of a run whose training cannot start: the cluster has no such GPUs."""
    make_dataset(Storage(str(tmp_path / "data")), {"train": 50})
    pretrain = {"model": VIT, "image": {"pixels": 8}, "batch": 10, "micro_batch": 5, "duration": "1 epoch", "precision": "fp32"}
    cluster = {"name": "local", "gpus": 8}
    return parse_config(
        {"name": "a", "storage": str(tmp_path / "runs"), "cluster": cluster, "data": str(tmp_path / "data"), "pretrain": pretrain}
    )


def trained(run: Run, step: int) -> Commit:
    values = {"objective": "classify", "mean": (0.5,) * 3, "std": (0.5,) * 3, "dataset": "hash", "run": run.id, "step": step}
    options = {key: value for key, value in VIT.items() if key != "name"}
    card = ModelCard(model="vit", options={**options, "pixels": 8, "classes": 3}, classes=["0", "1", "2"], **values)
    return commit_model(run.directory, card, card.make().state_dict(), step=step)


def damage(run: Run, commit: Commit) -> None:
    """One bit of what it holds."""
    key = f"checkpoints/{commit.prefix}/{next(r.name for r in commit.files if r.name.endswith('.safetensors'))}"
    data = bytearray(run.directory.read(key))
    data[-1] ^= 1
    run.directory.write(key, bytes(data))


def pretrain(run: Run) -> None:
    tracker = run.tracker()
    try:
        _Stages(run, tracker, "")._pretrain(open_data(run.config, run.data))
    finally:
        tracker.close(timeout=10)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("step", [STEPS - 1, STEPS])
def test_a_damaged_checkpoint_is_left_to_the_workers(config: Config, step: int) -> None:
    run = claim_run(config)
    damage(run, trained(run, step))
    with pytest.raises(ConfigError, match=r"cluster\.gpus: 8 are asked for"):  # so it is not taken for finished
        pretrain(run)
    assert Checkpoints(run.directory).steps() == [step], "it is not set aside: no lease was taken"


@pytest.mark.usefixtures("cluster")
def test_no_byte_is_read_of_a_checkpoint_before_the_end(config: Config) -> None:
    run = claim_run(config)
    commit = trained(run, STEPS - 1)
    run.directory.remove(f"checkpoints/{commit.prefix}")
    with pytest.raises(ConfigError, match=r"cluster\.gpus: 8 are asked for"):
        pretrain(run)
    assert Checkpoints(run.directory).steps() == [STEPS - 1]


def test_a_training_that_is_finished_is_passed_over(config: Config) -> None:
    run = claim_run(config)
    trained(run, STEPS - 1)
    trained(run, STEPS)
    pretrain(run)  # without Ray


def test_fresh_passes_over_checkpoints_of_an_earlier_format(config: Config) -> None:
    run = claim_run(config)
    commit = trained(run, 1)
    key = f"checkpoints/step-1/{COMMIT}"
    old = json.loads(run.directory.read(key)) | {"format": commit.format - 1}
    run.directory.write(key, json.dumps(old).encode())
    with pytest.raises(CheckpointError, match=f"its format is {commit.format - 1}, this version reads format {commit.format}"):
        check_resources(config, write=False)
    check_resources(config, write=False, fresh=True)
    claimed = claim_run(config, fresh=True)
    assert claimed.id != run.id and Checkpoints(claimed.directory).steps() == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 3}'])
def test_fresh_passes_over_a_broken_commit(config: Config, content: bytes) -> None:
    run = claim_run(config)
    trained(run, 1)
    run.directory.write(f"checkpoints/step-1/{COMMIT}", content)
    check_resources(config, write=False, fresh=True)
    assert Checkpoints(claim_run(config, fresh=True).directory).steps() == []


def test_fresh_looks_at_what_a_run_starts_from(config: Config, tmp_path: Path) -> None:
    values = config.model_dump(mode="json", by_alias=True)
    values["pretrain"]["start"] = {"from": str(tmp_path / "none"), "load": "weights"}
    starting = parse_config(values)
    trained(claim_run(starting), 1)
    check_resources(starting, write=False)  # with a checkpoint of its own a run needs no other
    with pytest.raises(CheckpointError, match="none"):
        check_resources(starting, write=False, fresh=True)
