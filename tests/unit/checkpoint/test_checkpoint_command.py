"""python -m pipeline.checkpoint, as people type it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.checkpoint import Checkpoints, Commit, ModelCard, claim_run
from pipeline.checkpoint.__main__ import main
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.requests import Requests
from pipeline.config import parse_config
from pipeline.core.storage import Storage
from pipeline.models import create, formats
from tests.checkpoints import commit_fragments, commit_model

VIT = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "pixels": 8, "classes": 3}


def run_command(store: Storage, *arguments: str) -> Result:
    """As somebody whose environment names the store's endpoint."""
    return CliRunner().invoke(main, arguments, env={"AWS_ENDPOINT_URL": store.endpoint} if store.endpoint else {})


def claim(store: Storage, **save: Any) -> Storage:
    """A run that nobody trains."""
    config = {
        "name": "run", "storage": {"url": store.url, "endpoint": store.endpoint}, "data": "/nowhere", "tracking": {"uri": "http://m"},
        "pretrain": {"model": "vit_b16", "duration": "1 epoch", "batch": 64, "save": save, "validate": {}},
    }  # fmt: skip
    return claim_run(parse_config(config)).directory


def commit(run: Storage, step: int, **changes: Any) -> Commit:
    checkpoints = Checkpoints(run)
    lease = checkpoints.newest_lease() or checkpoints.acquire()
    state = [Fragment("weight", "a", 0, torch.arange(50_000, dtype=torch.float32))]
    return commit_fragments(checkpoints, lease, state, step, {"history.jsonl": b"{}\n"}, **changes)


def damage(run: Storage, committed: Commit) -> None:
    (name,) = (r.name for r in committed.files if r.name.endswith(".safetensors"))
    key = f"checkpoints/{committed.prefix}/{name}"
    data = bytearray(run.read(key))
    data[-1] ^= 1
    run.write(key, bytes(data))


def test_list(store: Storage) -> None:
    run = claim(store, keep=1, permanent="200 steps", best="validate/loss")
    empty = run_command(store, "list", run.url)
    assert empty.exit_code == 0 and empty.stdout == f"{run.url}: nothing has been committed yet\n"
    for step, loss in ((100, 0.5), (200, 0.7), (300, 0.6)):
        commit(run, step, world_size=2, zero_stage=3, metrics={"validate/loss": loss})
    Checkpoints(run).acquire()
    newest = commit(run, 400, samples=25_600_000)
    shown = run_command(store, "list", run.url)
    assert shown.exit_code == 0, shown.output
    head, *lines = (line.split() for line in shown.stdout.splitlines())
    assert head == ["step", "generation", "samples", "ranks", "stage", "size", "kept", "metrics"]
    size = f"{sum(r.bytes for r in newest.files) / 1024:.1f}"
    assert lines == [
        ["100", "1", "1k", "2", "3", size, "KiB", "yes", "validate/loss", "0.5"],  # the best
        ["200", "1", "2k", "2", "3", size, "KiB", "yes", "validate/loss", "0.7"],  # for ever
        ["300", "1", "3k", "2", "3", size, "KiB", "no", "validate/loss", "0.6"],
        ["400", "2", "25.6M", "1", "0", size, "KiB", "yes"],  # the newest
    ]
    rows = [json.loads(line) for line in run_command(store, "list", run.url, "--json").stdout.splitlines()]
    assert [row["kept"] for row in rows] == [True, True, False, True]
    assert rows[-1] == {
        "step": 400, "generation": 2, "samples": 25_600_000, "ranks": 1, "stage": 0, "bytes": sum(r.bytes for r in newest.files),
        "kept": True, "metrics": {},
    }  # fmt: skip


def test_what_stays_by_epochs_depends_on_the_data(tmp_path: Path, make_dataset: Any) -> None:
    make_dataset(data := Storage(str(tmp_path / "data")), {"train": 130, "test": 5})
    config = {
        "name": "run", "storage": str(tmp_path / "runs"), "data": data.url,
        "pretrain": {"model": "vit_b16", "duration": "1 epoch", "batch": 64, "micro_batch": 64, "save": {"keep": 1, "permanent": "1 epoch"}},
    }  # fmt: skip
    run = claim_run(parse_config(config)).directory
    for step in (2, 3, 6, 7):  # an epoch is 3 steps
        commit(run, step)
    rows = [json.loads(line) for line in run_command(run, "list", run.url, "--json").stdout.splitlines()]
    assert {row["step"]: row["kept"] for row in rows} == {2: False, 3: True, 6: True, 7: True}


def test_without_a_config_nobody_knows_what_stays(tmp_path: Path) -> None:
    commit(run := Storage(str(tmp_path)), 5)
    assert " ?" in run_command(run, "list", run.url).stdout
    assert json.loads(run_command(run, "list", run.url, "--json").stdout)["kept"] is None


