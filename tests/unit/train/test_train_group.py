"""Groups of workers seen from outside: how large they may be, and what is passed on to them while machines and the network fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.checkpoint import claim_run
from pipeline.config import parse_config
from pipeline.config.schema import Cluster
from pipeline.core.errors import InfrastructureError, Preempted
from pipeline.core.progress import Event, set_sink
from pipeline.train import group, job
from pipeline.train.group import train_group
from pipeline.train.job import Places
from pipeline.train.keeper import Signals
from pipeline.train.relay import Relay

pytestmark = pytest.mark.usefixtures("cluster")  # of two cores


@contextmanager
def held(cores: int) -> Iterator[str]:
    """So many cores are another job's meanwhile; gives the machine's Ray id."""
    group = placement_group([{"CPU": cores}])
    ray.get(group.ready())
    yield ray.get_runtime_context().get_node_id()
    remove_placement_group(group)


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []

    def hear(event: Event) -> None:
        lines.append(event.text)

    set_sink(hear)
    yield lines
    set_sink(None)


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[threading.Thread]:
    """A thread with an event that ends it; `arguments` hold that event."""
    over = next(a for a in arguments if isinstance(a, threading.Event))
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    yield thread
    over.set()
    thread.join(30)
    assert not thread.is_alive(), "it ends with its group"


def until(is_so: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.1)
    return is_so()


def make_relay() -> Any:
    """One that comes back after it was killed; until then, calls raise what they raise while it cannot be reached."""
    relay = ray.remote(num_cpus=0, max_restarts=-1)(Relay).remote()
    ray.get(relay.nodes.remote())
    return relay


def cut_off(relay: Any, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Whoever asks meanwhile is told that there is no answer."""
    process = ray.get(relay.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGSTOP)
    meanwhile()
    call = relay.nodes.remote()
    time.sleep(3 * group._LOOK_EVERY)  # of a watcher, too, a question is under way
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(call)


def answers(relay: Any) -> bool:
    try:
        ray.get(relay.nodes.remote())
    except ray.exceptions.RayActorError:
        return False
    return True


def test_what_was_asked_is_not_lost_with_a_reply() -> None:
    relay = Relay()
    relay.ask("save")
    relay.ask("stop")
    assert relay.asked() == relay.asked() == {"save": 1, "stop": 1}
    relay.ask("save")
    assert relay.asked()["save"] == 2


def test_a_worker_hears_after_a_cut(said: list[str]) -> None:
    relay, signals, over = make_relay(), Signals(), threading.Event()
    with running(group._listen, relay, signals, over) as thread:
        for _ in range(2):  # more than once
            cut_off(relay)
            assert thread.is_alive() and until(lambda: answers(relay))
        ray.get(relay.ask.remote("stop"))
        assert until(signals.stop.is_set)
        assert not signals.save.is_set()
    assert said and all("for a while a worker could not ask" in line for line in said)


def test_a_stop_that_a_worker_heard_of_holds_for_the_whole_job() -> None:
    """It came through the run's directory, to this group alone: the next one must not train on."""
    relay, worker, driver, over, done = make_relay(), Signals(), Signals(), threading.Event(), threading.Event()
    with running(group._listen, relay, worker, over), running(group._watch, relay, done, driver):
        worker.save.set()
        time.sleep(3 * group._LOOK_EVERY)
        assert not driver.stop.is_set()
        worker.stop.set()
        assert until(driver.stop.is_set)
    assert ray.get(relay.asked.remote()).keys() == {"stop"}


def test_each_request_is_heard_once() -> None:
    relay, signals, over = make_relay(), Signals(), threading.Event()
    with running(group._listen, relay, signals, over):
        for _ in range(2):
            ray.get(relay.ask.remote("save"))
            assert until(signals.save.is_set)
            signals.save.clear()  # as the keeper does
            time.sleep(3 * group._LOOK_EVERY)
            assert not signals.save.is_set()


def test_signals_are_passed_on_after_a_cut(said: list[str]) -> None:
    relay, signals, done = make_relay(), Signals(), threading.Event()
    with running(group._watch, relay, done, signals):
        cut_off(relay, signals.save.set)
        assert until(lambda: answers(relay) and ray.get(relay.asked.remote()).get("save", 0) > 0), "no request is lost"
        assert until(lambda: not signals.save.is_set())
        signals.stop.set()
        assert until(lambda: ray.get(relay.asked.remote()).get("stop", 0) > 0)
        assert signals.stop.is_set(), "it holds for the next group, too"
    assert len(said) == 1 and said[0].startswith(
        "warning: what is asked of the workers, and what they say, is not passed on for the moment"
    )


