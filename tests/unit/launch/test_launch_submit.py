from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from launch.submit import _load, main
from pipeline.checkpoint import claim_run
from pipeline.config import parse_config
from pipeline.config.load import split_words
from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.storage import Storage
from pipeline.preflight import plan_config
from pipeline.shards.manifest import Manifest


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for number in range(10):
        file = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file)
    return {
        "name": "run", "storage": str(tmp_path / "runs"), "cluster": "local",
        "shard": {"source": {"url": str(tmp_path / "images")}, "splits": {"train": 0.8, "test": 0.2}},
        "pretrain": {
            "model": {"name": "vit", "width": 16, "depth": 1, "heads": 1, "patch": 4}, "image": {"pixels": 8},
            "batch": 4, "micro_batch": 4, "duration": "20 steps", "precision": "fp32",
        },
    }  # fmt: skip


def plan(values: dict[str, Any], folder: Path, *overrides: str) -> tuple[int, str]:
    file = folder / "config.yaml"
    file.write_text(json.dumps(values))
    ended = CliRunner().invoke(main, [str(file), "--plan", "--json", *overrides])
    return ended.exit_code, ended.output


def test_a_moved_run_goes_on_where_it_is(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = claim_run(parse_config(values))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run.directory.path, tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path)
    for url in ("elsewhere/run", "elsewhere/run/", str(tmp_path / "elsewhere/run"), f"file://{tmp_path}/elsewhere/run"):
        config = _load(url, ["pretrain.save.keep=9"], True, None)
        assert config.storage.url == str(tmp_path / "elsewhere") and config.pretrain is not None and config.pretrain.save.keep == 9
        assert claim_run(config).id == run.id
    assert not (tmp_path / "runs" / "run").exists()
    shutil.move(tmp_path / "elsewhere" / "run", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"^run other: the run here is named 'run', and its directory must be"):
        _load("other", [], False, None)


def test_a_run_is_found_at_the_endpoint_given(values: dict[str, Any], s3: tuple[str, Callable[[], str]], tmp_path: Path) -> None:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    storage = {"url": f"{bucket}/runs", "endpoint": endpoint}
    claim_run(parse_config({**values, "storage": storage, "tracking": {"uri": "http://m"}}))
    for override in (
        f"storage.endpoint={endpoint}",
        f"storage={{endpoint: '{endpoint}'}}",
        f"storage={{url: s3://x, endpoint: '{endpoint}'}}",
    ):
        config = _load(f"{bucket}/runs/run", [override], False, None)
        assert config.storage.model_dump() == {**storage, "conditional": True}


def test_plan_looks_at_the_run_that_is_there(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = plan(values, tmp_path)
    assert code == 0 and json.loads(out)["pretrain"]["samples_are_estimated"]
    claim_run(parse_config(values))
    assert plan(values, tmp_path)[0] == 0
    code, out = plan(values, tmp_path, "pretrain.batch=8")
    assert code == ExitCode.PREFLIGHT and "differs in pretrain.batch; choose another name" in out
    monkeypatch.setenv("TESSERA_OWNER", "bob")
    assert plan(values, tmp_path)[0] == ExitCode.PREFLIGHT


def test_plan_passes_over_another_dataset(values: dict[str, Any], tmp_path: Path, make_dataset: Callable[..., Manifest]) -> None:
    make_dataset(Storage(str(tmp_path / "runs" / "run" / "shards")), {"old": 20})
    found, estimated, _ = plan_config(parse_config(values))
    assert found is not None and (found.samples_an_epoch, estimated) == (8, True)


def test_gpus(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for cluster, workers in (({}, 8), ({"gpus": 4}, 4), ({"gpus": 0}, 2), ({"gpus": 0, "workers": 3}, 3)):
        assert plan_config(parse_config({**values, "cluster": {"name": "local", **cluster}}))[2] == workers
    cluster = {"name": "local", "gpus": 0, "min_workers": 3}
    assert plan_config(parse_config({**values, "cluster": cluster}))[2] == 3, "two is the default only where two are enough"


def write(values: dict[str, Any], file: Path, **changes: Any) -> str:
    file.write_text(json.dumps({**values, **changes}))
    return str(file)


def test_a_later_config_may_use_what_an_earlier_one_makes(values: dict[str, Any], tmp_path: Path) -> None:
    first = write(values, tmp_path / "first.yaml")
    second = write(values, tmp_path / "second.yaml", name="second", shard=None, data=f"{tmp_path}/runs/run/shards")
    ended = CliRunner().invoke(main, [second, "--plan"])
    assert ended.exit_code == ExitCode.PREFLIGHT and "there is no dataset" in ended.output
    ended = CliRunner().invoke(main, [first, second, "--plan", "pretrain.duration=3 steps"])
    assert ended.exit_code == ExitCode.DONE, ended.output
    assert ended.output.count("steps        about 3 ") == 2, "an override is for all"


def test_two_runs_of_one_name_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    file = write(values, tmp_path / "first.yaml")
    ended = CliRunner().invoke(main, [file, file])
    assert ended.exit_code == ExitCode.PREFLIGHT and "name: 'run' is the name of two of the configs" in ended.output


def test_configs_of_two_clusters_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    other = write(values, tmp_path / "other.yaml", name="other", cluster={"name": "ray", "address": "http://head:8265"})
    ended = CliRunner().invoke(main, [write(values, tmp_path / "first.yaml"), other])
    assert ended.exit_code == ExitCode.PREFLIGHT and "cluster: the configs name different clusters" in ended.output


def test_words() -> None:
    assert split_words(["a.yaml", "x.y=1", "s3://b/run?a=b", "z=c=d"]) == (["a.yaml", "s3://b/run?a=b"], ["x.y=1", "z=c=d"])
    with pytest.raises(ConfigError, match="config: is missing"):
        split_words(["a=b"])


def test_a_profile_can_be_asked_for_in_a_word(values: dict[str, Any], tmp_path: Path) -> None:
    code, output = plan(values, tmp_path, "--profile", "pretrain.profile.steps=5")
    assert code == ExitCode.DONE and json.loads(output)["config"]["pretrain"]["profile"] == {"steps": 5, "after": 10, "ranks": "first"}
    assert json.loads(plan(values, tmp_path)[1])["config"]["pretrain"]["profile"] is None
