"""One group of workers under Ray Train: started, watched, and told how it ended. The only user of Ray Train."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoint import Run
from pipeline.core.errors import (
    Diverged,
    Fenced,
    InfrastructureError,
    Preempted,
    StageFailed,
    StorageError,
    TesseraError,
    Unsaved,
    UserError,
    find_error,
)
from pipeline.core.progress import emit, say, set_sink
from pipeline.core.world import JOINED, World
from pipeline.train.keeper import Signals
from pipeline.train.relay import Relay

# A group that failed is followed by one of ours, of another size where need be; nor does Ray Train look for machines that are about to go.
_NO_RETRIES = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# A worker whose process answers nothing for so many seconds is dead; by default all others would wait for ten minutes.
os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")
_LOOK_EVERY = 0.5  # seconds
_REPLY = 10.0  # seconds that an actor may take to answer
# Raised by Ray where a machine or the network fails; for all that a watcher knows, it is over the next time.
_PASSING = (ray.exceptions.RayError, OSError)
_ROOM_EVERY, _ROOM_LOOKS = 5.0, 3  # seconds between two looks for more machines, and looks in a row that must find some
# Of a worker's own errors, those that the next group may not meet: storage was there before the training began.
_RESTARTED = (InfrastructureError, StorageError)
# Raised by code that is wrong, not by a machine that failed; a rank whose peer died sees a RuntimeError.
_DEFECTS = (ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Ended:
    """How a group ended: its training `is_finished`; or a worker died, of which `failure` is the last word; or neither, and it is to be
    followed by a group of another size. `had_places` is false where it waited for its places in vain. `seconds` by part of the work."""

    is_finished: bool
    failure: str | None = None
    had_places: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def train_group(run: Run, workers: int, use_gpu: bool, signals: Signals, has_room: Callable[[Sequence[str]], bool]) -> Ended:
    """Train `run` with a group of so many workers; `has_room` is given the Ray id of each worker's machine, and tells whether a larger
    group could be started.

    Raises:
        TesseraError: a worker's own, which no restart mends.
    """
    say(f"pretrain     starting {workers} worker{'' if workers == 1 else 's'} ({'GPU' if use_gpu else 'CPU'})")
    # Here, where nothing is lost that is not lost anyway: on another machine it would go with that.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = ray.remote(num_cpus=0, scheduling_strategy=here)(Relay).remote()
    done, failure, had_places = threading.Event(), None, True
    watcher = threading.Thread(target=_watch, args=(relay, done, signals), daemon=True)
    watcher.start()
    # Not waited for: while the cluster's head does not answer, neither do questions about machines.
    threading.Thread(target=_watch_machines, args=(relay, done, workers, has_room), daemon=True).start()
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="tessera-train-") as scratch:
            TorchTrainer(
                _worker,
                train_loop_config={"run": run, "relay": relay},
                scaling_config=ScalingConfig(
                    num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})}
                ),
                run_config=RunConfig(name=run.id, storage_path=scratch, failure_config=_NO_RETRIES),
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(JOINED.total_seconds())),
            ).fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as e:
        if (told := ray.get(relay.error.remote())) is not None:
            raise told from e
        error = find_error(e)
        if error is not None and not isinstance(error, _RESTARTED):
            raise error from e
        failure = str(error) if error is not None else _last_line(e)
        had_places = not isinstance(getattr(e, "controller_failure", None), WorkerGroupStartupTimeoutError)
    finally:
        done.set()
        watcher.join()
    _hear_stop(relay, signals)
    if (error := ray.get(relay.error.remote())) is not None:
        raise error
    parts = ray.get(relay.seconds.remote())
    starting = {"starting workers": time.perf_counter() - began - sum(parts.values())} if parts else {}
    return Ended(ray.get(relay.is_finished.remote()), failure, had_places, {**starting, **parts})


def _worker(config: dict[str, Any]) -> None:
    """What each worker process runs."""
    from pipeline.train.worker import run_worker, stage_tracker, use_cores

    run, relay = config["run"], config["relay"]
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    set_sink(lambda event: relay.put.remote(event))
    use_cores(context.get_local_world_size())
    tracker = stage_tracker(run) if world.is_main else None
    signals, over = Signals(), threading.Event()
    if world.is_main:
        threading.Thread(target=_listen, args=(relay, signals, over), daemon=True).start()
    ray.get(relay.join.remote(ray.get_runtime_context().get_node_id()))
    try:
        seconds, is_finished = run_worker(run, world, tracker, signals)
    except (UserError, Diverged, Fenced, Preempted, Unsaved, *_DEFECTS) as e:
        defect = StageFailed(f"pretrain: a worker failed, which no restart mends ({type(e).__name__}: {e})")
        if not isinstance(e, StorageError):
            ray.get(relay.fail.remote(e if isinstance(e, TesseraError) else defect))
        if tracker:
            tracker.close("KILLED" if isinstance(e, Preempted) else "FAILED")
        raise
    finally:
        over.set()
    if signals.stop.is_set():
        ray.get(relay.ask.remote("stop"))
    if tracker:
        ray.get(relay.finish.remote(seconds, is_finished))
        if is_finished:
            tracker.close()
        else:
            tracker.close("RUNNING", timeout=10)


def _listen(relay: Any, signals: Signals, over: threading.Event) -> None:
    """Pass on what is asked of the group; in one of its workers. What was asked of this one alone, through the run's directory, is told: a
    stop holds for the next group, too."""
    heard: dict[str, int] = {}
    cut: BaseException | None = None
    while not over.wait(_LOOK_EVERY):
        try:
            asked = ray.get(relay.asked.remote(), timeout=_REPLY)
            if signals.stop.is_set() and "stop" not in asked:
                ray.get(relay.ask.remote("stop"), timeout=_REPLY)
        except _PASSING as e:
            cut = cut or e
            continue
        for what, times in asked.items():
            if times != heard.get(what):
                signals.events[what].set()
        heard = asked
        if cut is not None:  # said when somebody can hear it
            say(f"warning: for a while a worker could not ask what is asked of it ({_last_line(cut)}); now it can")
            cut = None


def _watch(relay: Any, done: threading.Event, signals: Signals) -> None:
    """Show what the workers say, and pass on what is asked of them."""
    trouble = Trouble("what is asked of the workers, and what they say, is not passed on")
    while True:
        last = done.wait(_LOOK_EVERY)
        with trouble:
            for event in ray.get(relay.take.remote(), timeout=_REPLY):
                emit(event)
            _hear_stop(relay, signals)
            for what, event in signals.events.items():
                if event.is_set() and not last:
                    if event is not signals.stop:  # which holds for whoever would follow this group, too
                        event.clear()
                    try:
                        ray.get(relay.ask.remote(what), timeout=_REPLY)
                    except _PASSING:
                        event.set()
                        raise
        if last:
            return


def _hear_stop(relay: Any, signals: Signals) -> None:
    """Have a stop that a worker heard of hold for the whole job."""
    if "stop" in ray.get(relay.asked.remote(), timeout=_REPLY):
        signals.stop.set()


def _watch_machines(relay: Any, done: threading.Event, workers: int, has_room: Callable[[Sequence[str]], bool]) -> None:
    """Have the group end at its next save where a larger one has room, and at once where one of its machines is about to be taken back."""
    found, is_growing, is_leaving, trouble = 0, False, False, Trouble("machines that come and go are not seen")
    while not done.wait(_ROOM_EVERY):
        with trouble:
            nodes = ray.get(relay.nodes.remote(), timeout=_REPLY)
            # While some have no place yet, theirs cannot be told from those that are left over.
            found = found + 1 if len(nodes) == workers and has_room(nodes) else 0
            if not is_growing and found >= _ROOM_LOOKS:
                ray.get(relay.ask.remote("grow"), timeout=_REPLY)
                is_growing = True
                say("pretrain     more machines have come: the group is made larger at its next checkpoint")
            if not is_leaving and leaving_machines().intersection(nodes):
                ray.get(relay.ask.remote("move"), timeout=_REPLY)
                is_leaving = True
                say("pretrain     a machine is about to be taken back: saving, and going on without it")


class Trouble:
    """Around one look of a watcher: what Ray raises while a machine or the network fails is told, once in a row, and the next look goes
    on."""

    def __init__(self, what: str) -> None:
        self.what, self.is_told = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            self.is_told = False
            return False
        if not isinstance(error, _PASSING):
            return False
        if not self.is_told:
            say(f"warning: {self.what} for the moment ({_last_line(error)}); asking again")
        self.is_told = True
        return True


def leaving_machines() -> set[str]:
    """Ray ids of the machines that have been told to go."""
    return set(ray._private.state.state.get_draining_nodes())  # the public ray.nodes() does not tell


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
