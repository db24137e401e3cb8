"""When training has gone wrong, and how far it must go back. Every rank decides the same, from numbers that all of them have.

Two things are bad. An update that was left out, since loss or gradient was no finite number (`zero.py` leaves it out, on all ranks): the
model is as it was, and the next batch may be better. And a loss, or a norm of the gradient, far above that of recent steps, which the
model's weights may have caught: one such step is often a batch of odd samples, several in a row are not. After some in a row of either
kind training goes back to the last checkpoint and on with what follows the bad batch, since the same batches would do the same again;
PaLM's did so some 20 times (arXiv 2204.02311, section 5.1). Where that does not help either, the run ends as diverged.

Loss and norm of a step are judged a step later: by then they have been computed, so that nobody waits for them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from pipeline.checkpoint.commit import Commit
from pipeline.config.pretrain import Guard as GuardSection
from pipeline.core.errors import Diverged
from pipeline.core.world import World

_OVERFLOWS = 100  # updates in a row that fp16 may leave out while it looks for the scale of its loss
_NORMAL = 1.4826  # the standard deviation of a normal distribution by its median absolute deviation
_FLOOR = 0.02  # of where the loss began: the least deviation that counts, for on a plateau, or where all is learnt, there is hardly any
# Norms are judged by their logarithms, since they vary by factors: the least deviation of these that counts. With `spike: 10` a norm is too
# high from ten times the usual one on; where a model begins to learn, norms rise by less in a window.
_FLOOR_OF_LOGARITHMS = math.log(10) / 10
_ADVICE = "try a lower pretrain.optimizer.lr or a longer pretrain.schedule.warmup"
_SAMPLES = "`python -m pipeline.stream --run RUN --skipped` names the samples"


class Trouble(Exception):
    """Training must go back, for what its text says in a clause."""


class Spikes:
    """Tells a loss that is far above the losses before it: more than `factor` deviations above their median, over up to `window` steps and
    at least half as many. A deviation is that of the median of absolute deviations, which a few outliers do not move, and at least `floor`:
    by default a part of the highest median so far, `top`. What is too high does not enter the window."""

    def __init__(
        self, factor: float | None, window: int, losses: Iterable[float] = (), top: float = 0.0, floor: float | None = None
    ) -> None:
        self.factor, self.top, self.floor = factor, top, floor
        self.losses = deque(losses, maxlen=window)
        self._least = window // 2

    def limit(self) -> float:
        """The highest loss that is not too high."""
        if self.factor is None or len(self.losses) < self._least:
            return math.inf
        middle = median(self.losses)
        self.top = max(self.top, abs(middle))
        deviation = _NORMAL * median(abs(loss - middle) for loss in self.losses)
        return middle + self.factor * max(deviation, _FLOOR * self.top if self.floor is None else self.floor)

    def is_high(self, loss: float) -> bool:
        if loss > self.limit():
            return True
        self.losses.append(loss)
        return False


class Guard:
    """What has happened so far, as of a checkpoint's `state` where one was taken up."""

    def __init__(self, config: GuardSection, state: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.left_out = self.rewinds = 0  # updates left out, and times gone back, ever
        self.tries = 0  # times gone back without a checkpoint beyond `place`
        self.place = 0  # the furthest step that went wrong
        self._base: int | None = None  # the step that it went back to last
        self._held: tuple[_Held, _Held] | None = None  # this rank's part of the loss of the last step, and its norm, where not known yet
        self._take({})
        if state:
            self._take(state)
            self.left_out, self.rewinds, self.tries, self.place = (state[key] for key in ("left_out", "rewinds", "tries", "place"))

    def _take(self, state: Mapping[str, Any]) -> None:
        self.spikes = Spikes(self.config.spike, self.config.window, state.get("losses", ()), state.get("top", 0.0))
        self.norms = Spikes(self.config.spike, self.config.window, state.get("norms", ()), floor=_FLOOR_OF_LOGARITHMS)
        self.known: float | None = state.get("known")  # the loss of the last step, where it is
        self.known_norm: float = state.get("known_norm", math.nan)
        self._bad, self._high, self._overflows = state.get("bad", 0), state.get("high", 0), state.get("overflows", 0)
        self._steep = state.get("steep", 0)

    def state(self) -> dict[str, Any]:
        """What a resume needs to decide as the unbroken run, as plain values; `settle` comes before."""
        return {
            "losses": list(self.spikes.losses), "top": self.spikes.top, "norms": list(self.norms.losses),
            "known": self.known, "known_norm": self.known_norm,
            "bad": self._bad, "high": self._high, "steep": self._steep, "overflows": self._overflows,
            "left_out": self.left_out, "rewinds": self.rewinds, "tries": self.tries, "place": self.place,
        }  # fmt: skip

    # Each step

    def swap(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
        """Take this rank's part of a step's loss, and the norm of its gradient, scalars; gives those of the step before, no numbers where
        they are not to be had."""
        before, self._held = self._held, (_Held(loss), _Held(norm))
        return (before[0].value(), before[1].value()) if before else (math.nan, math.nan)

    def settle(self, world: World, pieces: int) -> None:
        """Learn loss and norm of the last step now, since a state is to be saved. All ranks together."""
        if self._held is not None:
            loss, norm = world.sum([held.value() for held in self._held])
            self.known, self.known_norm, self._held = loss / pieces, norm / world.size, None

    def judge(self, before: float, is_bad: bool, is_overflow: bool, norm: float = math.nan) -> None:
        """`before`, `norm`: the loss of the step before, of all ranks, and that of its gradient; no numbers where there were none.
        `is_bad`: the update of this one was left out; `is_overflow`: so it was, yet for the scale of fp16's loss alone.

        Raises:
            Trouble: it is time to go back.
        """
        if self.known is not None:
            before, norm = self.known, self.known_norm
        loss, self.known, self.known_norm = before, None, math.nan
        self._bad = self._bad + 1 if is_bad else 0
        self._overflows = self._overflows + 1 if is_overflow else 0
        if math.isfinite(loss):  # else its update was left out, and counted
            self._high = self._high + 1 if self.spikes.is_high(loss) else 0
            if math.isfinite(norm) and norm > 0:
                self._steep = self._steep + 1 if self.norms.is_high(math.log(norm)) else 0
        if self._bad >= self.config.skips:
            raise Trouble(f"loss or gradient has been no finite number for {_steps(self._bad)}, and no update was made")
        if self._overflows >= _OVERFLOWS:
            raise Trouble(f"the gradient has not been finite at any scale of fp16 for {_steps(self._overflows)}, and no update was made")
        if self._high >= self.config.lasts:
            usual, limit = median(self.spikes.losses), self.spikes.limit()
            raise Trouble(f"the loss has been above {limit:.4g} for {_steps(self._high)}, now {loss:.4g}, where {usual:.4g} was usual")
        if self._steep >= self.config.lasts:
            usual, limit = math.exp(median(self.norms.losses)), math.exp(self.norms.limit())
            lasts = f"for {_steps(self._steep)}, now {norm:.4g}, where {usual:.4g} was usual"
            raise Trouble(f"the norm of the gradient has been above {limit:.4g} {lasts}")

    @property
    def is_sound(self) -> bool:
        """Whether the model may be saved: nothing bad is going on."""
        return not (self._bad or self._high or self._steep)

    # Going back

    def choose(self, commits: Sequence[Commit], step: int, what: str) -> Commit:
        """The checkpoint to go back to from `step`, of `commits`, the newest last: that one, and the one before it where the newest has
        led to trouble before.

        Raises:
            Diverged: there is none, or going back has not helped.
        """
        if not commits:
            raise Diverged(f"pretrain: at step {step:,} {what}, and there is no checkpoint yet to go back to; {_ADVICE}")
        newest = commits[-1]
        self.tries = 1 if newest.step > self.place else self.tries + 1
        self.place = max(self.place, step)
        if self.tries > self.config.rewinds:
            times = "was not to go back (pretrain.guard.rewinds)" if self.tries == 1 else f"had gone back {_times(self.tries - 1)} already"
            raise Diverged(f"pretrain: at step {step:,} {what}, and training {times}; {_ADVICE} ({_SAMPLES})")
        older = [commit for commit in commits if self._base is not None and commit.step < self._base]
        self.rewinds += 1
        return older[-1] if self.tries > 1 and older else newest

    def went_back(self, step: int, state: Mapping[str, Any]) -> None:
        """To the checkpoint of `step`, of this `state`; what was counted stays."""
        self._base, self._held = step, None
        self._take(state)

    def counts(self) -> dict[str, float]:
        return {"guard/skipped_steps": self.left_out, "guard/rewinds": self.rewinds}


class _Held:
    """A number that a device is still computing. It is copied to the host behind what computes it, not behind what follows."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


def _steps(count: int) -> str:
    return f"{count} steps in a row" if count > 1 else "a step"


def _times(count: int) -> str:
    return f"{count} times" if count > 1 else "once"
