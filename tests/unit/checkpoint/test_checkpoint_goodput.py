"""Where the time went: sums over the jobs of a run, against a simulation that follows every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.goodput import (
    DIVERGED,
    FAILED,
    FINISHED,
    KINDS,
    PREEMPTED,
    REGROUPED,
    STOPPED,
    Job,
    end_of,
    key_of,
    read_jobs,
    seen,
    summarise,
)
from pipeline.core.errors import Diverged, Fenced, InfrastructureError, Preempted
from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage

DAY = 86_400.0
seconds = st.floats(0, 1000, allow_nan=False)


def make_job(generation: int = 1, **values: Any) -> Job:
    return Job(**{"run": "id", "generation": generation, "began": 0.0, "seconds": 0.0, "workers": 1, "gpus": 0, "starting": 0.0, **values})


@dataclass(frozen=True)
class Step:
    wait: float
    compute: float
    stall: float
    commits: bool


@dataclass(frozen=True)
class Plan:
    """What happens to one job; `back`: newest checkpoints that are damaged as it begins; `gets_to`: whether it gets to its loop."""

    idle: float
    starting: float
    gets_to: bool
    back: int
    steps: list[Step]
    unfinished: float
    end: str | None


steps = st.builds(Step, seconds, seconds, seconds, st.booleans())
plans = st.builds(
    Plan, seconds, seconds, st.sampled_from([True, True, True, False]), st.sampled_from([0, 0, 0, 1, 2]), st.lists(steps, max_size=6),
    seconds, st.sampled_from([None, FAILED, STOPPED, DIVERGED, PREEMPTED, REGROUPED]),
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the seconds of each step that led to it."""

    step: int
    generation: int
    path: tuple[float, ...]


def simulate(plans: list[Plan], last: str | None) -> tuple[list[Job], dict[str, float]]:
    """The ledgers of these jobs, the last of which ends as `last` says; and the truth, followed step by step."""
    jobs: list[Job] = []
    truth = dict.fromkeys(KINDS, 0.0)
    saved: list[Saved] = []
    path: tuple[float, ...] = ()
    now, in_loop = 1e9, 0.0
    for number, plan in enumerate(plans):
        is_last, generation = number == len(plans) - 1, number + 1
        end = last if is_last else plan.end
        now += plan.idle if number else 0.0
        truth["idle"] += plan.idle if number else 0.0
        began = now
        now += plan.starting
        truth["restart"] += plan.starting
        if not plan.gets_to:
            end = None if end in (FINISHED, PREEMPTED, REGROUPED) else end
            jobs.append(make_job(generation, began=began, seconds=plan.starting, starting=plan.starting, end=end))
            path = saved[-1].path if saved else ()  # what the next one will go on from, as far as anybody knows
            continue
        saved = saved[: max(0, len(saved) - plan.back)]
        base = saved[-1] if saved else None
        path, first = (base.path, base.step) if base else ((), 0)
        step, productive, waiting, saving = first, 0.0, 0.0, 0.0
        commits: list[tuple[int, float]] = []
        in_order = end in (FINISHED, PREEMPTED, REGROUPED)
        for position, each in enumerate(plan.steps):
            step, path = step + 1, (*path, each.compute)
            productive, waiting = productive + each.compute, waiting + each.wait
            if each.commits or (in_order and position == len(plan.steps) - 1):
                saving += each.stall
                commits.append((step, productive))
                saved = [*saved, Saved(step, generation, path)]
        unfinished = 0.0 if in_order else plan.unfinished
        now += productive + waiting + saving + unfinished
        in_loop += productive + unfinished
        truth["input wait"] += waiting
        truth["save"] += saving
        jobs.append(
            make_job(
                generation, began=began, seconds=now - began, starting=plan.starting, productive=productive, waiting=waiting, saving=saving,
                first=first, origin=base.generation if base else None, step=step, commits=commits, end=end,
            )
        )  # fmt: skip
        goes_on = is_last and end in (None, FINISHED)
        path = (*path, unfinished) if goes_on else saved[-1].path if saved else ()
    truth["productive"] = sum(path)
    truth["lost"] = in_loop - sum(path)
    return jobs, truth


