"""When a run saves and stops: a real saver on files, steps that take no time, and what people and machines ask for in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoints, Commit
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.requests import Requests, ask
from pipeline.checkpoint.retain import Retention
from pipeline.checkpoint.save import Outcome, Saver, new_attempt
from pipeline.config.pretrain import Save
from pipeline.core.errors import CredentialsError, Diverged, ExitCode, Fenced, InfrastructureError, Preempted, Unsaved
from pipeline.core.progress import Event, set_sink
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.keeper import Keeper, Regroup, Signals


@pytest.fixture
def said() -> Iterator[list[Event]]:
    events: list[Event] = []
    set_sink(events.append)
    yield events
    set_sink(None)


class Training:
    """A keeper, and something that it keeps."""

    def __init__(self, path: Path, between: int | None = None, **save: object) -> None:
        self.run = Storage(str(path / "run"))
        self.checkpoints = Checkpoints(self.run)
        self.lease = self.checkpoints.acquire()
        self.state = [Fragment("weight", "a", 0, torch.zeros(100))]
        self.config = Save.model_validate(save)
        self.saver = Saver(self.checkpoints, self.lease, self.state, Retention(100), self.config.retry.seconds, World())
        self.signals = Signals()
        self.outcomes: list[Outcome] = []
        self.keeper = Keeper(self.saver, self.snapshot, self.config, between, self.signals, World(), told=self.outcomes.append)

    def snapshot(self, step: int) -> tuple[list[Fragment], Commit | None, Mapping[str, bytes]]:
        self.state[0].tensor.fill_(step)
        return self.state, Commit(step, step, self.lease.generation, new_attempt(self.lease), 1, 0, "view", "config", []), {}

    def steps(self, first: int, last: int, each: float = 0.0) -> None:
        for step in range(first, last + 1):
            time.sleep(each)
            self.keeper.after_step(step)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path


def test_by_steps(path: Path) -> None:
    t = Training(path, between=4)
    t.steps(1, 3)
    assert t.saver.is_free, "not yet"
    t.steps(4, 4)
    assert not t.saver.is_free
    t.keeper.finish(5)
    t.saver.close()
    assert t.checkpoints.steps() == [4, 5] and [o.step for o in t.outcomes] == [4, 5]


def test_one_that_is_due_while_another_is_under_way_comes_as_soon_as_it_can(path: Path) -> None:
    t = Training(path, between=2)
    t.steps(1, 400, each=0.01)
    t.keeper.finish(400)
    t.saver.close()
    steps = [outcome.step for outcome in t.outcomes]
    assert steps[0] == 2 and steps[-1] == 400 and 3 < len(steps) < 200
    assert any(step % 2 for step in steps) or len(steps) > 20, "not only when the next is due"


def test_by_time(path: Path) -> None:
    t = Training(path, every="1 second")
    t.steps(1, 30, each=0.1)
    t.keeper.finish(30)
    t.saver.close()
    assert 2 <= len(t.checkpoints.steps()) <= 4


def test_the_last_step_is_not_saved_twice(path: Path) -> None:
    t = Training(path, between=4)
    t.steps(1, 4)
    t.keeper.finish(4)
    t.saver.close()
    assert t.checkpoints.steps() == [4] and len(t.outcomes) == 1


def test_asked_to_end(path: Path) -> None:
    t = Training(path, between=100)
    t.steps(1, 2)
    t.signals.stop.set()
    with pytest.raises(Preempted, match="all is saved at step 3, and the same command goes on from there") as e:
        t.steps(3, 4)
    t.saver.close()
    assert e.value.exit_code == ExitCode.PREEMPTED and t.checkpoints.steps() == [3]


@pytest.mark.parametrize(("signum", "ends"), [(signal.SIGTERM, True), (signal.SIGUSR2, True), (signal.SIGUSR1, False)])
def test_signals(path: Path, signum: signal.Signals, ends: bool) -> None:
    t, before = Training(path, between=100), signal.getsignal(signum)
    with t.signals.listening():
        os.kill(os.getpid(), signum)
        if ends:
            with pytest.raises(Preempted):
                t.steps(1, 1)
        else:
            t.steps(1, 1)
            t.keeper.finish(1)
    t.saver.close()
    assert signal.getsignal(signum) == before and t.checkpoints.steps() == [1]


def test_no_signals_in_another_thread() -> None:
    errors: list[BaseException] = []

    def listen() -> None:
        try:
            with Signals().listening():
                pass
        except BaseException as e:  # noqa: BLE001  told below
            errors.append(e)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == []


def test_asked_through_the_run_directory(path: Path) -> None:
    t = Training(path, between=100)
    with Requests(t.run, t.signals.events):
        ask(t.run, "save")
        assert t.signals.save.wait(15) and not t.signals.stop.is_set()
        t.steps(1, 1)
        ask(t.run, "stop")
        assert t.signals.stop.wait(15)
        deadline = time.monotonic() + 15
        while t.run.names("requests") and time.monotonic() < deadline:  # it is taken away once the event is set
            time.sleep(0.01)
    assert t.run.names("requests") == [], "heard of"
    with pytest.raises(Preempted):
        t.steps(2, 2)
    t.saver.close()
    assert t.checkpoints.steps() == [1, 2]


def test_a_larger_group_goes_on_after_the_next_save_and_another_at_once(path: Path) -> None:
    t = Training(path, between=5)
    t.signals.grow.set()
    t.steps(1, 4)
    with pytest.raises(Regroup):
        t.steps(5, 5)
    assert t.checkpoints.steps() == [5]
    t.signals.grow.clear()
    t.signals.move.set()
    with pytest.raises(Regroup):
        t.steps(6, 6)
    t.saver.close()
    assert t.checkpoints.steps() == [5, 6]


def test_another_job_ends_this_one(path: Path) -> None:
    t = Training(path, between=1)
    t.steps(1, 1)
    t.checkpoints.acquire()
    with pytest.raises(Fenced, match="another job"):
        t.steps(2, 3000, each=0.01)
    t.saver.close()
    left = {step: t.checkpoints.directory.names(step) for step in t.checkpoints.directory.names() if step.startswith("step-")}
    assert all("COMMIT.json" in names for names in left.values() if names), "what it uploaded for nobody is gone"


def test_a_diverged_model_ends_the_run(path: Path) -> None:
    t = Training(path, between=1)
    t.snapshot = lambda step: (  # type: ignore[method-assign]
        [Fragment("weight", "a", 0, t.state[0].tensor.fill_(float("inf")))],
        Commit(step, step, 1, new_attempt(t.lease), 1, 0, "view", "config", []),
        {},
    )
    t.keeper.snapshot = t.snapshot
    with pytest.raises(Diverged, match="no longer finite at step 1"):
        t.steps(1, 3000, each=0.01)
    t.saver.close()
    assert t.checkpoints.steps() == []


def test_a_store_that_fails_is_a_warning_until_patience_ends(path: Path, said: list[Event]) -> None:
    t = Training(path, between=100, retry="1 second", patience="4 seconds")
    t.keeper.finish(1)
    t.keeper.every = 1
    (path / "run").rename(path / "moved")
    (path / "run").write_text("no directory any more")
    with pytest.raises(
        InfrastructureError, match=r"no checkpoint could be committed for 4.0 s \(pretrain.save.patience\), so the run ends"
    ):
        t.steps(3, 3000, each=0.02)
    t.saver.close()
    assert t.keeper.failures >= 1 and any("is not saved, training goes on" in event.text for event in said)


def test_a_store_that_comes_back_is_used_again(path: Path) -> None:
    t = Training(path, between=1, retry="1 second", patience="60 seconds")
    (path / "run").rename(path / "moved")
    (path / "run").write_text("no directory for now")
    while not t.keeper.failures:
        t.steps(1, 1, each=0.05)
    (path / "run").unlink()
    (path / "moved").rename(path / "run")
    t.keeper.finish(9)
    t.saver.close()
    assert t.keeper.failures == 0 and 9 in t.checkpoints.steps()


def test_a_save_that_failed_does_not_wait_until_one_is_due(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.keeper._AGAIN", 0.2)
    t = Training(path, between=1000, retry="1 second")
    (path / "run").rename(path / "moved")
    (path / "run").write_text("no directory for now")
    t.signals.save.set()
    while not t.keeper.failures:
        t.steps(1, 1, each=0.05)
    (path / "run").unlink()
    (path / "moved").rename(path / "run")
    t.steps(2, 200, each=0.02)
    t.saver.close()
    assert t.keeper.failures == 0 and len(t.checkpoints.steps()) == 1, "one, and no more than that before the next is due"


def test_a_group_that_cannot_save_does_not_end_to_grow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.keeper._AGAIN", 0.2)
    t = Training(path, between=2, retry="1 second")
    (path / "run").rename(path / "moved")
    (path / "run").write_text("no directory for now")
    t.signals.grow.set()
    t.steps(1, 2)
    assert t.keeper.failures == 1
    (path / "run").unlink()
    (path / "moved").rename(path / "run")
    with pytest.raises(Regroup):
        t.steps(3, 200, each=0.02)
    t.saver.close()
    assert len(t.checkpoints.steps()) == 1


def test_a_store_that_hangs_ends_the_run_when_patience_does(path: Path) -> None:
    """It neither answers nor fails."""
    t = Training(path, between=1, retry="1 second", patience="2 seconds")
    t.keeper.finish(1)
    assert t.saver._uploader is not None
    os.kill(t.saver._uploader.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unsaved, match=r"no checkpoint could be committed for 2.0 s"):
        t.steps(2, 2000, each=0.02)
    t.saver.close()
    assert 2 <= time.monotonic() - began < 20


def test_the_end_is_not_reached_unsaved(path: Path) -> None:
    t = Training(path, between=100, retry="1 second", patience="3 seconds")
    (path / "run").rename(path / "moved")
    (path / "run").write_text("no directory any more")
    with pytest.raises(
        Unsaved, match=r"the state after step 3 could not be saved for 3.0 s \(.*\); the same command goes on from the"
    ) as e:
        t.keeper.finish(3)
    assert e.value.exit_code == ExitCode.INFRASTRUCTURE
    t.saver.close()


def test_the_last_save_is_tried_again_after_a_while(path: Path, said: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once: a store that refuses in no time would be asked, and the state copied, without end."""
    monkeypatch.setattr("pipeline.train.keeper._AGAIN", 0.5)
    monkeypatch.setattr("pipeline.core.upload.Uploader.upload", _refuse)
    t = Training(path, between=100, retry="1 second", patience="2 seconds")
    with pytest.raises(Unsaved, match="no right to write"):
        t.keeper.finish(3)
    t.saver.close()
    assert 3 <= t.keeper.failures <= 6
    assert all("is not saved, it is tried again" in event.text for event in said)


def _refuse(self: object, key: str, block: int) -> None:
    raise CredentialsError("no right to write")


def test_the_interval_is_worked_out_and_told(path: Path, said: list[Event]) -> None:
    t = Training(path, every="auto")
    assert "a failure is expected every 24 h 00 min" in said[-1].text and said[-1].text.startswith("pretrain     saving every ")
    t.signals.save.set()
    t.steps(1, 1)
    t.keeper.finish(1)
    t.saver.close()
    assert t.keeper._interval is not None and t.keeper._interval >= 10


def test_a_save_that_does_not_fit_the_notice_is_warned_of(path: Path, said: list[Event]) -> None:
    t = Training(path, between=1, notice="0.001 seconds")
    t.steps(1, 1)
    t.keeper.finish(2)
    t.saver.close()
    warnings = [event.text for event in said if "pretrain.save.notice" in event.text]
    assert len(warnings) == 1 and "is taken back goes after 0.0 s" in warnings[0]
