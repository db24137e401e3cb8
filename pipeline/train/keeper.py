"""When a run saves its state, when it stops, and what it says of both. Every rank calls the same functions at the same steps.

Ranks see different things (a clock, a signal, an upload that is done), so after each step they add up what each has seen, and act on the
sum. A save is begun when it is due and the one before it has ended; what became of it is learned at some later step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pipeline.checkpoint.commit import Commit
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.interval import best_interval, mean_time_between_failures
from pipeline.checkpoint.save import Outcome, Saver
from pipeline.config.pretrain import Save
from pipeline.core.errors import Diverged, Fenced, Preempted, TesseraError, Unsaved
from pipeline.core.progress import say
from pipeline.core.units import format_bytes, format_seconds
from pipeline.core.world import World
from pipeline.train.speed import CHECKPOINT, Clock

_FATAL = (Diverged, Fenced)
_COPY_RATE = 1e9  # bytes a second, taken to host memory before one save was measured
_AGAIN = 30.0  # seconds, at least, from the beginning of a save that failed to the next, which does not wait until one is due
_LOOK_EVERY = 0.01  # seconds, for what is about to end
_CHANGE = 1.25  # a computed interval is told again where it changed by more than this


class Signals:
    """What is asked of a running job, from any thread: to `save`; to save and `stop`; to end at the next save, so that a larger group can
    go on (`grow`); to save and end at once, so that one on other machines can (`move`)."""

    def __init__(self) -> None:
        self.events = {name: threading.Event() for name in ("save", "stop", "grow", "move")}
        self.save, self.stop, self.grow, self.move = self.events.values()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGUSR1 asks for a save; SIGTERM and SIGUSR2 (Slurm's `--signal=USR2@120`) for a save and the end. Python hears of signals in its
        main thread alone; in another, nothing is listened to."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = {signal.SIGUSR1: self.save, signal.SIGTERM: self.stop, signal.SIGUSR2: self.stop}
        before = {each: signal.signal(each, lambda *_, event=event: event.set()) for each, event in wanted.items()}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class Regroup(Exception):
    """All is saved, and another group of workers goes on."""


class Keeper:
    """Saves of a run.

    Args:
        snapshot: gives this rank's fragments, and on rank 0 the commit (without files) and the small files, of the state after a step.
        every: optimiser steps between saves; None where the interval is a time or worked out.
        seen: (seconds of running, failures) of the run's earlier jobs, for `every: auto`.
        told: is given each outcome; on rank 0.
        clock: learns how long training stood still.
    """

    def __init__(
        self,
        saver: Saver,
        snapshot: Callable[[int], tuple[list[Fragment], Commit | None, Mapping[str, bytes]]],
        config: Save,
        every: int | None,
        signals: Signals,
        world: World,
        seen: tuple[float, int] = (0.0, 0),
        told: Callable[[Outcome], None] = lambda outcome: None,
        clock: Clock | None = None,
    ) -> None:
        self.saver, self.snapshot, self.config, self.every, self.signals, self.world = saver, snapshot, config, every, signals, world
        self.told, self.clock = told, clock or Clock()
        self.stalled = 0.0  # seconds that training stood still for saves
        self.failures = 0  # saves that came to nothing since the last commit
        self.committed: int | None = None
        self._fatal: TesseraError | None = None
        self._is_due = self._has_warned = self._is_ending = False
        self._began_at = time.monotonic()
        self._unsaved_since: float | None = None  # when the first save began of those since the last commit
        self._between_failures = mean_time_between_failures(*seen)
        self._interval = self._choose_interval(saver.memory.bytes / _COPY_RATE, 0.0, before=None)

    def after_step(self, step: int) -> None:
        """Learn what became of the last save, and begin one where it is due; raises as `act`."""
        self.act(step, self.world.sum(self.look()))

    def look(self) -> list[float]:
        """What this rank has seen since the last step; what all have is the sum, which `act` is given."""
        if (outcome := self.saver.take()) is not None:
            self._conclude(outcome)
        is_main = self.world.is_main
        return [
            self.signals.save.is_set() or (is_main and self._is_time()),
            self.signals.stop.is_set(),
            self.signals.grow.is_set(),
            self.signals.move.is_set(),
            is_main and self._is_late(),
            self._fatal is not None,
            not self.saver.is_free,
        ]

    def act(self, step: int, seen: Sequence[float], may_save: bool = True) -> None:
        """Begin a save after `step` where it is due, or when it may be; end where that is asked for. `seen`: by all ranks.

        Raises:
            Preempted: somebody asked for the end, and all is saved. Regroup: so that another group can go on. Fenced, Diverged: nothing
                may be saved any more.
            Unsaved: what was to be saved was not, for `save.patience`.
        """
        wants, ends, grows, moves, late, fatal, busy = seen
        if fatal == self.world.size and self._fatal is not None:
            raise self._fatal
        if ends:
            self.finish(step, self.config.retry.seconds)
            raise Preempted(f"pretrain: asked to end; all is saved at step {step:,}, and the same command goes on from there")
        if late:
            raise Unsaved(
                f"pretrain.save: no checkpoint could be committed for {format_seconds(self.config.patience.seconds)} "
                "(pretrain.save.patience), so the run ends; the same command goes on from the last one"
            )
        self._is_due = self._is_due or bool(wants) or (self.every is not None and step % self.every == 0)
        if moves:
            self.finish(step, self.config.retry.seconds)
            raise Regroup
        if self._is_due and may_save and not busy:
            self._begin(step)
            if grows and self.world.broadcast(self._wait()) is None:  # a save that failed is no reason to end what trains
                raise Regroup

    def finish(self, step: int, within: float | None = None) -> None:
        """Save the state after `step` where it is not saved, and wait until it is committed.

        Args:
            within: for how many seconds it is tried; by default for `save.patience`.

        Raises:
            Unsaved: it cannot be, for so long; Fenced, Diverged; on every rank.
        """
        seconds = self.config.patience.seconds if within is None else within
        deadline = time.monotonic() + seconds
        self._is_ending = True
        while True:
            self._wait()
            if self.world.broadcast(self.committed == step):
                self._is_ending = False
                return
            self._begin(step)
            error, left = self.world.broadcast((self._wait(), deadline - time.monotonic()))
            if error is None:
                continue
            if isinstance(error, _FATAL):
                raise error
            if left <= 0:
                raise Unsaved(
                    f"pretrain.save: the state after step {step:,} could not be saved for {format_seconds(seconds)} ({error}); "
                    "the same command goes on from the checkpoint before"
                )
            time.sleep(min(_AGAIN, left))

    def settle(self) -> None:
        """Wait for the save in flight, if there is one, be it committed or not. Raises Fenced."""
        self._wait()
        while not self.saver.is_free:
            time.sleep(_LOOK_EVERY)
        if isinstance(self._fatal, Fenced):
            raise self._fatal

    def go_back(self, step: int) -> None:
        """The state is that of the checkpoint at `step` again."""
        self.committed, self.failures, self._fatal, self._unsaved_since = step, 0, None, None
        self._is_due, self._began_at = False, time.monotonic()

    def _begin(self, step: int) -> None:
        self._is_due = False
        self.signals.save.clear()
        began = time.monotonic()
        with self.clock.span(CHECKPOINT):
            fragments, commit, files = self.snapshot(step)
            self.saver.begin(fragments, commit, files)
        self._began_at = time.monotonic()
        if self._unsaved_since is None:
            self._unsaved_since = began
        self.stalled += self._began_at - began

    def _wait(self) -> TesseraError | None:
        """The error of the save in flight, once it has ended."""
        began = time.monotonic()
        outcome = None
        with self.clock.span(CHECKPOINT):
            while self.saver.is_pending and (outcome := self.saver.take(timeout=1.0)) is None:
                pass
        self.stalled += time.monotonic() - began
        if outcome is None:
            return None
        self._conclude(outcome)
        return outcome.error

    def _conclude(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self.failures, self.committed, self._unsaved_since = 0, outcome.step, None
            self._interval = self._choose_interval(outcome.stall, outcome.seconds, self._interval)
            self._check_notice(outcome)
        else:
            self.failures += 1
            if isinstance(outcome.error, _FATAL):
                self._fatal = outcome.error
            elif self.world.is_main:
                what = "it is tried again" if self._is_ending else "training goes on"
                say(f"warning: the checkpoint at step {outcome.step:,} is not saved, {what} ({outcome.error})")
        if self.world.is_main:
            self.told(outcome)

    def _is_time(self) -> bool:
        since = time.monotonic() - self._began_at
        return (self._interval is not None and since >= self._interval) or (self.failures > 0 and since >= _AGAIN)

    def _is_late(self) -> bool:
        return self._unsaved_since is not None and time.monotonic() - self._unsaved_since > self.config.patience.seconds

    def _choose_interval(self, cost: float, lasts: float, before: float | None) -> float | None:
        """Seconds between saves, where they go by time."""
        if self.every is not None:
            return None
        if self.config.every != "auto":
            return self.config.every.seconds
        interval = best_interval(cost, self._between_failures, lasts)
        if self.world.is_main and (before is None or max(interval / before, before / interval) > _CHANGE):
            say(
                f"pretrain     saving every {format_seconds(interval)}: a save costs {cost:.2g} s of training and is committed after "
                f"{lasts:.2g} s, a failure is expected every {format_seconds(self._between_failures)}"
            )
        return interval

    def _check_notice(self, outcome: Outcome) -> None:
        notice = self.config.notice
        if notice is not None and outcome.seconds > notice.seconds and self.world.is_main and not self._has_warned:
            self._has_warned = True
            say(
                f"warning: pretrain.save.notice: saving {format_bytes(outcome.bytes)} a worker took {format_seconds(outcome.seconds)}, "
                f"and a machine that is taken back goes after {format_seconds(notice.seconds)}; what follows the last one is lost then "
                "(more workers, a nearer store or a shorter pretrain.save.every help)"
            )