@given(st.lists(plans, min_size=1, max_size=7), st.sampled_from([None, FINISHED, FAILED, PREEMPTED]))
def test_the_sums_are_those_of_every_step_and_add_up_to_the_wall_time(plans: list[Plan], last: str | None) -> None:
    jobs, truth = simulate(plans, last)
    found = summarise(jobs)
    assert found.seconds == pytest.approx(truth, rel=1e-9, abs=1e-3)  # wall clocks are around 1e9
    assert found.whole == pytest.approx(jobs[-1].last_seen - jobs[0].began, abs=1e-3)
    assert min(found.seconds.values()) >= 0 and 0 <= found.fraction <= 1
    assert sum(found.shares().values()) == pytest.approx(1.0 if found.whole else 0.0)
    assert found.jobs == len(jobs)


@given(st.lists(plans, min_size=2, max_size=6), st.data(), st.sampled_from([-DAY, DAY]))
def test_a_clock_that_is_wrong_spoils_nothing_but_idle(plans: list[Plan], data: st.DataObject, skew: float) -> None:
    jobs, _ = simulate(plans, None)
    wrong = data.draw(st.integers(0, len(jobs) - 1))
    skewed = [replace(job, began=job.began + skew) if number == wrong else job for number, job in enumerate(jobs)]
    right, found = summarise(jobs).seconds, summarise(skewed).seconds
    assert {**found, "idle": 0} == {**right, "idle": 0} and found["idle"] >= 0


# Step 100 is committed 50 s before the first job dies at step 150; the second one repeats those steps.
DIED = make_job(
    1, began=1000.0, seconds=180.0, starting=20.0, productive=150.0, waiting=4.0, saving=1.0, first=0, step=150, commits=[(50, 50.0), (100, 100.0)],
    workers=4, price=3.0, currency="EUR",
)  # fmt: skip
SECOND = make_job(
    2, began=1200.0, seconds=130.0, starting=10.0, productive=110.0, saving=10.0, first=100, origin=1, step=200, commits=[(200, 110.0)], end=FINISHED,
    workers=2, price=1.5, currency="EUR",
)  # fmt: skip


def test_a_run_that_died_once() -> None:
    found = summarise([SECOND, DIED])  # in any order
    lost = 50.0 + 5.0  # and the step it died in
    assert found.seconds == {"productive": 210.0, "input wait": 4.0, "save": 11.0, "lost": lost, "restart": 30.0, "idle": 20.0}
    assert (found.jobs, found.failures, found.whole) == (2, 1, 330.0)
    assert found.cost is not None
    assert found.cost["productive"] == pytest.approx((100 * 4 * 3 + 110 * 2 * 1.5) / 3600)
    assert found.cost["lost"] == pytest.approx(lost * 12 / 3600) and found.cost["idle"] == 0
    assert found.in_words() == "63.6% of 5 min 30 s was training that counts; 2 jobs, 1 failure; 0.71 EUR, of which 0.42 EUR went into it"
    assert found.metrics() == {
        "goodput/fraction": 210 / 330, "goodput/productive_s": 210.0, "goodput/input_wait_s": 4.0, "goodput/save_s": 11.0,
        "goodput/lost_s": 55.0, "goodput/restart_s": 30.0, "goodput/idle_s": 20.0, "goodput/jobs": 2, "goodput/failures": 1,
        "goodput/cost": pytest.approx((180 * 12 + 130 * 3) / 3600),
    }  # fmt: skip


def test_what_a_dead_job_lost_is_known_as_the_next_one_begins() -> None:
    alive = summarise([DIED])
    assert (alive.seconds["lost"], alive.seconds["productive"], alive.failures) == (0, 155.0, 0), "for all that is known it is running"
    starting = summarise([DIED, make_job(2, began=1200.0, seconds=5.0, starting=5.0)])
    assert (starting.seconds["lost"], starting.seconds["productive"], starting.failures) == (55.0, 100.0, 1)
    said_so = summarise([replace(DIED, end=FAILED)])
    assert (said_so.seconds["lost"], said_so.failures) == (55.0, 1)


def test_what_a_job_took_back_itself_is_lost() -> None:
    """It went wrong, went back to a checkpoint and on: 100 s, 10 of them to start, 20 of input, 5 for saves, 25 on what did not stay."""
    spent = {"starting": 10.0, "waiting": 20.0, "saving": 5.0, "lost": 25.0, "productive": 38.0, "seconds": 100.0}
    job = make_job(first=0, step=30, steps=30, commits=[(10, 12.0), (30, 38.0)], end=FINISHED, **spent)
    goodput = summarise([Job.parse(job.to_json())])
    assert (goodput.seconds["productive"], goodput.seconds["lost"], goodput.whole) == (40.0, 25.0, 100.0)
    died = summarise([replace(job, end=FAILED)])
    assert died.seconds["productive"] == 38.0 and died.seconds["lost"] == 27.0 and died.whole == 100.0


