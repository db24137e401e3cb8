from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.checkpoint import claim_run, find_run
from pipeline.checkpoint.run import check_claim, flatten, run_directory, tracking_uri
from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError, NoSuchRun
from pipeline.core.storage import Storage


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_OWNER", "ada")


@pytest.fixture
def config(store: Storage) -> Callable[..., Config]:
    def make(pretrain: dict[str, Any] | None = None, **changes: Any) -> Config:
        section = {"model": "vit_b16", "duration": "1 epoch", **(pretrain or {})}
        storage = {"url": store.url, "endpoint": store.endpoint}
        return parse_config(
            {"name": "run", "storage": storage, "data": "/d", "tracking": {"uri": "http://m"}, "pretrain": section, **changes}
        )

    return make


Maker = Callable[..., Config]


def test_the_same_config_goes_on(config: Maker, store: Storage) -> None:
    run = claim_run(config())
    again = claim_run(config({"model": {"name": "vit_b16"}, "duration": "1.0 epochs"}))  # spelt otherwise
    assert run.id == again.id and run.is_new and not again.is_new and run.directory.url == f"{store.url}/run"
    assert find_run(run.directory.url, store.endpoint) == config().model_dump(mode="json", by_alias=True)
    assert run.dataset_url == "/d"


def test_of_many_claimers_one_makes_the_run(config: Maker) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: claim_run(config()), range(8)))
    assert len({r.id for r in runs}) == 1 and sum(r.is_new for r in runs) == 1


def test_another_config_is_refused(config: Maker) -> None:
    run = claim_run(config())
    other = config({"batch": 512, "optimizer": {"lr": 5e-4}, "model": {"name": "vit_b16", "drop_path": 0.1}}, seed=1)
    with pytest.raises(ConfigError) as e:
        claim_run(other)
    assert "differs in pretrain.batch, pretrain.model.drop_path, pretrain.optimizer.lr, seed; choose another name" in str(e.value)
    with pytest.raises(ConfigError, match=r"differs in pretrain.start"):
        claim_run(config({"start": "/runs/other"}))
    with pytest.raises(ConfigError, match=r"differs in pretrain.batch, "):
        check_claim(other)
    assert claim_run(config()).id == run.id  # nothing has happened to it


def test_how_and_where_it_runs_may_change(config: Maker) -> None:
    run = claim_run(config())
    changed = config(
        {"save": {"every": "5 steps", "keep": 1}, "validate": {"every": "3 epochs"}, "log": "1 step", "loader": {"workers": 4}},
        cluster="local", tracking={"uri": "http://other"}, evaluate={"suites": ["own"]},
    )  # fmt: skip
    assert claim_run(changed).id == run.id


def test_somebody_elses_run(config: Maker, monkeypatch: pytest.MonkeyPatch, store: Storage) -> None:
    run = claim_run(config())
    store.write("run/checkpoints/step-1/COMMIT.json", b"{}")
    monkeypatch.setenv("TESSERA_OWNER", "bob")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"name: 'run' is a run of ada in .*/run, and you are bob; choose another name"):
            claim_run(config(), fresh=fresh)
    assert store.exists("run/checkpoints/step-1/COMMIT.json")  # fresh has removed nothing
    monkeypatch.setenv("TESSERA_OWNER", "ada")
    assert claim_run(config()).id == run.id


def test_fresh(config: Maker, store: Storage) -> None:
    run = claim_run(config())
    for key in ("checkpoints/step-1/COMMIT.json", "evaluation/x.json", "report/index.html", "shards/manifest.json"):
        store.write(f"run/{key}", b"{}")
    anew = claim_run(config({"batch": 512}), fresh=True)
    assert anew.id != run.id and anew.is_new
    left = [path for path, _ in anew.directory.walk() if not path.startswith("checkpoints/leases/")]
    assert left == ["run.yaml", "shards/manifest.json"]  # shards have their own fingerprint
    assert claim_run(config({"batch": 512})).id == anew.id


