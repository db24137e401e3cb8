"""Where the time of a run goes, over all its jobs: the goodput ledger.

    goodput/<generation>.json      what the job of this lease did with its time; its rank 0 writes it every half minute and at each commit

Every second of a run is of one kind:

    productive   in the training loop, on steps that count; validation and logging among it, for the config asks for them
    input wait   rank 0 waited for data
    save         training stood still for a checkpoint
    lost         in the training loop, on steps that a later job repeated from an earlier checkpoint, or the same one after it had gone
                 back to it, or that were never finished
    restart      a job had begun and its loop had not: joining, opening the data, building the model, reading a checkpoint
    idle         no job was there: between the last sign of life of one and the beginning of the next, which includes starting processes

Seconds of a job are those of a clock that nobody sets. Wall clocks tell `idle` alone: a machine whose clock is wrong spoils nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.core.errors import Diverged, Preempted
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.units import format_seconds

FORMAT = 1
DIRECTORY = "goodput"
KINDS = ("productive", "input wait", "save", "lost", "restart", "idle")
# How a job ended; None where it has not, or had no time to say so.
FINISHED, REGROUPED, PREEMPTED, STOPPED, DIVERGED, FAILED = "finished", "regrouped", "preempted", "stopped", "diverged", "failed"
_NAME = re.compile(r"\d+\.json")
_HOUR = 3600.0


@dataclass(frozen=True)
class Job:
    """What the ledger of one job holds. `seconds` go from its beginning to its last sign of life; `productive`, `waiting` and `saving` are
    as of the last finished `step`, and what is left of them belongs to the step after it."""

    run: str  # the run's id
    generation: int  # of its lease
    began: float  # seconds since 1970, UTC
    seconds: float
    workers: int
    gpus: int
    starting: float  # seconds before the loop
    productive: float = 0.0  # seconds in the loop, neither waiting for input nor saving
    waiting: float = 0.0
    saving: float = 0.0
    steps: int = 0  # of the whole run
    first: int | None = None  # the step that it went on from; None while it starts
    origin: int | None = None  # the generation that committed that step; None where it began without a checkpoint of this run
    step: int = 0
    lost: float = 0.0  # seconds in the loop that it took back itself, as training had gone wrong
    commits: list[tuple[int, float]] = field(default_factory=list)  # (step, productive seconds as of it); of many, some are left out
    end: str | None = None
    reason: str = ""  # what it died of
    price: float | None = None  # money an hour of one worker
    currency: str = ""
    format: int = FORMAT

    @property
    def loop(self) -> float:
        """Seconds in the loop, neither waiting for input nor saving nor taken back, the unfinished step's among them."""
        return max(0.0, self.seconds - self.starting - self.waiting - self.saving - self.lost)

    @property
    def last_seen(self) -> float:
        """Seconds since 1970, by the clock of its machine."""
        return self.began + self.seconds

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def parse(data: bytes) -> Job:
        """Raises ValueError for what is no ledger of this format."""
        values: dict[str, Any] = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        try:
            return Job(**{**values, "commits": [(step, seconds) for step, seconds in values["commits"]]})
        except (KeyError, TypeError) as e:
            raise ValueError(f"not a ledger ({e})") from e


@dataclass(frozen=True)
class Goodput:
    """A run's `seconds` by kind, all of KINDS, over all its jobs; and its `cost` likewise, where a price is known: workers cost while they
    run, so `idle` costs nothing. `failures`: jobs that failed, or ended without a word."""

    seconds: dict[str, float]
    cost: dict[str, float] | None
    currency: str
    jobs: int
    failures: int

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        return self.seconds["productive"] / self.whole if self.whole else 0.0

    def shares(self) -> dict[str, float]:
        return {kind: seconds / self.whole if self.whole else 0.0 for kind, seconds in self.seconds.items()}

    def money(self, kind: str | None = None) -> str:
        """`41.20 USD` of a kind, or of all; empty where no price is known."""
        if self.cost is None:
            return ""
        return f"{self.cost[kind] if kind else sum(self.cost.values()):,.2f} {self.currency}".rstrip()

    def metrics(self) -> dict[str, float]:
        """As MLflow gets them."""
        return {
            "goodput/fraction": self.fraction,
            **{f"goodput/{kind.replace(' ', '_')}_s": seconds for kind, seconds in self.seconds.items()},
            "goodput/jobs": self.jobs,
            "goodput/failures": self.failures,
            **({"goodput/cost": sum(self.cost.values())} if self.cost is not None else {}),
        }

    def in_words(self) -> str:
        """`96.2% of 12 h 03 min was training that counts; 3 jobs, 2 failures; 41.20 USD, of which 39.63 USD went into it`."""
        percent = math.floor(1000 * self.fraction) / 10  # nearly all is not all
        money = f"; {self.money()}, of which {self.money('productive')} went into it" if self.cost is not None else ""
        return (
            f"{percent}% of {format_seconds(self.whole)} was training that counts; {self.jobs} job{'' if self.jobs == 1 else 's'}, "
            f"{self.failures or 'no'} failure{'' if self.failures == 1 else 's'}{money}"
        )


