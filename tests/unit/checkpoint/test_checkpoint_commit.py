from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import Checkpoints, Commit, read_history
from pipeline.core.errors import CheckpointError
from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage


@pytest.fixture
def said() -> Iterator[list[Event]]:
    events: list[Event] = []
    set_sink(events.append)
    yield events
    set_sink(None)


def upload(checkpoints: Checkpoints, local: Path, step: int, attempt: str = "a1") -> Commit:
    """Everything but the commit itself."""
    receipts = []
    for name, data in {
        "engine/rank0.pt": b"zero" * 1000,
        "engine/rank1.pt": b"one",
        "history.jsonl": b'{"step": 1, "x": NaN}\n{"step": %d}\n' % step,
    }.items():
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_bytes(data)
        receipts.append(checkpoints.upload(step, attempt, name, local / name))
    return Commit(step, step * 10, attempt, 2, 1, "view", receipts)


def save(checkpoints: Checkpoints, local: Path, step: int, attempt: str = "a1") -> Commit:
    commit = upload(checkpoints, local, step, attempt)
    checkpoints.commit(commit)
    return commit


def test_it_exists_once_it_is_committed(store: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store)
    assert checkpoints.steps() == [] and read_history(store) == []
    commit = upload(checkpoints, tmp_path, 5)
    assert Checkpoints(store).steps() == [] and read_history(store) == []
    with pytest.raises(CheckpointError, match=r"step-5: there is no such committed checkpoint \(committed steps: none\)"):
        checkpoints.read(5)
    checkpoints.commit(commit)
    assert Checkpoints(store).steps() == [5] and Checkpoints(store).read(5) == commit
    assert [row["step"] for row in read_history(store)] == [1, 5]
    save(checkpoints, tmp_path, 30)
    save(checkpoints, tmp_path, 200)
    assert checkpoints.steps() == [5, 30, 200]  # by number, not by name
    with pytest.raises(CheckpointError, match=r"step-6: there is no such committed checkpoint \(committed steps: 5, 30, 200\)"):
        checkpoints.read(6)


def test_fetch(store: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store)
    commit = save(checkpoints, tmp_path, 5)
    checkpoints.fetch(commit, tmp_path / "all")
    assert (tmp_path / "all/engine/rank0.pt").read_bytes() == b"zero" * 1000 and (tmp_path / "all/history.jsonl").exists()
    checkpoints.fetch(commit, tmp_path / "some", {"engine/rank1.pt"})
    assert [p.name for p in (tmp_path / "some").rglob("*") if p.is_file()] == ["rank1.pt"]


def flip(store: Storage, key: str) -> None:
    data = bytearray(store.read(key))
    data[1234] ^= 1
    store.write(key, bytes(data))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_is_noticed_set_aside_and_passed_over(store: Storage, tmp_path: Path, said: list[Event], damage: str) -> None:
    checkpoints = Checkpoints(store)
    save(checkpoints, tmp_path, 5)
    commit = save(checkpoints, tmp_path, 10)
    key = "checkpoints/step-10/a1/engine/rank0.pt"
    if damage == "flipped":
        flip(store, key)
    elif damage == "cut":
        store.write(key, b"zero")
    else:
        store.remove(key)
    words = "is missing" if damage == "missing" else "is damaged, its bytes differ from its receipt"
    with pytest.raises(CheckpointError, match=f"step-10/a1/engine/rank0.pt: {words}") as e:
        checkpoints.fetch(commit, tmp_path / "into")
    checkpoints.set_aside(commit, str(e.value))
    assert "step 10 is set aside and the checkpoint before it is used" in said[-1].text
    assert checkpoints.steps() == [5] and "SET-ASIDE-a1.json" in store.names("checkpoints/step-10")
    checkpoints.retain(1)  # what was set aside is evidence: kept, though older than the newest
    again = save(checkpoints, tmp_path, 10, "a2")  # training comes by again
    assert checkpoints.steps() == [5, 10] and checkpoints.read(10) == again
    save(checkpoints, tmp_path, 15)
    checkpoints.retain(1)
    assert checkpoints.steps() == [15]
    assert "SET-ASIDE-a1.json" in store.names("checkpoints/step-10")


def test_a_second_committer_is_refused(store: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store)
    first = save(checkpoints, tmp_path, 5)
    second = upload(checkpoints, tmp_path, 5, "a2")
    with pytest.raises(CheckpointError, match=r"step-5: another job has committed this step; is this run running twice\?"):
        checkpoints.commit(second)
    assert checkpoints.read(5) == first
    checkpoints.fetch(first, tmp_path / "into")  # untouched by the other's upload


def test_of_many_committers_one_wins(store: Storage) -> None:
    def commit(n: int) -> bool:
        try:
            Checkpoints(Storage(store.url, store.endpoint)).commit(Commit(5, 50, f"attempt{n}", 1, 0, "view", []))
            return True
        except CheckpointError:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(commit, range(8)))
    assert won.count(True) == 1 and Checkpoints(store).read(5).attempt == f"attempt{won.index(True)}"


def test_retain(store: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store)
    for step in (10, 20, 30, 40):
        save(checkpoints, tmp_path, step)
    upload(checkpoints, tmp_path, 25)  # a dead attempt
    upload(checkpoints, tmp_path, 50)  # one that may be under way
    checkpoints.retain(2)
    assert checkpoints.steps() == [30, 40]
    assert store.names("checkpoints") == ["step-30", "step-40", "step-50"]
    for step in (30, 40):
        checkpoints.fetch(checkpoints.read(step), tmp_path / "into")
    checkpoints.retain(9)
    assert checkpoints.steps() == [30, 40]
    checkpoints.retain(1)
    assert checkpoints.steps() == [40]


def test_retain_without_checkpoints(store: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store)
    checkpoints.retain(1)
    upload(checkpoints, tmp_path, 5)
    checkpoints.retain(1)
    assert store.names("checkpoints") == ["step-5"]


def test_commits_of_another_kind(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    checkpoints.commit(replace(Commit(5, 50, "a", 1, 0, "view", []), format=99))
    store.write("checkpoints/step-6/COMMIT.json", b"{")
    with pytest.raises(CheckpointError, match=r"step-5: its format is 99, this version reads format 2"):
        checkpoints.read(5)
    with pytest.raises(CheckpointError, match=r"step-6: its COMMIT.json is not JSON"):
        checkpoints.read(6)
