"""A job's ledger on real stores: what it holds, and that neither a store that hangs nor one that fails costs training anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint import Run, claim_run, ledger
from pipeline.checkpoint.goodput import DIVERGED, FAILED, FINISHED, PREEMPTED, REGROUPED, Job, read_jobs, summarise
from pipeline.checkpoint.ledger import Ledger
from pipeline.config import parse_config
from pipeline.core.errors import Diverged, Preempted, TesseraError
from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage
from pipeline.core.world import World
from tests.faults import faulty_store

STEP, STEPS = 20e-6, 100_000  # seconds that a step may cost


@pytest.fixture
def said() -> Iterator[list[Event]]:
    events: list[Event] = []
    set_sink(events.append)
    yield events
    set_sink(None)


def make_run(storage: Storage) -> Run:
    config = {
        "name": "run", "storage": {"url": storage.url, "endpoint": storage.endpoint}, "tracking": {"uri": "http://m"}, "data": "/d",
        "cluster": {"name": "local", "price": 2.5, "currency": "EUR"}, "pretrain": {"model": "vit_b16", "duration": "1 epoch"},
    }  # fmt: skip
    return claim_run(parse_config(config))


def read(run: Run) -> Job:
    """The newest job's."""
    return read_jobs(run.directory, run.id)[-1]


