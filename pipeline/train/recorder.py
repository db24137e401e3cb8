"""What happens beside training on one rank: history, tracking, progress, and checkpoints when they are due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from pipeline.checkpoint import Commit, ModelCard, Run
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.ledger import Ledger
from pipeline.checkpoint.save import Outcome, Saver, new_attempt
from pipeline.config import fingerprint
from pipeline.config.pretrain import Pretrain
from pipeline.core.progress import Progress, say
from pipeline.core.tracking import Tracker
from pipeline.core.units import Duration, format_count
from pipeline.core.world import World
from pipeline.objectives import VALIDATION
from pipeline.plan import Plan
from pipeline.stream import Stream
from pipeline.train.keeper import Keeper, Signals
from pipeline.train.profile import Profiler
from pipeline.train.saving import State, encode, files, fragments
from pipeline.train.speed import Clock, Row
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
        every = _steps_between(p, plan)
        self.keeper = Keeper(saver, self._snapshot, p.save, every, signals, world, ledger.seen(), self._told, self.clock)
        self.profiler = Profiler(p.profile, first, run.directory, world)
        self.keeper.committed = first if state else None

    def record(self, row: Row) -> None:
        self.history.append(encode(row))
        self.metrics |= {name: value for name, value in row.items() if name.startswith(VALIDATION)}
        if not self.world.is_main:
            return
        if self.tracker:
            self.tracker.metrics({k if "/" in k else f"train/{k}": v for k, v in row.items() if k != "step"}, step=int(row["step"]))
        if "train/loss" in row:
            self.progress.text = f"loss {row['train/loss']:.3f}, {format_count(row['train/images_per_s'])} images/s"

    def after_step(self, step: int, waited: float) -> None:
        self.ledger.step(step, waited, self.keeper.stalled)
        if self.world.is_main:
            self.progress.update(1)
        self.profiler.after_step(step)
        self.keeper.after_step(step)

    def finish(self) -> None:
        """Have the last step committed."""
        self.profiler.close()
        self.keeper.finish(self.plan.steps)

    def _snapshot(self, step: int) -> tuple[list[Fragment], Commit | None, Mapping[str, bytes]]:
        self.ledger.save()
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
            samples=loader["consumed"],
            generation=lease.generation,
            attempt=new_attempt(lease),
            world_size=self.world.size,
            zero_stage=self.engine.stage,
            view=loader["view"],
            config=fingerprint(self.run.config),
            files=[],
            metrics=dict(self.metrics),
        )
        return fragments(self.engine, self.world), commit, files(self.engine, replace(self.card, step=step), loader, self.history)

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