def test_verify(store: Storage) -> None:
    run = claim(store)
    nothing = run_command(store, "verify", run.url)
    assert nothing.exit_code == 102 and nothing.stderr == f"error: run {run.url}: there is no committed checkpoint here\n"
    commits = [commit(run, step) for step in (5, 6, 7)]
    sound = run_command(store, "verify", run.url)
    assert sound.exit_code == 0 and sound.stdout.count("are as they were saved") == 3, sound.output
    damage(run, commits[1])
    damaged = run_command(store, "verify", run.url)
    assert damaged.exit_code == 3
    assert [line.split(":")[0] for line in damaged.stdout.splitlines()] == ["step 5", "step 7"], "the others are looked at too"
    (error,) = (line for line in damaged.stderr.splitlines() if line.startswith("error: "))
    assert f"/{commits[1].prefix}/rank-00000-of-00001.safetensors: is damaged, its bytes from 0 on differ" in error
    assert run_command(store, "verify", f"{run.url}@7").exit_code == 0 and run_command(store, "verify", f"{run.url}@6").exit_code == 3
    assert Checkpoints(run).steps() == [5, 6, 7], "nothing is changed"


def test_export(store: Storage) -> None:
    run, model = claim(store), create("vit", seed=0, **VIT)
    card = ModelCard("vit", model.options.model_dump(mode="json"), "classify", ["a", "b", "c"], (0.5,) * 3, (0.5,) * 3, "hash", "id", 7)
    commit_model(run, card, model.state_dict())
    commit_model(run, card, {name: t + 1 for name, t in model.state_dict().items()}, step=9)
    out = f"{store.url}/out"
    done = run_command(store, "export", f"{run.url}@7", out, "--to", "hf", "--max-file", "4 kB")
    assert done.exit_code == 0 and done.stdout == f"{out}: step 7, as hf\n", done.output
    found = formats.read(out, endpoint=store.endpoint)
    assert found.classes == ["a", "b", "c"] and all(torch.equal(found.state[n], t) for n, t in model.state_dict().items())
    again = run_command(store, "export", run.url, out, "--to", "timm")
    assert again.exit_code == 3 and f"error: {out}: is not empty" in again.stderr
    assert run_command(store, "export", run.url, out, "--to", "hf", "--force").stdout == f"{out}: step 9, as hf\n"
    assert all(torch.equal(formats.read(out, endpoint=store.endpoint).state[n], t + 1) for n, t in model.state_dict().items())

    other = f"{store.url}/other"
    for arguments, code, sentence in (
        ([f"{run.url}@8", other, "--to", "hf"], 3, "step-8: there is no such committed checkpoint (committed steps: 7, 9)"),
        ([run.url, other, "--to", "open_clip"], 3, "error: open_clip: has no vit (it has clip alone)"),
        ([run.url, other, "--to", "onnx"], 2, "'onnx' is not one of 'hf', 'open_clip', 'timm'"),
        ([run.url, other, "--to", "hf", "--max-file", "lots"], 3, "error: --max-file: 'lots' needs a number and a unit, such as '256 MiB'"),
        ([run.url, other, "--to", "timm", "--max-file", "1 GB"], 3, "error: --max-file: timm reads its weights from one file"),
    ):
        refused = run_command(store, "export", *arguments)
        assert refused.exit_code == code and sentence in refused.stderr, refused.output
    assert Storage(other, store.endpoint).names() == []


@pytest.mark.parametrize("kind", ["save", "stop"])
def test_a_job_is_asked(store: Storage, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.checkpoint.requests._LOOK_EVERY", 0.1)
    run, events = claim(store), {"save": threading.Event(), "stop": threading.Event()}
    with Requests(run, events):
        asked = run_command(store, kind, run.url)
    assert asked.exit_code == 0 and asked.stdout.startswith(f"{run.url}: its job has heard of it, and saves"), asked.output
    assert events[kind].is_set() and not events["stop" if kind == "save" else "save"].is_set()
    assert run.names("requests") == []


@pytest.mark.parametrize("kind", ["save", "stop"])
def test_nobody_is_there_to_be_asked(store: Storage, kind: str) -> None:
    run = claim(store)
    asked = run_command(store, kind, run.url, "--wait", "0.2")
    assert asked.exit_code == 4 and f"error: run {run.url}: no job has heard of it in 0.2 s" in asked.stderr
    assert run.names("requests") == [], "the next job does not begin with it"


@pytest.mark.parametrize("command", ["list", "verify", "export", "save", "stop"])
def test_a_missing_run(store: Storage, command: str) -> None:
    where = f"{store.url}/nowhere"
    refused = run_command(store, command, where, *(["/tmp/out", "--to", "hf"] if command == "export" else []))
    assert refused.exit_code == 102 and refused.stderr.startswith(f"error: run {where}: there is no run here"), refused.output
    assert Storage(where, store.endpoint).names() == []


def test_an_older_format_is_refused_by_name(tmp_path: Path) -> None:
    Storage(str(tmp_path)).write("checkpoints/step-5/COMMIT.json", b'{"step": 5, "format": 2}')
    for command in (["list"], ["verify"], ["export", str(tmp_path / "out"), "--to", "hf"]):
        refused = CliRunner().invoke(main, [command[0], str(tmp_path), *command[1:]])
        assert refused.exit_code == 3 and "its format is 2, this version reads format 3" in refused.stderr


def test_from_a_shell(tmp_path: Path) -> None:
    commit(run := Storage(str(tmp_path)), 5)
    done = subprocess.run([sys.executable, "-m", "pipeline.checkpoint", "list", run.url, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 5, done.stderr
    done = subprocess.run([sys.executable, "-m", "pipeline.checkpoint", "verify", f"{run.url}-not"], capture_output=True, text=True)
    assert done.returncode == 102 and done.stderr == f"error: run {run.url}-not: there is no run here\n"
