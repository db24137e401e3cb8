"""Bad input, given to the real commands: one plain sentence, the right exit code, nothing lost and nothing left behind.

Each case costs a start of Python, with the engines about six seconds of it; so what a subprocess would prove once more
(messages of preflight, behind the same `main`) is tried in this process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from launch.submit import main as submit
from pipeline.checkpoint import Checkpoints, ModelCard
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.memory import HostMemory
from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.core.tracking import Tracker
from pipeline.predict import main as predict
from tests.checkpoints import commit_model
from tests.integration.services import BIN, ROOT, RayHead, answers, free_ports, service

SUBMIT = ["launch/submit.py"]
PREDICT = ["-m", "pipeline.predict"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


Call = Callable[..., Ended]


def run(home: Path, command: list[str], *arguments: object, timeout: float = 120, **variables: str) -> Ended:
    """A command of ours as a person types it, in an environment that holds nothing of this machine's."""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TESSERA_OWNER": "ada", **variables}
    began = time.monotonic()
    words = [sys.executable, *command, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """A command in this process, with environment variables as `run` has them."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*arguments: object, command: click.Command = submit, owner: str = "ada") -> Ended:
        monkeypatch.setenv("TESSERA_OWNER", owner)
        began = time.monotonic()
        result = CliRunner().invoke(command, [str(a) for a in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return Ended(result.exit_code, result.stdout, result.stderr, time.monotonic() - began)

    return call


def refuses(ended: Ended, code: int, *words: object) -> str:
    """Check that a command ended with `code` and one plain sentence that holds `words`; gives the sentence."""
    said = ended.out + ended.err
    print(f"exit {ended.code} after {ended.seconds:.1f} s\n{said}")
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == code, said
    assert "Traceback" not in said and len(errors) == 1, said
    for word in words:
        assert str(word) in errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH in which no engine can be imported: each takes seconds."""
    folder = tmp_path_factory.mktemp("bare")
    for engine in ("torch", "ray", "deepspeed", "mlflow"):
        (folder / f"{engine}.py").write_text(f"raise ImportError('{engine} was imported')\n")
    return folder


def write_images(folder: Path, count: int = 4, side: int = 8) -> Path:
    for number in range(count):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Path:
    """A config with every section and nothing wrong in it; `runs` beside it is its storage."""
    values: dict[str, Any] = {
        "name": "tiny", "storage": str(tmp_path / "runs"), "cluster": "local",
        "shard": {"source": {"url": str(images)}, "splits": {"train": 0.5, "test": 0.5}, "workers": 1},
        "pretrain": {
            "model": {"name": "vit", "width": 16, "depth": 1, "heads": 1, "patch": 4}, "objective": {"name": "classify"}, "image": {"pixels": 8},
            "batch": 4, "micro_batch": 4, "duration": "2 steps", "precision": "fp32",
        },
        "evaluate": {"suites": ["tiny"], "protocols": ["supervised"]},
    }  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def shard_only(config: Path) -> Path:
    values = yaml.safe_load(config.read_text())
    file = config.with_name("shard.yaml")
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in ("pretrain", "evaluate")}))
    return file


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory at `folder`, where we may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_s3(bucket: str, endpoint: str) -> list[str]:
    """Overrides that put the runs on an S3 store; no MLflow server is asked before the store is."""
    return [f"storage={{url: {bucket}/runs, endpoint: '{endpoint}'}}", "tracking.uri=http://127.0.0.1:9"]


