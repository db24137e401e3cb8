"""Leases, commits and what stays, on files and on the stores of three clouds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import Checkpoints, Commit, Lease, read_history
from pipeline.checkpoint.commit import FORMAT
from pipeline.checkpoint.lease import check_conditional
from pipeline.checkpoint.retain import Retention, retain, to_keep
from pipeline.core.errors import CheckpointError, ExitCode, Fenced, StorageError
from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage
from pipeline.core.upload import Receipt
from tests.clouds import Conditions


@pytest.fixture
def store(any_store: Storage) -> Storage:
    return any_store


@pytest.fixture
def said() -> Iterator[list[Event]]:
    events: list[Event] = []
    set_sink(events.append)
    yield events
    set_sink(None)


def upload(checkpoints: Checkpoints, lease: Lease, step: int, attempt: str = "a", **changes: Any) -> Commit:
    """Everything but the commit itself."""
    name, prefix = f"g{lease.generation}-{attempt}", f"step-{step}/g{lease.generation}-{attempt}"
    receipts = []
    for file, data in {"rank.bin": b"zero" * 1000, "history.jsonl": b'{"step": 1, "x": NaN}\n{"step": %d}\n' % step}.items():
        checkpoints.directory.write(f"{prefix}/{file}", data)
        receipts.append(Receipt(file, len(data), hashlib.sha256(data).hexdigest()))
    return Commit(step, step * 10, lease.generation, name, 2, 1, "view", "config", receipts, **changes)


def save(checkpoints: Checkpoints, lease: Lease, step: int, attempt: str = "a", **changes: Any) -> Commit:
    commit = upload(checkpoints, lease, step, attempt, **changes)
    checkpoints.commit(commit, lease)
    return commit


def test_it_exists_once_it_is_committed(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    assert checkpoints.steps() == [] and read_history(store) == []
    lease = checkpoints.acquire()
    commit = upload(checkpoints, lease, 5)
    assert Checkpoints(store).steps() == [] and read_history(store) == []
    with pytest.raises(CheckpointError, match=r"step-5: there is no such committed checkpoint \(committed steps: none\)"):
        checkpoints.read(5)
    checkpoints.commit(commit, lease)
    assert Checkpoints(store).steps() == [5] and Checkpoints(store).read(5) == commit
    assert [row["step"] for row in read_history(store)] == [1, 5]
    save(checkpoints, lease, 30)
    save(checkpoints, lease, 200)
    assert checkpoints.steps() == [5, 30, 200]  # by number, not by name
    with pytest.raises(CheckpointError, match=r"step-6: there is no such committed checkpoint \(committed steps: 5, 30, 200\)"):
        checkpoints.read(6)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_is_noticed_set_aside_and_passed_over(store: Storage, said: list[Event], damage: str) -> None:
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    commit = save(checkpoints, lease, 10)
    key = "checkpoints/step-10/g1-a/rank.bin"
    if damage == "flipped":
        data = bytearray(store.read(key))
        data[1234] ^= 1
        store.write(key, bytes(data))
    elif damage == "cut":
        store.write(key, b"zero")
    else:
        store.remove(key)
    words = "is missing" if damage == "missing" else "is damaged, its bytes differ from its receipt"
    with pytest.raises(CheckpointError, match=rf"step-10/g1-a/rank\.bin: {words}") as e:
        checkpoints.fetch(commit, "rank.bin")
    checkpoints.set_aside(commit, str(e.value))
    assert "step 10 is set aside and the checkpoint before it is used" in said[-1].text
    assert checkpoints.steps() == [5]
    again = save(checkpoints, lease, 10, "b")  # training comes by again
    assert checkpoints.steps() == [5, 10] and checkpoints.read(10) == again
    retain(checkpoints, lease, Retention(keep=1))
    assert "SET-ASIDE-g1-a.json" in store.names("checkpoints/step-10"), "somebody may want to look at it"
    save(checkpoints, lease, 15)
    retain(checkpoints, lease, Retention(keep=1))
    assert checkpoints.steps() == [15] and store.names("checkpoints/step-10") == [], "not for ever"


def test_an_earlier_format_is_refused_by_name(store: Storage) -> None:
    store.write("checkpoints/step-7/COMMIT.json", json.dumps({"step": 7, "format": 2}).encode())
    with pytest.raises(CheckpointError, match=rf"step-7: its format is 2, this version reads format {FORMAT}"):
        Checkpoints(store).commits()
    with pytest.raises(CheckpointError, match=r"step-7: its format is 2"):
        Checkpoints(store).acquire()
    Checkpoints(store).clear()
    assert Checkpoints(store).acquire().base == []


DAMAGED = (b"no JSON", b"", b"[]", b'{"format": 3, "step": 7}')


@pytest.mark.parametrize("data", DAMAGED)
def test_a_commit_that_cannot_be_read_is_set_aside_and_passed_over(tmp_path: Path, said: list[Event], data: bytes) -> None:
    store = Storage(str(tmp_path))
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    save(checkpoints, lease, 7)
    store.write("checkpoints/step-7/COMMIT.json", data)
    assert checkpoints.steps() == [5] and "step-7: its COMMIT.json is damaged" in said[-1].text
    newer = checkpoints.acquire()
    assert newer.base == [(5, "g1-a")] and sorted(store.names("checkpoints/step-7")) == ["SET-ASIDE-g1-a.json", "g1-a"]
    save(checkpoints, newer, 7, "b")
    assert checkpoints.steps() == [5, 7]


def test_where_no_commit_can_be_read_nothing_begins_from_nothing(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    save(Checkpoints(store), Checkpoints(store).acquire(), 5)
    store.write("checkpoints/step-5/COMMIT.json", b"")
    with pytest.raises(CheckpointError, match=r"all are damaged and set aside; with --fresh it begins again from where it began"):
        Checkpoints(store).acquire()
    with pytest.raises(CheckpointError, match=r"with --fresh it begins again"):
        Checkpoints(store).acquire()  # nor with the same command
    Checkpoints(store).clear()
    assert Checkpoints(store).acquire().base == []


def test_a_commit_that_was_damaged_on_its_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(str(tmp_path))
    checkpoints = Checkpoints(store)
    save(checkpoints, checkpoints.acquire(), 5)
    read, damaged = Storage.read, [True]

    def once(self: Storage, key: str) -> bytes:
        return b"{" if key.endswith("COMMIT.json") and damaged and damaged.pop() else read(self, key)

    monkeypatch.setattr(Storage, "read", once)
    assert checkpoints.steps() == [5] and not damaged


def test_data_of_a_commit_that_cannot_be_read_is_not_removed(store: Storage, said: list[Event]) -> None:
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    for step in (10, 20, 30):
        save(checkpoints, lease, step)
    store.write("checkpoints/step-20/COMMIT.json", b"garbled")
    retain(checkpoints, lease, Retention(keep=3))
    assert sorted(store.names("checkpoints/step-20")) == ["COMMIT.json", "g1-a"] and checkpoints.steps() == [10, 30]


def test_a_damaged_lease_is_named(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    Checkpoints(store).acquire()
    store.write("checkpoints/leases/000001.json", b"{}")
    with pytest.raises(CheckpointError, match=r"its lease leases/000001.json is damaged .*; remove that file, where no job is at work"):
        Checkpoints(store).acquire()


# Several jobs


def test_an_older_job_that_wakes_up_is_refused(store: Storage) -> None:
    old, new = Checkpoints(store), Checkpoints(Storage(store.url, store.endpoint))
    lease = old.acquire()
    save(old, lease, 5)
    late = upload(old, lease, 10)
    newer = new.acquire()
    assert (newer.generation, newer.base) == (2, [(5, "g1-a")])
    with pytest.raises(Fenced, match=r"another job .* has taken it up since this one began") as e:
        old.commit(late, lease)
    assert e.value.exit_code == ExitCode.STOPPED
    assert old.steps() == new.steps() == [5]
    save(new, newer, 10)
    assert new.read(10).generation == 2


def test_a_commit_that_slips_in_beside_the_check_counts_for_nobody(store: Storage) -> None:
    """The old job has looked at the leases, is stopped for a day, and writes its commit then."""
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    late = upload(checkpoints, lease, 10)
    newer = checkpoints.acquire()
    checkpoints.directory.create("step-10/COMMIT.json", json.dumps(asdict(late)).encode())
    assert checkpoints.steps() == [5] and read_history(store)[-1]["step"] == 5
    with pytest.raises(CheckpointError, match="no such committed checkpoint"):
        checkpoints.read(10)
    commit = save(checkpoints, newer, 10, "b")
    assert checkpoints.read(10) == commit, "it is out of the way of the new job's"
    retain(checkpoints, newer, Retention(keep=2))
    assert store.names("checkpoints/step-10") == ["COMMIT.json", "g2-b"], "what the old job left is gone"


def test_the_newest_is_of_the_newest_job(store: Storage) -> None:
    """A job that goes back to an earlier step does not come across what it left behind."""
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    for step in (5, 10, 15):
        save(checkpoints, lease, step)
    back = checkpoints.acquire(upto=5)
    assert checkpoints.steps() == [5]
    save(checkpoints, back, 10, "b")
    assert checkpoints.steps() == [5, 10] and checkpoints.commits()[-1].generation == 2
    retain(checkpoints, back, Retention(keep=5))
    assert checkpoints.steps() == [5, 10] and store.names("checkpoints/step-15") == []
    save(checkpoints, back, 15, "b")
    assert checkpoints.read(15).attempt == "g2-b"


def test_a_step_is_committed_once(store: Storage) -> None:
    """An answer that was lost has a job commit the same step again: the first commit stands."""
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    first = save(checkpoints, lease, 5)
    assert checkpoints.commit(first, lease) == checkpoints.commit(upload(checkpoints, lease, 5, "b"), lease) == first
    assert checkpoints.read(5) == first and checkpoints.fetch(first, "rank.bin")


def test_a_step_of_a_job_before_is_not_committed_again(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    first = save(checkpoints, checkpoints.acquire(), 5)
    newer = checkpoints.acquire()
    with pytest.raises(CheckpointError, match=r"step-5: this step has been committed already; is this run running twice\?"):
        save(checkpoints, newer, 5, "b")
    assert checkpoints.read(5) == first


def test_of_many_committers_one_wins(store: Storage) -> None:
    lease = Checkpoints(store).acquire()

    def commit(n: int) -> bool:
        own = Commit(5, 50, 1, f"g1-{n}", 1, 0, "view", "config", [])
        return Checkpoints(Storage(store.url, store.endpoint)).commit(own, lease) == own

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(commit, range(8)))
    assert won.count(True) == 1 and Checkpoints(store).read(5).attempt == f"g1-{won.index(True)}"


def test_a_job_that_commits_while_another_takes_over_is_not_lost(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit comes between the other's look at the commits and the other's lease, and what that looked at is removed."""
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    create, late = Storage.create, []

    def commit_first(self: Storage, key: str, data: bytes) -> bool:
        if key == "leases/000002.json" and not late:
            late.append(10)
            save(checkpoints, lease, 10)
            retain(checkpoints, lease, Retention(1))
        return create(self, key, data)

    monkeypatch.setattr(Storage, "create", commit_first)
    newer = Checkpoints(store).acquire()
    assert newer.base == [(10, "g1-a")] and checkpoints.steps() == [10] and newer.generation == 3