def test_machines_are_watched_on_after_a_failure(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_ROOM_EVERY", 0.1)
    relay, done, looks = make_relay(), threading.Event(), 0

    def has_room(own: Sequence[str]) -> bool:
        nonlocal looks
        looks += 1
        if looks <= 2:
            raise ray.exceptions.RaySystemError("Failed to connect to GCS.")
        return len(own) == 2

    with running(group._watch_machines, relay, done, 2, has_room):
        ray.get(relay.join.remote("one"))
        time.sleep(0.5)
        assert looks == 0, "the places of a group that is not complete yet cannot be told from those left over"
        ray.get(relay.join.remote("another"))
        assert until(lambda: ray.get(relay.asked.remote()) == {"grow": 1})
        time.sleep(0.5)
        assert ray.get(relay.asked.remote()) == {"grow": 1}
    assert [line for line in said if "warning" in line] == [
        "warning: machines that come and go are not seen for the moment (System error: Failed to connect to GCS.); asking again"
    ]


def test_what_others_use_is_no_room() -> None:
    places = Places(Cluster(workers=2, min_workers=1))
    assert until(lambda: places.possible() == (2, 2))
    with held(1) as machine:
        assert until(lambda: places.possible() == (1, 2))
        assert until(lambda: places.possible([machine]) == (2, 2)), "the place of a worker of ours is one that we have"
        assert Places(Cluster(workers=2)).possible() == (0, 2)
    with held(2) as machine:
        assert until(lambda: places.possible() == (0, 2))
        assert places.possible([machine]) == (1, 2), "a second one has no room, whatever the machine has in all"


def test_places_that_come_back_are_waited_for() -> None:
    places = Places(Cluster(workers=2, min_workers=1))
    with held(1):
        assert until(lambda: places.possible() == (1, 2))
        began = time.monotonic()
        assert job._await_workers(places, Signals()) == 1, "others keep theirs"
        assert time.monotonic() - began >= job._SETTLED
    assert job._await_workers(places, Signals()) == 2, "a group that has just ended gives its places back after a moment"


def test_too_little_room_ends_the_wait(said: list[str]) -> None:
    places = Places(Cluster.model_validate({"workers": 2, "wait": "1 second"}))
    with held(1):
        assert until(lambda: places.possible() == (0, 2))
        with pytest.raises(InfrastructureError, match=r"^cluster: after 1 second too few machines are left"):
            job._await_workers(places, Signals())


def test_a_group_that_gets_no_places_is_followed_by_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(Cluster(workers=8, min_workers=3))
    assert places.find_fewer(8, started=5) == 5
    assert places.find_fewer(5, started=5) == 3, "of half the size, and not fewer than the least"
    assert places.find_fewer(3, started=0) == 0
    assert Places(Cluster(workers=8)).find_fewer(8, started=5) == 0, "which the config does not allow"
    assert Places(Cluster()).find_fewer(2, started=0) == 1

    places = Places(Cluster(workers=2, min_workers=1))
    assert until(lambda: places.possible() == (2, 2))
    assert places.find_fewer(2, started=1) == 1 and places.possible() == (1, 2), "nor does it grow at once"
    monkeypatch.setattr(job, "_HOLD", 0.0)
    places.find_fewer(2, started=1)
    assert places.possible() == (2, 2)


def test_a_start_in_vain_is_told_from_workers_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    pretrain = {"model": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}, "duration": "1 epoch", "precision": "fp32"}
    run = claim_run(
        parse_config({"name": "a", "storage": str(tmp_path), "cluster": "local", "data": str(tmp_path / "none"), "pretrain": pretrain})
    )
    ended = train_group(run, 3, False, Signals(), lambda own: False)
    assert not ended.is_finished and not ended.had_places and ended.failure and "timed out after 2.0 seconds" in ended.failure


@pytest.mark.parametrize("has_failed", [False, True], ids=["to grow", "as a worker fails"])
def test_no_group_follows_one_that_heard_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_failed: bool) -> None:
    """The group ends for another reason in the same moment."""
    started = []

    def end(run: Any, workers: int, use_gpu: bool, signals: Signals, has_room: Any) -> group.Ended:
        started.append(workers)
        signals.stop.set()
        return group.Ended(False, "a worker died" if has_failed else None)

    monkeypatch.setattr(job, "train_group", end)
    values = {"name": "a", "storage": str(tmp_path), "data": "none", "pretrain": {"model": "vit", "duration": "1 step"}, "cluster": "local"}
    with pytest.raises(InfrastructureError if has_failed else Preempted, match=r"asked to end.*the same command goes on from"):
        job.pretrain(claim_run(parse_config(values)), Signals())
    assert len(started) == 1