# What the config alone shows: in a subprocess each, since no engine is imported for it


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param(["pretrain.colour=red"], ["pretrain.colour: no such key (allowed: average, batch, "], id="unknown-key"),
        pytest.param(["pretrain.micro_bacth=4"], ["pretrain.micro_bacth: no such key, did you mean 'micro_batch'?"], id="misspelt-key"),
        pytest.param(["pretain.batch=4"], ["pretain: no such key, did you mean 'pretrain'?"], id="misspelt-section"),
        pytest.param(["pretrain.batch=many"], ["pretrain.batch: 'many' should be a valid integer"], id="wrong-type"),
        pytest.param(["shard.source.url=7"], ["shard.source.url: 7 should be a valid string"], id="number-for-text"),
        pytest.param(
            ["pretrain.duration=5 parsecs"],
            ["pretrain.duration: '5 parsecs' needs a number and a unit", "epochs, samples, steps"],
            id="wrong-unit",
        ),
        pytest.param(
            ["pretrain.duration=5 minutes"],
            ["pretrain.duration: '5 minutes' must be counted in epochs, samples or steps"],
            id="time-for-count",
        ),
        pytest.param(["shard.size=3 barrels"], ["shard.size: '3 barrels' needs a number and a unit", "MiB"], id="wrong-size"),
        pytest.param(["pretrain.batch=6"], ["pretrain.batch: 6 is not a multiple of micro_batch (4)"], id="batch-not-divided"),
        pytest.param(["cluster=ray"], ["cluster.address: is missing, and RAY_ADDRESS is not set", "--local"], id="no-address"),
    ],
)
def test_config(config: Path, tmp_path: Path, bare: Path, overrides: list[str], words: list[str]) -> None:
    refuses(run(tmp_path, SUBMIT, config, *overrides, PYTHONPATH=str(bare)), 3, *words)
    assert not (tmp_path / "runs").exists()


def test_missing_config_names_the_nearest_file(config: Path, tmp_path: Path) -> None:
    refuses(run(tmp_path, SUBMIT, tmp_path / "tny.yaml"), 3, f"config: there is no file {tmp_path / 'tny.yaml'}, did you mean 'tiny.yaml'?")


def test_unknown_flag(config: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, SUBMIT, config, "--locl")
    assert ended.code == 2 and "No such option" in ended.err and "--local" in ended.err and "Traceback" not in ended.err


# Preflight


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param(["pretrain.model=vitb16"], ["pretrain.model.name: 'vitb16' is not known; the nearest are vit_b16, "], id="model"),
        pytest.param(
            ["pretrain.objective=clasify"], ["pretrain.objective.name: 'clasify' is not known, did you mean 'classify'?"], id="objective"
        ),
        pytest.param(["pretrain.optimizer=admw"], ["pretrain.optimizer.name: 'admw' is not known, did you mean 'adamw'?"], id="optimizer"),
        pytest.param(["pretrain.schedule=cosin"], ["pretrain.schedule.name: 'cosin' is not known, did you mean 'cosine'?"], id="schedule"),
        pytest.param(["evaluate.protocols=[liner]"], ["evaluate.protocols.0: 'liner' is not known, did you mean 'linear'?"], id="protocol"),
        pytest.param(["shard.source.format=foldr"], ["shard.source.format: 'foldr' is not known, did you mean 'folder'?"], id="source"),
        pytest.param(["pretrain.split=trian"], ["pretrain.split: 'trian' is not known, did you mean 'train'?"], id="split"),
        pytest.param(
            ["pretrain.precision=fp16"], ["pretrain.precision: 'fp16' needs a GPU (allowed on a CPU: bf16, fp32)"], id="fp16-on-a-cpu"
        ),
        pytest.param(["shard.source.url=/nowhere/at/all"], ["shard.source.url: there is no folder /nowhere/at/all"], id="missing-folder"),
        pytest.param(
            ["storage=s3://lab/runs"], ["tracking.uri: is missing; storage s3://lab/runs is remote", "http://mlflow:5000"], id="no-tracking"
        ),
        pytest.param(
            ["pretrain.start=/no/run"], ["pretrain.start.from: /no/run: there is no such file or directory"], id="start-from-no-run"
        ),
        pytest.param(["shard=null", "data=/no/data"], ["data /no/data: there is no dataset here"], id="no-dataset"),
        pytest.param(
            ["storage=gopher://x", "tracking.uri=http://127.0.0.1:9"],
            ["storage gopher://x", "cannot use 'gopher' URLs"],
            id="no-such-store",
        ),
    ],
)
def test_preflight(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, overrides: list[str], words: list[str]
) -> None:
    if overrides == ["pretrain.precision=fp16"]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refuses(call(config, *overrides), 3, *words)
    assert not (tmp_path / "runs").exists()