def test_where_the_condition_is_ignored_the_last_one_holds(gs: tuple[str, Conditions], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage("gs://lab/careless-jobs", gs[0])
    monkeypatch.setattr(gs[1], "is_kept", False)
    checkpoints = Checkpoints(store)
    first = checkpoints.acquire()
    other = replace(first, owner="somebody else", token="another")
    store.write("checkpoints/leases/000001.json", json.dumps(asdict(other)).encode())  # at the same time, the same generation
    with pytest.raises(Fenced, match=r"another job \(somebody else\) has taken it up"):
        save(checkpoints, first, 5)
    save(checkpoints, other, 5, "b")
    assert checkpoints.steps() == [5]


def test_of_many_jobs_each_gets_a_lease_of_its_own(store: Storage) -> None:
    with ThreadPoolExecutor(6) as pool:
        leases = list(pool.map(lambda _: Checkpoints(Storage(store.url, store.endpoint)).acquire(), range(6)))
    assert sorted(lease.generation for lease in leases) == [1, 2, 3, 4, 5, 6]


def test_a_store_that_keeps_to_the_condition_is_accepted(store: Storage) -> None:
    check_conditional(store, is_needed=True)
    assert store.names() == [], "the probe is gone"


def test_a_store_that_ignores_the_condition_is_refused(gs: tuple[str, Conditions], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage("gs://lab/careless", gs[0])
    monkeypatch.setattr(gs[1], "is_kept", False)
    with pytest.raises(StorageError, match=r"overwrites what it was told not to overwrite.*storage.conditional: false"):
        check_conditional(store, is_needed=True)
    check_conditional(store, is_needed=False)
    assert store.names() == []


# What stays


def test_retain(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    for step in (10, 20, 30, 40):
        save(checkpoints, lease, step)
    upload(checkpoints, lease, 25)  # attempts that came to nothing
    upload(checkpoints, lease, 50)
    retain(checkpoints, lease, Retention(keep=2))
    assert checkpoints.steps() == [30, 40]
    assert [name for name in store.names("checkpoints") if name != "leases"] == ["step-30", "step-40"]
    for step in (30, 40):
        assert checkpoints.fetch(checkpoints.read(step), "rank.bin")
    retain(checkpoints, lease, Retention(keep=9))
    assert checkpoints.steps() == [30, 40]


def test_an_older_job_removes_nothing_of_a_newer(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 10)
    newer = checkpoints.acquire()
    for step in (20, 30):
        save(checkpoints, newer, step)
    upload(checkpoints, newer, 40)  # under way
    with pytest.raises(Fenced):
        retain(checkpoints, lease, Retention(keep=1))
    assert checkpoints.steps() == [10, 20, 30] and store.names("checkpoints/step-40") == ["g2-a"]


def commit_at(step: int, **metrics: float) -> Commit:
    return Commit(step, step, 1, f"g1-{step}", 1, 0, "view", "config", [], metrics)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), {50, 60}),
        (Retention(1, permanent=20), {20, 40, 60}),
        (Retention(1, best="validate/loss"), {30, 60}),
        (Retention(1, best="validate/accuracy", is_higher_better=True), {20, 60}),
        (Retention(1, best="validate/unknown"), {60}),
        (Retention(1, permanent=25, best="validate/loss"), {30, 50, 60}),
        (Retention(100), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_stays(retention: Retention, kept: set[int]) -> None:
    nan = float("nan")
    losses, accuracies = (5.0, 4.0, 1.0, 1.0, nan, 3.0), (0.1, 0.9, 0.2, 0.9, nan, 0.3)  # of two equally good the first stays
    commits = [
        commit_at(10 * n, **{"validate/loss": loss, "validate/accuracy": accuracy})
        for n, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1)
    ]
    assert to_keep(commits, retention) == kept


def test_what_stays_for_ever_where_saves_fall_beside_its_multiples() -> None:
    """And stays the same while the run goes on."""
    steps, there = (997, 1001, 1500, 1999, 2003, 2990), []
    for step in steps:
        there.append(commit_at(step))
        kept = to_keep(there, Retention(1, permanent=1000))
        there = [commit for commit in there if commit.step in kept]
    assert [commit.step for commit in there] == [1001, 2003, 2990]


def test_a_run_that_starts_anew_is_not_that_of_an_old_job(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    late = upload(checkpoints, lease, 10)
    checkpoints.clear()
    assert checkpoints.steps() == []
    with pytest.raises(Fenced):
        checkpoints.commit(late, lease)
    assert checkpoints.acquire().generation == 3 and checkpoints.steps() == []
    with pytest.raises(Fenced):
        checkpoints.commit(late, lease)


def test_leases_do_not_pile_up(store: Storage) -> None:
    checkpoints = Checkpoints(store)
    for _ in range(25):
        lease = checkpoints.acquire()
    save(checkpoints, lease, 5)
    retain(checkpoints, lease, Retention(1))
    assert len(store.names("checkpoints/leases")) == 20 and checkpoints.newest_lease() == lease


def test_what_a_killed_job_had_in_flight_is_given_up(s3: tuple[str, Callable[[], str]]) -> None:
    """Parts of an upload that nobody finishes are in no listing."""
    store = Storage(s3[1]() + "/run", s3[0])
    bucket = store.path.split("/")[0]
    begun = ["run/checkpoints/step-5/g1-a/rank-00000-of-00001.safetensors", "elsewhere/step-5/rank.bin"]
    for key in begun:
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    Checkpoints(store).acquire()
    assert [u["Key"] for u in store.fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]] == begun[1:]
