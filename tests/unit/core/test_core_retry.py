"""What a store that stays away is called: as who asked it calls it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from pipeline.checkpoint import Checkpoints
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.read import read_into
from pipeline.core import retry
from pipeline.core.errors import InfrastructureError, StorageError
from pipeline.core.retry import insist
from pipeline.core.storage import Storage
from pipeline.shards.table import ShardTable
from pipeline.stream.look import read_indices
from tests.checkpoints import commit_fragments
from tests.faults import faulty_store

S3 = tuple[str, Callable[[], str]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSE", 0.001)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)


def test_a_checkpoint_is_no_data(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3[1]() + "/run"
    state = [Fragment("weight", "a", 0, torch.zeros(1000))]
    commit = commit_fragments(checkpoints := Checkpoints(Storage(url, s3[0])), checkpoints.acquire(), state, 5, {})
    with faulty_store(s3[0]) as (proxy, store):
        behind = Checkpoints(Storage(url, proxy))
        monkeypatch.setattr(type(behind.directory.fs), "retries", 1)  # the client's own, which take seconds
        store.plan = lambda method, path: "error" if path.endswith(".safetensors") else None
        with pytest.raises(InfrastructureError, match=rf"^checkpoint {url}/checkpoints/step-5/.*: could not be read in 3 attempts \("):
            read_into(behind, commit, behind.indices(commit), state)


@pytest.mark.parametrize("name", ["shards.parquet", "train-00000.index.parquet"])
def test_data_is(s3: S3, name: str, monkeypatch: pytest.MonkeyPatch, make_dataset: Callable[..., object]) -> None:
    url = s3[1]() + "/data"
    make_dataset(Storage(url, s3[0]), {"train": 4})
    with faulty_store(s3[0]) as (proxy, store):
        directory = Storage(url, proxy)
        monkeypatch.setattr(type(directory.fs), "retries", 1)
        store.plan = lambda method, path: "error" if method == "GET" and path.endswith(name) else None
        with pytest.raises(InfrastructureError, match=rf"^data {url}/{name}: could not be read in 3 attempts \("):
            list(read_indices(directory, ShardTable(directory, "train"), [0]))


def test_patience_begins_with_the_first_failure() -> None:
    """An upload that takes longer than that, and fails then, is tried again."""
    took: list[float] = []

    def slow(failures: int) -> str:
        time.sleep(0.3)
        took.append(0.3)
        if len(took) <= failures:
            raise StorageError("slow down")
        return "done"

    assert insist(lambda: slow(1), 0.2, lambda text: None) == "done" and len(took) == 2
    took.clear()
    with pytest.raises(StorageError):
        insist(lambda: slow(100), 0.5, lambda text: None)
    assert 2 <= len(took) <= 4


def test_no_pause_goes_beyond_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses grow to half a minute, and somebody else may give up before: patience is when the last attempt is made."""
    monkeypatch.setattr(retry, "_PAUSE", 1e6)
    monkeypatch.setattr(retry, "_LONGEST", 1e6)
    tried: list[float] = []

    def fail() -> None:
        tried.append(time.monotonic())
        raise StorageError("slow down")

    with pytest.raises(StorageError):
        insist(fail, 0.3, lambda text: None)
    assert len(tried) == 2 and 0.3 <= tried[1] - tried[0] < 100