def test_folder_without_images(config: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.doc").touch()
    sentence = refuses(call(config, f"shard.source.url={tmp_path / 'notes'}"), 3)
    assert f"shard.source.url: the folder {tmp_path / 'notes'} holds no images" in sentence and "png" in sentence
    assert not (tmp_path / "runs").exists()


def test_plan_refuses_too(config: Path, tmp_path: Path, call: Call) -> None:
    refuses(call(config, "--plan", "shard.source.url=/nowhere"), 3, "shard.source.url: there is no folder /nowhere")
    assert not (tmp_path / "runs").exists()


# Storage


def test_read_only_storage(config: Path, tmp_path: Path, call: Call) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        refuses(call(config, f"storage={disk}/runs"), 3, f"storage {disk}/runs: cannot write, the file system is read-only")


def test_unreachable_storage(config: Path, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    ended = run(tmp_path, SUBMIT, config, *on_s3("s3://lab", endpoint), **keys)
    refuses(ended, 3, "storage s3://lab/runs", endpoint)
    assert ended.seconds < 60


def test_missing_bucket(config: Path, s3: tuple[str, Callable[[], str]], call: Call) -> None:
    refuses(
        call(config, *on_s3("s3://nobody-made-this", s3[0])), 3, "storage s3://nobody-made-this/runs: cannot write", "bucket does not exist"
    )


def test_refused_s3_keys(config: Path, tmp_path: Path) -> None:
    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with service(command, tmp_path / "log", lambda: answers(endpoint), {"INITIAL_NO_AUTH_ACTION_COUNT": "0"}):
        keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "wrong"}
        refuses(
            run(tmp_path, SUBMIT, config, *on_s3("s3://lab", endpoint), **keys),
            3,
            "storage s3://lab/runs",
            "the store refused these credentials",
        )


def fill(disk: Path) -> None:
    with (disk / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


def test_storage_that_cannot_be(config: Path, tmp_path: Path, call: Call) -> None:
    refuses(call(config, "storage=/proc/runs"), 3, "storage /proc/runs", "cannot write")
    refuses(call(config, f"storage={config}"), 3, f"storage {config}", "cannot read", "Not a directory")


def test_full_disk(config: Path, tmp_path: Path, call: Call) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        fill(disk)
        refuses(call(config, f"storage={disk}/runs"), 3, f"storage {disk}/runs: cannot write, the disk is full")


@pytest.mark.slow
def test_disk_that_fills_while_sharding(shard_only: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "large", count=24, side=300)  # 270 KB each
    with mounted(tmp_path / "disk", "size=3m") as disk:
        ended = run(tmp_path, SUBMIT, shard_only, f"storage={disk}/runs", f"shard.source.url={source}", "shard.size=1 MiB")
        refuses(ended, 3, f"storage {disk}/runs/tiny/shards", "cannot write, the disk is full")
        assert (disk / "runs/tiny/run.yaml").stat().st_size > 0 and not (disk / "runs/tiny/shards/manifest.json").exists()


def test_disk_that_fills_costs_a_tracker_its_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        tracker = Tracker(f"http://127.0.0.1:{free_ports(1)[0]}", "tessera", "key", "tiny", disk / "spool")
        fill(disk)
        for step in range(200):
            tracker.metrics({f"train/{name}": 1.0 for name in ("loss", "lr", "grad_norm")}, step)
        tracker.artifact("report", "index.html", bytes(10000))
        assert tracker.close("FAILED", timeout=5) is False
        with pytest.raises(StorageError, match=f"tracking: records cannot be kept in {disk}/full"):
            Tracker("http://127.0.0.1:9", "tessera", "key", "tiny", disk / "full")
    warnings = capsys.readouterr().err.splitlines()
    assert len([w for w in warnings if "records are lost" in w and "No space left" in w]) == 1 and not any(
        "Traceback" in w for w in warnings
    )


def test_neither_memory_nor_temporary_disk_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = Fragment("weight", "huge", 0, torch.empty(1 << 44, device="meta"))  # 64 TiB
    with mounted(tmp_path / "disk", "size=2m") as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(StorageError, match=r"takes 65536\.0 GiB of host memory, or of TMPDIR, and neither has room for it"):
            HostMemory([state])
        assert not any(disk.iterdir())


# Runs that are there


def make_run(config: Path) -> Storage:
    """What an earlier call of `config` by ada left: a claimed run with a committed checkpoint at step 1, untrained."""
    from pipeline.checkpoint import claim_run
    from pipeline.config import load_config

    loaded = load_config(config)
    assert loaded.pretrain is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_OWNER", "ada")
        directory = claim_run(loaded).directory
    model = loaded.pretrain.model
    options = {**model.arguments, "pixels": 8, "classes": 2}
    card = ModelCard(model.name, options, "classify", ["cat", "dog"], (0.5,) * 3, (0.5,) * 3, "none", "made", 1)
    commit_model(directory, card, card.make().state_dict())
    return directory


def test_start_from_a_different_model(config: Path, tmp_path: Path, call: Call) -> None:
    start = make_run(config).url
    for overrides in ([f"pretrain.start={start}"], [f"pretrain.start={start}@1"], [f"pretrain.start={{from: {start}, load: all}}"]):
        ended = call(config, "name=other", "pretrain.model.width=32", *overrides)
        refuses(ended, 3, "pretrain.start.from: the checkpoint", "is of a different model", "width 16, ", "has shape", "this model's has")
    ended = call(config, "name=other", f"pretrain.start={start}@7")
    refuses(ended, 3, "pretrain.start.from: ", "there is no such committed checkpoint (committed steps: 1)")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_start_with_another_resolution_is_fine(config: Path, tmp_path: Path, call: Call) -> None:
    start = make_run(config).url
    ended = call(config, "--plan", "name=other", "pretrain.image={pixels: 16, enlarge: true}", f"pretrain.start={start}")
    assert ended.code == 0, ended.err


def test_run_of_somebody_else(config: Path, tmp_path: Path, call: Call) -> None:
    directory = make_run(config)
    sentence = f"name: 'tiny' is a run of ada in {directory.url}, and you are grace; choose another name"
    refuses(call(config, owner="grace"), 3, sentence)
    refuses(run(tmp_path, SUBMIT, config, "--fresh", TESSERA_OWNER="grace"), 3, sentence)
    assert Checkpoints(directory).steps() == [1], "somebody else's checkpoint is where it was"


def test_run_of_a_differing_config(config: Path, call: Call) -> None:
    directory = make_run(config)
    ended = call(config, "pretrain.optimizer.lr=0.5", "pretrain.model.depth=2", "pretrain.save.keep=9")
    refuses(ended, 3, directory.url, "differs in pretrain.model.depth, pretrain.optimizer.lr; choose another name", "--fresh")
    assert Checkpoints(directory).steps() == [1]


def test_run_that_does_not_exist(tmp_path: Path, call: Call) -> None:
    refuses(run(tmp_path, SUBMIT, f"file://{tmp_path}/runs/none"), 102, f"run file://{tmp_path}/runs/none: there is no run here")
    refuses(call(tmp_path), 102, f"run {tmp_path}: there is no run here")


# What does not stop a job


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path, Path]:
    """A job over a folder with a cut image and files that are no images, while its MLflow server is down: how it ended,
    its run directory and its folder of images."""
    folder = tmp_path_factory.mktemp("odd")
    source = write_images(folder / "images", count=12)
    cut = source / "cat" / "cut.png"
    cut.write_bytes((source / "cat" / "0.png").read_bytes()[:100])
    (source / "notes.doc").write_text("no image")
    (source / "cat" / "Thumbs.db").write_bytes(b"no image either")
    config = folder / "odd.yaml"
    shard = {"source": {"url": str(source)}, "splits": {"train": 0.5, "test": 0.5}, "workers": 1}
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    config.write_text(yaml.safe_dump({"name": "odd", "storage": str(folder / "runs"), "tracking": {"uri": uri}, "shard": shard}))
    return run(folder, SUBMIT, config, "--local"), folder / "runs" / "odd", source


@pytest.mark.slow
def test_corrupt_images_are_dropped_and_named(odd: tuple[Ended, Path, Path]) -> None:
    ended, directory, _ = odd
    assert ended.code == 0, ended.out + ended.err
    manifest = json.loads((directory / "shards" / "manifest.json").read_text())
    assert (manifest["read"], manifest["written"], manifest["ignored"], sum(manifest["dropped"].values())) == (13, 12, 2, 1)
    [dropped] = manifest["dropped_samples"]
    assert dropped["file"] == "cat/cut.png" and dropped["reason"] in manifest["dropped"] and dropped["detail"]
    assert re.search(r"9\d\.\d% kept, 1 corrupt", ended.err), "beside the progress"


@pytest.mark.slow
def test_mlflow_that_is_down_costs_a_warning(odd: tuple[Ended, Path, Path]) -> None:
    ended, directory, _ = odd
    assert ended.code == 0 and "Traceback" not in ended.out + ended.err
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: tracking http://127.0.0.1:")]
    assert warnings and "does not answer" in warnings[0] and str(directory / "spool") in warnings[0]
    records = [json.loads(line) for file in (directory / "spool").glob("*/records.jsonl") for line in file.read_text().splitlines()]
    kinds = [r["kind"] for r in records]
    assert kinds.count("end") == 2 and {"params", "tags", "artifact", "metrics"} <= set(kinds), (
        "the run's own records and those of sharding"
    )
    assert any(r["values"].get("shard/written") == 12 for r in records if r["kind"] == "metrics")


# Prediction


def test_predict(config: Path, images: Path, tmp_path: Path, call: Call) -> None:
    directory = make_run(config)
    good, cut = images / "cat" / "0.png", tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:100])
    ended = run(tmp_path, PREDICT, directory.url, tmp_path / "none.png", good)
    refuses(ended, 3, f"{tmp_path / 'none.png'}: there is no such file")
    assert str(good) in ended.out, "the others are classified"
    refuses(call(directory.url, cut, command=predict), 3, f"{cut}: this image cannot be used", "corrupt")
    refuses(
        call(tmp_path / "runs" / "none", good, command=predict), 102, f"run {tmp_path}/runs/none", "there is no committed checkpoint here"
    )


# The cluster


@pytest.mark.slow
def test_unreachable_cluster(config: Path, tmp_path: Path, s3: tuple[str, Callable[[], str]], call: Call) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    refuses(run(tmp_path, SUBMIT, config, "--address", address), 4, f"cluster.address: nobody answers at {address}")
    refuses(call(config, "--address", s3[0]), 4, f"cluster.address: {s3[0]} does not answer as a Ray dashboard")
    for wrong in ("ray://head:10001", "http://head:dashboard", "http://head:99999"):
        refuses(call(config, "--address", wrong), 3, f"cluster.address: '{wrong}' is not an address", "http://host:8265")


@pytest.mark.slow
def test_missing_and_wrong_token(config: Path, tmp_path: Path, ray_head: RayHead) -> None:
    refuses(
        run(tmp_path, SUBMIT, config, "--address", ray_head.address),
        3,
        ray_head.address,
        "asks for a token and none is given",
        "RAY_AUTH_TOKEN",
    )
    ended = run(tmp_path, SUBMIT, config, "--address", ray_head.address, RAY_AUTH_TOKEN="f" * 32)
    refuses(ended, 3, ray_head.address, "the token given is wrong")
    assert not (tmp_path / "runs").exists()