def test_what_is_no_run(config: Maker, store: Storage) -> None:
    with pytest.raises(NoSuchRun, match=r"run .*/run: there is no run here \(no run.yaml\)"):
        find_run(f"{store.url}/run", store.endpoint)
    assert check_claim(config()) is None
    for text in (b"- 1", b"id: 3", b"\tx: ["):
        store.write("run/run.yaml", text)
        with pytest.raises(ConfigError, match=r"/run/run.yaml"):
            claim_run(config())


def test_a_directory_that_is_no_run(config: Maker, store: Storage) -> None:
    for key in ("shards/manifest.json", "spool/x", "checkpoints/step-1/COMMIT.json", "evaluation/x", "report/x", "timings.json"):
        store.write(f"run/{key}", b"{}")
    assert check_claim(config()) is None
    store.write("run/thesis.txt", b"mine")
    for claim in (check_claim, claim_run):
        with pytest.raises(ConfigError, match=r"^name: .*/run holds 'thesis.txt' and no run.yaml, so it is not a run; choose another name"):
            claim(config(), fresh=True)
    assert not store.exists("run/run.yaml") and store.exists("run/timings.json")


def test_a_run_of_an_older_version(config: Maker, store: Storage) -> None:
    run = claim_run(config())
    record = yaml.safe_load(store.read("run/run.yaml"))
    del record["config"]["pretrain"]["zero"], record["config"]["pretrain"]["optimizer"]["momentum"]  # keys that came later
    store.write("run/run.yaml", yaml.safe_dump(record).encode())
    assert claim_run(config()).id == run.id
    with pytest.raises(ConfigError, match=r"differs in pretrain.optimizer.momentum; choose"):
        claim_run(config({"optimizer": {"momentum": 0.5}}))
    record["config"]["pretrain"]["gone"] = 1
    store.write("run/run.yaml", yaml.safe_dump(record).encode())
    with pytest.raises(
        ConfigError, match=r"this version refuses \(pretrain.gone: no such key.*\); choose another name, or start anew with --fresh"
    ):
        claim_run(config())
    assert claim_run(config(), fresh=True).is_new


def test_tracking_uri(tmp_path: Path) -> None:
    values = {"name": "t", "data": "/d", "pretrain": {"model": "vit_b16", "duration": "1 epoch"}}
    assert tracking_uri(parse_config({**values, "storage": str(tmp_path)})) == f"sqlite:///{tmp_path}/mlflow.db"
    remote = {**values, "storage": "s3://lab/runs"}
    assert tracking_uri(parse_config({**remote, "tracking": {"uri": "http://m:5000"}})) == "http://m:5000"
    with pytest.raises(ConfigError, match=r"tracking.uri: is missing; storage s3://lab/runs is remote, so name an MLflow server"):
        tracking_uri(parse_config(remote))


def test_a_run_with_its_own_shards(tmp_path: Path) -> None:
    values = {"name": "t", "storage": str(tmp_path), "shard": {"source": {"url": "x"}}}
    assert claim_run(parse_config(values)).dataset_url == f"{tmp_path}/t/shards"
    assert run_directory(parse_config(values)).url == f"{tmp_path}/t"


def test_downloads_and_what_is_done_to_finished_shards_may_change(tmp_path: Path) -> None:
    def config(**changes: Any) -> Config:
        source = {"format": "urls", "url": "list.csv"}
        return parse_config({"name": "web", "storage": str(tmp_path), "shard": {"source": source, "images": {"hash": True}, **changes}})

    first = claim_run(config())
    changes = {
        "fetch": {"rate": 2, "connections": 8},
        "duplicates": {"near": 4},
        "contamination": ["s3://lab/test"],
        "scores": [{"column": "a", "function": "b.c"}],
        "takedown": ["list.txt"],
    }
    assert claim_run(config(workers=2, **changes)).id == claim_run(config()).id == first.id
    with pytest.raises(ConfigError, match=r"differs in shard.images.min_pixels, shard.text.required; choose"):
        claim_run(config(images={"hash": True, "min_pixels": 9}, text={"required": True}))


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1], "e": None}) == {"a.b": 1, "a.c": {}, "d": [1], "e": None}