def summarise(jobs: Sequence[Job], price: float | None = None, currency: str = "") -> Goodput:
    """Add up the jobs of a run. A job without a price of its own has the newest other job's, or else `price`.

    The kinds add up to the seconds of all jobs and between them: to the time from the first beginning to the last sign of life, where the
    machines' clocks agree and no job was still there when the next one began.
    """
    jobs = _that_count(jobs)
    priced = next((job for job in reversed(jobs) if job.price is not None), None)
    price, currency = (priced.price, priced.currency) if priced else (price, currency)
    seconds, cost = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    kept = _surviving(jobs)
    for number, job in enumerate(jobs):
        counts = min(job.loop, kept.get(job.generation, 0.0))
        spent = (counts, job.waiting, job.saving, job.loop - counts + job.lost, job.starting)
        hourly = job.workers * ((price if job.price is None else job.price) or 0.0)
        for kind, amount in zip(KINDS[:-1], spent, strict=True):
            seconds[kind] += amount
            cost[kind] += amount / _HOUR * hourly
        if number:
            seconds["idle"] += max(0.0, job.began - jobs[number - 1].last_seen)
    return Goodput(seconds, cost if price is not None else None, currency, len(jobs), _failures(jobs))


def seen(jobs: Sequence[Job]) -> tuple[float, int]:
    """(seconds of running, failures) of jobs that are over. Those that failed before their first step lost nothing, and are not counted."""
    return sum(job.seconds for job in jobs), sum(_has_failed(job) for job in jobs if job.first is not None and job.step > job.first)


def end_of(error: BaseException | None) -> str:
    """How a job ends that ends in `error`."""
    if error is None:
        return FINISHED
    ends = {Preempted: PREEMPTED, Diverged: DIVERGED, KeyboardInterrupt: STOPPED}
    return next((end for kind, end in ends.items() if isinstance(error, kind)), FAILED)


def read_jobs(run: Storage, run_id: str | None = None) -> list[Job]:
    """The ledgers in a run directory, in the order of generations: of the run of this id, for a run of the same name may have been there
    before. What is no ledger that this version reads is passed over, with a warning.

    Raises:
        StorageError, CredentialsError.
    """
    names = [name for name in run.names(DIRECTORY) if _NAME.fullmatch(name)]
    with ThreadPoolExecutor(16) as pool:
        jobs = [job for job in pool.map(lambda name: _read(run, name), names) if job is not None]
    return sorted((job for job in jobs if run_id is None or job.run == run_id), key=lambda job: job.generation)


def key_of(generation: int) -> str:
    return f"{DIRECTORY}/{generation:06d}.json"


def _read(run: Storage, name: str) -> Job | None:
    try:
        return Job.parse(run.read(f"{DIRECTORY}/{name}"))
    except FileNotFoundError:
        return None  # gone since it was listed
    except ValueError as e:
        say(f"warning: {run.url}/{DIRECTORY}/{name} is passed over ({e})")
        return None


def _that_count(jobs: Sequence[Job]) -> list[Job]:
    """Without those that found the run finished and had nothing to do."""
    counting: list[Job] = []
    for job in sorted(jobs, key=lambda job: job.generation):
        if job.step > (job.first or 0) or not any(other.end == FINISHED for other in counting):
            counting.append(job)
    return counting


def _surviving(jobs: Sequence[Job]) -> dict[int, float]:
    """Productive seconds on the way to where the run is now, by generation: back from the newest job, of each those up to the step from
    which the next one on the way went on."""
    kept: dict[int, float] = {}
    job = next((job for job in reversed(jobs) if job.first is not None), None)
    if job is None:
        return kept
    if job is jobs[-1] and job.end in (None, FINISHED):
        kept[job.generation] = job.loop
    else:  # it has ended, or another has begun and not said yet where it goes on from: that will be the newest checkpoint
        kept[job.generation] = _as_of(job, job.commits[-1][0]) if job.commits else 0.0
    by_generation = {each.generation: each for each in jobs}
    while job.origin is not None and job.origin < job.generation and (before := by_generation.get(job.origin)) is not None:
        kept[before.generation] = _as_of(before, job.first or 0)
        job = before
    return kept


def _as_of(job: Job, step: int) -> float:
    """Productive seconds of `job` up to `step`; between two steps that its ledger knows of, in proportion."""
    steps, seconds = zip((job.first or 0, 0.0), *job.commits, (job.step, job.productive), strict=True)
    return float(np.interp(step, steps, seconds))


def _failures(jobs: Sequence[Job]) -> int:
    """Of the jobs of a run; its newest may be running."""
    return sum(_has_failed(job) for job in jobs[:-1]) + (1 if jobs and jobs[-1].end == FAILED else 0)


def _has_failed(job: Job) -> bool:
    """Of a job that is over."""
    return job.end in (None, FAILED)