def eventually(is_so: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(kept: Ledger) -> None:
    """As kill -9 just after a sign of life: nobody says how the job ended."""
    assert kept._thread is not None
    kept._over.set()
    kept._wake.set()
    kept._thread.join(30)
    kept._thread = None


def test_a_job_and_the_one_after_it(store: Storage) -> None:
    run, began = make_run(store), time.time()
    with Ledger(run, World(size=2)) as first:
        first.open(1)
        time.sleep(0.05)
        first.begin(0, None, 10)
        for step in range(1, 6):
            time.sleep(0.02)
            first.step(step, waited=0.01 * step, saved=0.003 * (step > 3))
            if step == 3:
                first.save()
            if step == 4:
                first.commit(3, saved=0.003)
        time.sleep(0.05)  # in the sixth step
        kill(first)
    job = read(run)
    assert (job.generation, job.workers, job.gpus, job.price, job.currency) == (1, 2, 0, 2.5, "EUR")
    assert (job.first, job.origin, job.steps, job.step, job.end) == (0, None, 10, 5, None)
    assert began - 0.01 <= job.began and job.starting >= 0.05 and (job.waiting, job.saving) == (0.05, 0.003)
    assert job.starting + job.productive + job.waiting + job.saving <= job.seconds - 0.05 <= time.time() - began
    [(step, productive)] = job.commits
    assert step == 3 and 0.03 <= productive < job.productive

    with Ledger(run, World(size=2)) as second:
        second.open(2)
        assert second.seen() == (job.seconds, 1)
        second.begin(3, 1, 10)
        second.step(10, 0.0, 0.0)
        second.save()
        second.commit(10, 0.001)
        found = second.goodput()
    assert found is not None and found.seconds["lost"] == pytest.approx(job.loop - productive) and found.failures == 1
    jobs = read_jobs(run.directory, run.id)
    assert [j.end for j in jobs] == [None, FINISHED] and jobs[1].loop == pytest.approx(jobs[1].productive)
    assert summarise(jobs).whole == pytest.approx(jobs[1].last_seen - jobs[0].began, abs=1e-3)


@pytest.mark.parametrize(
    ("error", "end", "reason"),
    [
        (None, FINISHED, ""), (Preempted("asked to end"), PREEMPTED, ""), (Diverged("the loss is nan"), DIVERGED, "the loss is nan"),
        (RuntimeError("Connection closed by peer\nmore"), FAILED, "RuntimeError: Connection closed by peer"),
    ],
)  # fmt: skip
def test_how_it_ended(tmp_path: Path, error: BaseException | None, end: str, reason: str) -> None:
    run = make_run(Storage(str(tmp_path)))
    try:
        with Ledger(run, World()) as kept:
            kept.open(1)
            kept.begin(0, None, 5)
            kept.step(1, 0.0, 0.0)
            time.sleep(0.05)
            if error:
                raise error
    except (TesseraError, RuntimeError):
        pass
    job = read(run)
    assert (job.end, job.reason) == (end, reason)
    assert (job.saving > 0.04) == (end in (FINISHED, PREEMPTED)), "what followed its last step was its checkpoint, or it was lost"
    assert (job.loop - job.productive > 0.04) == (end in (DIVERGED, FAILED))


def test_another_group_goes_on_and_starting_may_fail(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    with Ledger(run, World()) as kept:
        kept.open(1)
        kept.begin(0, None, 5)
        kept.is_finished = False
    assert read(run).end == REGROUPED
    with pytest.raises(ValueError, match="no model"), Ledger(run, World()) as kept:
        kept.open(2)
        raise ValueError("no model")
    job = read(run)
    assert (job.end, job.first, job.loop) == (FAILED, None, 0.0) and job.starting == job.seconds > 0


def test_a_fresh_run_has_a_fresh_ledger(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    with Ledger(run, World()) as kept:
        kept.open(1)
    assert len(read_jobs(run.directory)) == 1
    anew = claim_run(run.config, fresh=True)
    assert read_jobs(anew.directory) == [] and anew.id != run.id
    run.directory.write("goodput/000001.json", kept.job().to_json())  # the old job is still there
    assert read_jobs(anew.directory, anew.id) == []


def test_other_ranks_and_jobs_without_a_lease_write_nothing(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    with Ledger(run, World(1, 2)) as other:
        other.open(1)
        other.begin(0, None, 5)
        other.step(1, 0.0, 0.0)
        assert other.goodput() is None and other.seen() == (0, 0)
    with Ledger(run, World()):
        pass  # the lease was never got
    assert read_jobs(run.directory) == []


def test_it_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_WRITE_EVERY", 0.05)
    run = make_run(Storage(str(tmp_path)))
    with Ledger(run, World()) as kept:
        kept.open(1)
        kept.begin(0, None, 5)
        for step in range(1, 4):
            kept.step(step, 0.0, 0.0)
            eventually(lambda step=step: any(job.step == step for job in read_jobs(run.directory)))  # type: ignore[misc]
        before = read(run).seconds
        eventually(lambda: read(run).seconds > before)


def test_many_checkpoints_fit(tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)))
    with Ledger(run, World()) as kept:
        kept.open(1)
        kept.begin(0, None, 10_000)
        for step in range(1, 10_001):
            kept.step(step, 0.0, 0.0)
            kept.save()
            kept.commit(step, 0.0)
    job = read(run)
    assert 200 <= len(job.commits) <= 400 and job.commits[-1][0] == 10_000
    assert [step for step, _ in job.commits[-100:]] == list(range(9901, 10_001)), "a resume goes on from one of the newest"
    assert len(job.to_json()) < 50_000


@pytest.mark.parametrize("fault", ["stall", "error", "reset"])
def test_a_store_that_hangs_or_fails_costs_a_step_nothing(
    fault: str, s3: tuple[str, Callable[[], str]], monkeypatch: pytest.MonkeyPatch, said: list[Event]
) -> None:
    """And what could not be written is written when it is back."""
    endpoint, make_bucket = s3
    monkeypatch.setattr(ledger, "_WRITE_EVERY", 0.1)
    monkeypatch.setattr(ledger, "_LAST_WORD", 30.0)
    with faulty_store(endpoint) as (broken, plan):
        run = make_run(Storage(f"{make_bucket()}/runs", broken))
        plan.stall = 3.0
        plan.plan = lambda method, path: fault if "/goodput/" in path and method == "PUT" else None
        with Ledger(run, World()) as kept:
            kept.open(1)
            kept.begin(0, None, STEPS)
            began = time.perf_counter()
            kept.step(1, 0.0, 0.0)
            kept.save()
            kept.commit(1, 0.0)
            assert time.perf_counter() - began < 0.01
            eventually(lambda: plan.seen[fault] > 0)
            began = time.perf_counter()
            for step in range(2, STEPS + 1):
                kept.step(step, 0.0, 0.0)
            assert time.perf_counter() - began < STEP * STEPS, "less than the store hangs"
            plan.plan = lambda method, path: None
        assert (read(run).end, read(run).step, read(run).commits[0][0]) == (FINISHED, STEPS, 1)
        assert not any("how this job ended" in event.text for event in said)


def test_the_end_waits_for_a_store_that_hangs_only_so_long(
    s3: tuple[str, Callable[[], str]], monkeypatch: pytest.MonkeyPatch, said: list[Event]
) -> None:
    endpoint, make_bucket = s3
    monkeypatch.setattr(ledger, "_LAST_WORD", 1.0)
    with faulty_store(endpoint) as (broken, plan):
        run = make_run(Storage(f"{make_bucket()}/runs", broken))
        plan.stall = 5.0
        plan.plan = lambda method, path: "stall" if "/goodput/" in path and method == "PUT" else None
        with Ledger(run, World()) as kept:
            kept.open(1)
            kept.begin(0, None, 5)
            began = time.perf_counter()
        assert 0.9 < time.perf_counter() - began < 2.0 and kept.job().seconds < 0.9
        assert any("how this job ended could not be written" in event.text for event in said)


def test_earlier_ledgers_that_cannot_be_read_stop_nothing(
    s3: tuple[str, Callable[[], str]], said: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, make_bucket = s3
    with faulty_store(endpoint) as (broken, plan):
        run = make_run(Storage(f"{make_bucket()}/runs", broken))
        with Ledger(run, World()) as kept:
            kept.open(1)
        plan.plan = lambda method, path: "error" if "/goodput/" in path and method == "GET" else None
        with Ledger(run, World()) as kept:
            kept.open(2)
            assert kept.goodput() is None and kept.seen() == (0, 0)
        assert any("what earlier jobs did with their time cannot be read" in event.text for event in said)
        plan.plan = lambda method, path: None
        assert [job.generation for job in read_jobs(run.directory)] == [1, 2]
