"""A job's own page of the goodput ledger, kept while it works (`goodput.py` says what is in it, and adds up those of a run)."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import TracebackType

from pipeline.checkpoint.goodput import (
    DIVERGED,
    FAILED,
    FINISHED,
    PREEMPTED,
    REGROUPED,
    Goodput,
    Job,
    end_of,
    key_of,
    read_jobs,
    seen,
    summarise,
)
from pipeline.checkpoint.run import Run
from pipeline.core.errors import CredentialsError, StorageError, TesseraError
from pipeline.core.progress import say
from pipeline.core.world import World

_WRITE_EVERY = 30.0  # seconds
_LAST_WORD = 10.0  # seconds that the end waits for the store, at most
_PAUSE = 1.0  # seconds between attempts at the end
_COMMITS = 400  # remembered


class Ledger:
    """What a job does with its time. A context manager around all of its work; `is_finished` tells, before it is left without an error,
    whether training is finished or another group of workers goes on.

    Every rank has one, rank 0's alone is written: by a thread, so that a store which hangs or fails costs training nothing. What could not
    be written is in what is written next.
    """

    def __init__(self, run: Run, world: World) -> None:
        self._run, self._is_kept = run, world.is_main
        self._began = time.perf_counter()
        cluster = run.config.cluster
        gpus = world.size if world.device.type == "cuda" else 0
        self._job = Job(run.id, 0, time.time(), 0.0, world.size, gpus, 0.0, price=cluster.price, currency=cluster.currency)
        self._ready: float | None = None
        self._ended: float | None = None
        self._at = (0, 0.0, 0.0, 0.0)  # finished step; seconds up to it: productive, waited for input, saved
        self._lost = 0.0  # productive seconds that were taken back
        self._begun = (0, 0.0)  # the save in flight: step, productive seconds up to it
        self._commits: list[tuple[int, float]] = []
        self._earlier: list[Job] | None = None
        self._thread: threading.Thread | None = None
        self._wake, self._over = threading.Event(), threading.Event()
        self._deadline = 0.0
        self._is_written = self._has_warned = False
        self.is_finished = True

    # What the job tells

    def open(self, generation: int) -> None:
        """The job holds the lease `generation`: what it does is written from now on."""
        self._job = replace(self._job, generation=generation)
        if not self._is_kept:
            return
        try:
            self._earlier = [job for job in read_jobs(self._run.directory, self._run.id) if job.generation < generation]
        except (StorageError, CredentialsError) as e:
            say(f"warning: what earlier jobs did with their time cannot be read, so this one tells no sums ({e})")
        self._thread = threading.Thread(target=self._write_all, name="goodput", daemon=True)
        self._thread.start()

    def begin(self, first: int, origin: int | None, steps: int) -> None:
        """The loop begins, at step `first` of `steps`, which generation `origin` committed; None where it is no checkpoint of this run."""
        ready = time.perf_counter()
        self._at = (first, 0.0, 0.0, 0.0)
        self._job = replace(self._job, first=first, origin=origin, steps=steps, starting=ready - self._began)
        self._ready = ready  # last: whoever finds it finds the others
        self._wake.set()

    def step(self, step: int, waited: float, saved: float) -> None:
        """`step` is finished, and so far the loop has waited `waited` seconds for data and stood still `saved` seconds for saves."""
        if self._ready is not None:
            self._at = (step, time.perf_counter() - self._ready - waited - saved - self._lost, waited, saved)

    def go_back(self, step: int, generation: int) -> None:
        """Training goes on from `step` again, which `generation` committed; what followed it is lost."""
        kept = [(at, seconds) for at, seconds in self._commits if at <= step]
        productive = next((seconds for at, seconds in reversed(kept) if at == step), 0.0)
        self._lost += self._at[1] - productive
        self._at = (step, productive, *self._at[2:])
        self._commits = kept
        if generation != self._job.generation:
            self._job = replace(self._job, first=step, origin=generation)

    def save(self) -> None:
        """A save of the last finished step begins."""
        self._begun = self._at[:2]

    def commit(self, step: int, saved: float) -> None:
        """The save in flight, of `step`, is committed; the loop has stood still `saved` seconds for saves so far."""
        self._at = (*self._at[:3], saved)
        if self._begun[0] == step:
            if len(self._commits) >= _COMMITS:  # of the older half every second one is enough: between them it is in proportion
                half = _COMMITS // 2
                self._commits = self._commits[:half:2] + self._commits[half:]
            self._commits = [*self._commits, self._begun]
        self._wake.set()

    # What it tells

    def job(self) -> Job:
        """As of now."""
        ready, job, commits, (step, productive, waited, saved) = self._ready, self._job, self._commits, self._at
        seconds = (self._ended or time.perf_counter()) - self._began
        if ready is None:
            return replace(job, seconds=seconds, starting=seconds)
        if job.end in (FINISHED, REGROUPED, PREEMPTED):  # what followed the last step was its checkpoint
            saved = seconds - job.starting - productive - waited - self._lost
        return replace(
            job, seconds=seconds, step=step, productive=productive, waiting=waited, saving=saved, lost=self._lost, commits=commits
        )

    def goodput(self) -> Goodput | None:
        """Of the run so far; None where the earlier jobs could not be read, or on a rank that is not the first."""
        return None if self._earlier is None else summarise([*self._earlier, self.job()])

    def seen(self) -> tuple[float, int]:
        """(seconds of running, failures) of the run's earlier jobs."""
        return seen(self._earlier or [])

    # Writing

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = time.perf_counter()
        end = REGROUPED if error is None and not self.is_finished else end_of(error)
        self._job = replace(self._job, end=end, reason=_reason(error) if error and end in (DIVERGED, FAILED) else "")
        if self._thread is None:
            return
        self._deadline = self._ended + _LAST_WORD
        self._over.set()
        self._wake.set()
        self._thread.join(_LAST_WORD)
        if self._thread.is_alive() or not self._is_written:
            say("warning: how this job ended could not be written to the goodput ledger; it will count as one that died")

    def _write_all(self) -> None:
        while True:
            is_over = self._over.is_set()
            self._is_written = self._write()
            if is_over and (self._is_written or time.perf_counter() > self._deadline):
                return
            self._wake.wait(_PAUSE if is_over else _WRITE_EVERY)
            self._wake.clear()

    def _write(self) -> bool:
        job = self.job()
        try:
            self._run.directory.write(key_of(job.generation), job.to_json())
        except Exception as e:  # noqa: BLE001  whatever goes wrong in a store's client must not reach training
            if not self._has_warned:
                say(f"warning: the goodput ledger could not be written, which is tried again ({e})")
            self._has_warned = True
            return False
        return True


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, TesseraError) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]
