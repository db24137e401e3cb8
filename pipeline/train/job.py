"""Pre-training on Ray: groups of workers, one after the other, each as large as there is room for."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from pipeline.checkpoint import Checkpoints, Run
from pipeline.config.schema import Cluster
from pipeline.core.errors import ConfigError, InfrastructureError, Preempted, StorageError
from pipeline.core.progress import say
from pipeline.train.group import Trouble, leaving_machines, train_group
from pipeline.train.keeper import Signals

_LOOK_EVERY = 2.0  # seconds
_SETTLED = 5.0  # seconds without a change
_HOLD = 600.0  # seconds without a larger group, after one that got no places
_KNOCK = 3.0  # seconds that a machine may take to answer
_KNOCKS = 32  # at a time
_PAUSE, _LONGEST = 2.0, 60.0  # seconds before the group that follows the first failure in a row, twice as many before each next one


def count_workers(cluster: Cluster) -> int:
    """Training processes on the Ray that this process is connected to, had it no other work; raises as `choose_workers`."""
    has = ray.cluster_resources()
    return choose_workers(cluster, int(has.get("GPU", 0)), int(has.get("CPU", 1)))


def choose_workers(cluster: Cluster, gpus: int, cores: int) -> int:
    """Training processes on a cluster of so many GPUs and cores: as the config says, else one a GPU, else two, and never fewer than the
    least that it allows.

    Raises:
        ConfigError: the cluster has not as many GPUs or cores.
    """
    if cluster.gpus:
        key = "min_gpus" if cluster.min_gpus is not None else "min_workers" if cluster.min_workers else "gpus"
        if gpus < (least := getattr(cluster, key)):
            raise ConfigError(f"cluster.{key}: {least} are asked for, the cluster has {gpus} GPU{'' if gpus == 1 else 's'}")
    usable = gpus if cluster.gpus is None else min(gpus, cluster.gpus)
    room, has = (usable, "GPUs") if usable else (cores, "cores")
    wanted = cluster.workers or usable or max(min(2, cores), cluster.min_workers or 0)
    if cluster.min_workers:
        key, least = "min_workers", cluster.min_workers
    else:
        key, least = "workers", wanted if cluster.min_gpus is None else min(1, wanted)
    if room < least:
        raise ConfigError(f"cluster.{key}: {least} are asked for, and there are {room} {has} for them")
    return min(wanted, room)


class Places:
    """How many workers there is room for just now, beside what others run on the same Ray."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        # For the whole of a job: one that began on GPUs does not go on with a few cores where those are gone.
        self.use_gpu = cluster.gpus != 0 and ray.cluster_resources().get("GPU", 0) > 0
        self._most, self._until = 0, 0.0  # no larger group, until then; by the monotonic clock

    def possible(self, own: Sequence[str] = ()) -> tuple[int, int]:
        """Up to what the config asks for, and 0 where that is fewer than it allows: workers that have room beside what else runs, and those
        that would have, did nothing else. On machines that are about to be taken back there is none; `own` are the Ray ids of the machines
        of the workers that run already, one each, whose places count as free."""
        leaving, free, mine = leaving_machines(), ray._private.state.available_resources_per_node(), Counter(own)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        left = whole = 0
        with ThreadPoolExecutor(min(_KNOCKS, max(1, len(nodes)))) as pool:
            for node, is_there in zip(nodes, pool.map(_answers, nodes), strict=True):
                if is_there:
                    left += mine[node["NodeID"]] + self._count(free.get(node["NodeID"], {}))
                    whole += self._count(node["Resources"])
        if time.monotonic() < self._until:
            left = min(left, self._most)
        return self._choose(left), self._choose(whole)

    def find_fewer(self, workers: int, started: int) -> int:
        """After a group of `workers` waited for its places in vain, a smaller one that the config allows, and that nothing larger is to
        follow for a while: of `started`, the last that did start, or of half; 0 where there is none."""
        sizes = (started, *range(max(1, workers // 2), workers))
        fewer = next((size for size in sizes if 0 < size < workers and self._choose(size) == size), 0)
        if fewer:
            self._most, self._until = fewer, time.monotonic() + _HOLD
        return fewer

    def _count(self, resources: Mapping[str, float]) -> int:
        cores = resources.get("CPU", 0)
        return int(min(cores, resources.get("GPU", 0)) if self.use_gpu else cores)  # a worker on a GPU takes a core, too

    def _choose(self, room: int) -> int:
        try:
            return choose_workers(self.cluster, *((room, 0) if self.use_gpu else (0, room)))
        except ConfigError:
            return 0


def _answers(node: dict[str, Any]) -> bool:
    """Whether a machine takes connections. Ray finds out that one is gone after some failed health checks, 15 seconds to a minute, and a
    group that counted on it meanwhile would wait for it in vain."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_KNOCK).close()
    except OSError:
        return False
    return True


def pretrain(run: Run, signals: Signals) -> dict[str, float]:
    """Train `run` on the Ray cluster that this process is connected to, with as many workers as there is room for, between the least and
    the most that the config allows. Gives seconds by part of the work.

    A group whose workers die is followed by another that goes on from the last commit; one that could be larger ends at its next save.

    Raises:
        TesseraError: a worker's own; InfrastructureError where workers died more than `cluster.retries` times without a new checkpoint
            between, or too few came back; Preempted where `signals` ask for the end.
    """
    cluster, checkpoints = run.config.cluster, Checkpoints(run.directory)
    count_workers(cluster)  # a cluster that is too small as a whole is not waited for
    places = Places(cluster)
    workers, started, failures, before = _await_workers(places, signals), 0, 0, _newest(checkpoints)
    seconds: Counter[str] = Counter()
    while True:
        ended = train_group(run, workers, places.use_gpu, signals, lambda own: places.possible(own)[0] > len(own))
        seconds.update(ended.seconds)
        if ended.is_finished:
            return dict(seconds)
        if ended.had_places:
            started = workers
        if not ended.had_places and (fewer := places.find_fewer(workers, started)):
            say(f"warning: {workers} workers did not get their places in time, which others may have taken; going on with {fewer}")
        elif ended.failure:
            if signals.stop.is_set():
                raise InfrastructureError(
                    f"pretrain: asked to end, and a worker failed before all was saved ({ended.failure}); the same command goes on from "
                    "the last checkpoint"
                )
            now = _newest(checkpoints) or before
            failures, before = 1 if now != before else failures + 1, now
            if failures > cluster.retries:
                raise InfrastructureError(
                    f"pretrain: workers failed {failures} times in a row without a new checkpoint; the last said: {ended.failure}"
                )
            say(f"warning: a worker failed ({ended.failure}); going on from the last checkpoint")
            _pause(failures, signals)
        workers = _await_workers(places, signals)


def _newest(checkpoints: Checkpoints) -> tuple[int, int] | None:
    """Generation and step of the newest commit; (0, 0) where there is none, None where the store does not say."""
    try:
        commits = checkpoints.commits()
    except StorageError:
        return None
    return (commits[-1].generation, commits[-1].step) if commits else (0, 0)


def _pause(failures: int, signals: Signals) -> None:
    """After `failures` in a row: what made one, such as a store that fails, may last longer than a group takes to start."""
    signals.stop.wait(min(_PAUSE * 2 ** (failures - 1), _LONGEST))


def _await_workers(places: Places, signals: Signals) -> int:
    """The number of workers that there is room for, once it is enough. The places of a group that has just ended are given back one by one,
    so what is less than the machines have is believed only after it has stayed the same for a few seconds.

    Raises:
        InfrastructureError: it was not for `cluster.wait`. Preempted: `signals` ask for the end.
    """
    wait = places.cluster.wait
    began = changed = time.monotonic()
    before, told, trouble = -1, False, Trouble("what machines there are is not known")
    while True:
        if signals.stop.is_set():
            raise Preempted("pretrain: asked to end while no worker ran; the same command goes on from the last checkpoint")
        workers = most = 0
        with trouble:
            workers, most = places.possible()
        now = time.monotonic()
        changed, before = (changed if workers == before else now), workers
        if workers and (workers >= most or now - changed >= _SETTLED):
            return workers
        if now - began > wait.seconds:
            raise InfrastructureError(f"cluster: after {wait} too few machines are left, or have come back, to go on training")
        if not told and now - began >= _SETTLED:
            say("pretrain     waiting for machines: fewer are left, or free, than the config allows")
            told = True
        signals.stop.wait(_LOOK_EVERY if told else _SETTLED / 10)
