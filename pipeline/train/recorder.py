"""What happens beside training on one rank: history, tracking, progress, and checkpoints when they are due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from pipeline.checkpoint import Commit, ModelCard, Run
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.ledger import Ledger
from pipeline.checkpoint.save import Outcome, Saver, new_attempt
from pipeline.config import fingerprint
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import Diverged
from pipeline.core.progress import Progress, say
from pipeline.core.retry import insist
from pipeline.core.tracking import Tracker
from pipeline.core.units import Duration, format_count
from pipeline.core.world import World
from pipeline.objectives import VALIDATION
from pipeline.plan import Plan
from pipeline.stream import Stream
from pipeline.stream.skips import go_back, leave_out, told_skip
from pipeline.train.copies import compare
from pipeline.train.guard import Guard, Trouble
from pipeline.train.keeper import Keeper, Signals
from pipeline.train.profile import Profiler
from pipeline.train.saving import State, encode, files, fragments, on_main, restore
from pipeline.train.speed import Clock, Row
from pipeline.train.watch import SAVING, Lag, beat
from pipeline.train.zero import Engine


class Recorder:
    """The hooks of a run, which goes on from `state` if there is one; `ledger` learns where the time goes."""

    def __init__(
        self,
        run: Run,
        card: ModelCard,
        stream: Stream,
        engine: Engine,
        saver: Saver,
        plan: Plan,
        state: State | None,
        world: World,
        tracker: Tracker | None,
        signals: Signals,
        ledger: Ledger,
    ) -> None:
        p = run.config.pretrain
        assert p is not None, "a run that trains"
        self.run, self.card, self.stream, self.engine, self.saver, self.plan = run, card, stream, engine, saver, plan
        self.world, self.tracker, self.ledger = world, tracker, ledger
        self.history = [encode(row) for row in state.history] if state else []
        self.metrics: Row = dict(state.commit.metrics) if state else {}  # of the newest validation
        self.clock = Clock(is_async=world.device.type == "cuda")
        first = state.commit.step if state else 0
        self.progress = Progress("pretrain", plan.steps, "steps", done=first)
        self.guard = Guard(p.guard, state.guard if state else None)
        self.check_every = p.guard.check.steps(p.batch, plan.samples_an_epoch) if p.guard.check else None
        self.lag = Lag(p.guard.lag, world)
        self.is_fp16 = p.precision == "fp16"
        every = _steps_between(p, plan)
        self.keeper = Keeper(saver, self._snapshot, p.save, every, signals, world, ledger.seen(), self._told, self.clock)
        self.profiler = Profiler(p.profile, first, run.directory, world)
        self.keeper.committed = first if state else None

    def record(self, row: Row) -> None:
        self.history.append(encode(row))
        self.metrics |= {name: value for name, value in row.items() if name.startswith(VALIDATION)}
        ratio = self.lag.look(self.clock.own) if "train/loss" in row else None
        if not self.world.is_main:
            return
        if self.tracker:
            own = {} if ratio is None else {"guard/slowest_rank": ratio}  # no part of the history, which no machine changes
            self.tracker.metrics({k if "/" in k else f"train/{k}": v for k, v in row.items() if k != "step"} | own, step=int(row["step"]))
        if "train/loss" in row:
            self.progress.text = f"loss {row['train/loss']:.3f}, {format_count(row['train/images_per_s'])} images/s"

    def after_step(self, step: int, waited: float, loss: torch.Tensor) -> int:
        """Raises Diverged as `_go_back`, InfrastructureError where ranks differ, and what `Keeper.act` raises."""
        beat(SAVING, step)
        self.ledger.step(step, waited, self.keeper.stalled)
        if self.world.is_main:
            self.progress.update(1)
        self.profiler.after_step(step)
        if self.check_every and step % self.check_every == 0:
            compare(self.engine.copies(), self.world)
        is_bad = self.engine.is_left_out and self._leave_out(step)
        parts = self.guard.swap(loss, self.engine.norm)
        try:
            *seen, total, norm = self.world.sum([*self.keeper.look(), *parts])
            is_overflow = self.engine.is_left_out and not is_bad
            self.guard.judge(total / self.stream.pieces, is_bad, is_overflow, norm / self.world.size)
            self.keeper.act(step, seen, self.guard.is_sound)
        except Trouble as e:
            return self._go_back(step, str(e))
        except Diverged as e:  # of weights that cannot be saved, on all ranks
            return self._go_back(step, f"no sound state could be saved ({str(e).removeprefix('pretrain: ')})")
        return step

    def _leave_out(self, step: int) -> bool:
        """Keep in mind that the update of `step` was left out; False where that was for the scale of fp16's loss, not for the batch."""
        turns = self.engine.turns_not_finite()
        if self.is_fp16 and not self.world.sum([len(turns)])[0]:
            return False
        skip = leave_out(self.stream, step, turns, self.world, self.engine.samples_not_finite())
        self.guard.left_out += 1
        self._tell_guard(step)
        if self.world.is_main:
            say(f"warning: pretrain: {told_skip(skip)}")
        return True

    def _go_back(self, step: int, what: str) -> int:
        """From `step` to a checkpoint before, and on with the data that follow: its step. What is set aside on the way is no good.

        Raises:
            Diverged: there is none, or this has not helped before.
        """
        self.keeper.settle()
        checkpoints = self.saver.checkpoints
        told = f"warning: pretrain: going back from step {step:,}"
        commits = on_main(self.world, lambda: insist(checkpoints.commits, self.saver.patience, lambda text: say(f"{told}: {text}")))
        chosen = self.guard.choose(commits, step, what)
        if self.world.is_main:
            for newer in commits[commits.index(chosen) + 1 :]:
                checkpoints.set_aside(newer, f"training that went on from the checkpoint of step {newer.step:,} went wrong twice")
        self.world.barrier()
        state = restore(self.engine, checkpoints, self.stream.view, self.world)
        assert state is not None, "one was chosen"
        back = state.commit.step
        skip = go_back(self.stream, state.loader, step, what)
        self.guard.went_back(back, state.guard)
        self.history, self.metrics = [encode(row) for row in state.history], dict(state.commit.metrics)
        self.keeper.go_back(back)
        self.ledger.go_back(back, state.commit.generation)
        self.progress.done = back
        self._tell_guard(back)
        if self.world.is_main:
            say(f"warning: pretrain: at step {step:,} {what}; training goes on from step {back:,}, and {told_skip(skip)}")
        return back

    def _tell_guard(self, step: int) -> None:
        self.record({"step": step, "samples": step * self.stream.global_batch, **self.guard.counts()})

    def finish(self) -> None:
        """Have the last step committed."""
        self.profiler.close()
        self.keeper.finish(self.plan.steps)

    def _snapshot(self, step: int) -> tuple[list[Fragment], Commit | None, Mapping[str, bytes]]:
        if self.check_every:
            compare(self.engine.copies(), self.world)
        self.ledger.save()
        self.guard.settle(self.world, self.stream.pieces)
        self.engine.agree_on_buffers(self.stream.has_samples)
        new = self.stream.agree(self.world)
        if not self.world.is_main:
            return fragments(self.engine, self.world), None, {}
        if new:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in new).items())
            say(f"warning: {len(new)} samples could not be read and were replaced by others since the last checkpoint ({reasons})")
        loader, lease = self.stream.state(), self.saver.lease
        commit = Commit(
            step=step,
            samples=self.stream.trained,
            generation=lease.generation,
            attempt=new_attempt(lease),
            world_size=self.world.size,
            zero_stage=self.engine.stage,
            view=loader["view"],
            config=fingerprint(self.run.config),
            files=[],
            metrics=dict(self.metrics),
        )
        return (
            fragments(self.engine, self.world),
            commit,
            files(self.engine, replace(self.card, step=step), loader, self.guard.state(), self.history),
        )

    def _told(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self.ledger.commit(outcome.step, self.keeper.stalled)
        if self.tracker and outcome.error is None:
            goodput = self.ledger.goodput()
            sums = goodput.metrics() if goodput else {}
            self.tracker.metrics({"train/save_stall_s": outcome.stall, "train/save_s": outcome.seconds, **sums}, step=outcome.step)
        elif self.tracker:
            self.tracker.metrics({"train/failed_saves": self.keeper.failures}, step=outcome.step)


def _steps_between(p: Pretrain, plan: Plan) -> int | None:
    """Steps between two saves; None where they go by time."""
    every = p.save.every
    return every.steps(p.batch, plan.samples_an_epoch) if isinstance(every, Duration) and not every.is_time else None