def test_beginning_again_loses_all_that_was_before() -> None:
    found = summarise([DIED, replace(SECOND, first=0, origin=None, step=100)])
    assert found.seconds["lost"] == 155.0 and found.seconds["productive"] == 110.0


def test_an_older_checkpoint_where_the_newest_is_damaged() -> None:
    third = make_job(3, began=1400.0, seconds=160.0, productive=160.0, first=50, origin=1, step=200, end=FINISHED)
    found = summarise([DIED, SECOND, third])
    assert found.seconds["productive"] == 50.0 + 160.0, "nothing of the second"
    assert found.seconds["lost"] == 105.0 + 110.0


def test_a_checkpoint_that_the_ledger_left_out_is_in_proportion() -> None:
    thinned = replace(DIED, commits=[(50, 50.0)], productive=150.0)
    assert summarise([thinned, SECOND]).seconds["productive"] == pytest.approx(100.0 + 110.0)


def test_jobs_that_found_it_finished_do_not_count() -> None:
    later = make_job(3, began=1200.0 + 30 * DAY, seconds=9.0, starting=9.0, first=200, origin=2, step=200, end=FINISHED)
    assert summarise([DIED, SECOND, later]) == summarise([DIED, SECOND])
    assert summarise([DIED, replace(SECOND, end=None), replace(later, began=1340.0)]).jobs == 3, "it tells that the run is finished"
    repairing = replace(later, first=100, step=200, seconds=120.0, productive=111.0)
    assert summarise([DIED, SECOND, repairing]).seconds["idle"] > DAY, "the last checkpoint was damaged, and it trained again"


def test_prices() -> None:
    free = replace(SECOND, price=None, currency="")
    assert summarise([replace(DIED, price=None), free]).cost is None and summarise([replace(DIED, price=None), free]).money() == ""
    found = summarise([DIED, free])
    assert found.cost is not None and found.cost["productive"] == pytest.approx((100 * 12 + 110 * 2 * 3) / 3600), "the other job's price"
    found = summarise([replace(DIED, price=None), free], 36.0, "USD")
    assert found.money() == f"{180 * 4 * 0.01 + 130 * 2 * 0.01:.2f} USD"
    assert summarise([]).fraction == 0.0 and summarise([]).in_words() == "0.0% of 0.0 s was training that counts; 0 jobs, no failures"


def test_nearly_all_is_not_all() -> None:
    job = make_job(1, seconds=100_000.0, starting=1.0, productive=99_999.0, first=0, step=9, end=FINISHED)
    assert summarise([job]).in_words().startswith("99.9% of 27 h 46 min")


def test_failures_tell_how_often_to_save() -> None:
    before = make_job(3, seconds=7.0, starting=7.0, first=200, step=200, end=FAILED)  # it lost nothing
    ends = [replace(DIED, end=end) for end in (None, FAILED, PREEMPTED, REGROUPED, STOPPED, DIVERGED)]
    assert seen(ends) == (6 * 180.0, 2) and seen([before]) == (7.0, 0) and seen([]) == (0, 0)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, FINISHED), (Preempted("x"), PREEMPTED), (Diverged("x"), DIVERGED), (KeyboardInterrupt(), STOPPED), (Fenced("x"), FAILED),
        (InfrastructureError("x"), FAILED), (RuntimeError("x"), FAILED),
    ],
)  # fmt: skip
def test_ends(error: BaseException | None, end: str) -> None:
    assert end_of(error) == end


def test_ledgers_are_read_as_they_were_written(store: Storage) -> None:
    said: list[Event] = []
    assert read_jobs(store) == []
    for job in (SECOND, DIED, replace(DIED, generation=3, run="another")):
        store.write(key_of(job.generation), job.to_json())
    store.write("goodput/000004.json", b"{half")
    store.write("goodput/000005.json", DIED.to_json().replace(b'"format": 1', b'"format": 2'))
    store.write("goodput/000006.json", b'{"format": 1, "commits": [], "colour": "red"}')
    store.write("goodput/notes.txt", b"")
    set_sink(said.append)
    try:
        assert read_jobs(store, "id") == [DIED, SECOND]
        assert len(said) == 3 and all(event.text.startswith(f"warning: {store.url}/goodput/00000") for event in said)
        assert [job.run for job in read_jobs(store)] == ["id", "id", "another"]
    finally:
        set_sink(None)
