"""Pre-training as a Ray Train job: a group of workers, restarted from the last commit when one of them dies."""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.checkpoint import Run
from pipeline.config.schema import Cluster
from pipeline.core.errors import ConfigError, Diverged, InfrastructureError, StageFailed, TesseraError, UserError, find_error
from pipeline.core.progress import Event, emit, say, set_sink
from pipeline.core.world import World

_LOOK_EVERY = 0.5  # seconds
# Raised by code that is wrong, not by a machine that failed; a rank whose peer died sees a RuntimeError.
_DEFECTS = (ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, ArithmeticError)


class Relay:
    """Carries what the workers say to the process that the person looks at, and an error that no restart would mend."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: TesseraError | None = None
        self._seconds: dict[str, float] = {}

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def fail(self, error: TesseraError) -> None:
        self._error = self._error or error

    def error(self) -> TesseraError | None:
        return self._error

    def finish(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def seconds(self) -> dict[str, float]:
        return self._seconds


def count_workers(cluster: Cluster) -> int:
    """Training processes on the Ray that this process is connected to; raises as `choose_workers`."""
    has = ray.cluster_resources()
    return choose_workers(cluster, int(has.get("GPU", 0)), int(has.get("CPU", 1)))


def choose_workers(cluster: Cluster, gpus: int, cores: int) -> int:
    """Training processes on a cluster of so many GPUs and cores: as the config says, else one a GPU, else two.

    Raises:
        ConfigError: the cluster has not as many GPUs or cores.
    """
    least = cluster.gpus if cluster.min_gpus is None else cluster.min_gpus
    if least and gpus < least:
        raise ConfigError(f"cluster.{'gpus' if cluster.min_gpus is None else 'min_gpus'}: {least} are asked for, the cluster has {gpus}")
    usable = gpus if cluster.gpus is None else min(gpus, cluster.gpus)
    wanted = cluster.workers or usable or min(2, cores)
    if wanted > (usable or cores):
        has = f"{usable} GPUs" if usable else f"{cores} cores"
        raise ConfigError(f"cluster.workers: {wanted} are asked for, and there are {has} for them")
    return wanted


def pretrain(run: Run) -> dict[str, float]:
    """Train `run` on the Ray cluster that this process is connected to. Gives seconds by part of the work.

    Raises:
        TesseraError: a worker's own; InfrastructureError where workers died more often than `cluster.retries`.
    """
    cluster = run.config.cluster
    workers = count_workers(cluster)
    use_gpu = cluster.gpus != 0 and ray.cluster_resources().get("GPU", 0) > 0
    say(f"pretrain     starting {workers} worker{'' if workers == 1 else 's'} ({'GPU' if use_gpu else 'CPU'})")
    relay = ray.remote(num_cpus=0)(Relay).remote()
    done = threading.Event()
    printer = threading.Thread(target=_show, args=(relay, done), daemon=True)
    printer.start()
    try:
        with tempfile.TemporaryDirectory(prefix="tessera-train-") as scratch:
            TorchTrainer(
                _worker,
                train_loop_config={"run": run, "relay": relay},
                scaling_config=ScalingConfig(
                    num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})}
                ),
                run_config=RunConfig(name=run.id, storage_path=scratch, failure_config=FailureConfig(max_failures=cluster.retries)),
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            ).fit()
    except ray.train.TrainingFailedError as e:
        error = ray.get(relay.error.remote()) or find_error(e)
        raise error or InfrastructureError(f"pretrain: workers failed {cluster.retries + 1} times; the last said: {_last_line(e)}") from e
    finally:
        done.set()
        printer.join()
    error = ray.get(relay.error.remote())
    if error:
        raise error
    return ray.get(relay.seconds.remote())


def _worker(config: dict[str, Any]) -> None:
    """What each worker process runs."""
    from pipeline.train.worker import run_worker, stage_tracker, use_cores

    run, relay = config["run"], config["relay"]
    if ray.get(relay.error.remote()):
        return  # restarted after an error that no restart mends
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    set_sink(lambda event: relay.put.remote(event))
    use_cores(context.get_local_world_size())
    tracker = stage_tracker(run) if world.is_main else None
    try:
        seconds = run_worker(run, world, tracker)
    except (UserError, Diverged, *_DEFECTS) as e:
        defect = StageFailed(f"pretrain: a worker failed, which no restart mends ({type(e).__name__}: {e})")
        ray.get(relay.fail.remote(e if isinstance(e, TesseraError) else defect))
        if tracker:
            tracker.close("FAILED")
        raise
    if tracker:
        ray.get(relay.finish.remote(seconds))
        tracker.close()


def _show(relay: Any, done: threading.Event) -> None:
    while True:
        last = done.wait(_LOOK_EVERY)
        for event in ray.get(relay.take.remote()):
            emit(event)
        if last:
            return


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
