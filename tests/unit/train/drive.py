"""Trains several configs one after the other in one process group: `torchrun .. drive.py JOBS.json RESULTS.json`.

A job is {config, overrides, and by_rank: further ones of a rank, by its number}; its result is {error, beats}: the name and text of what was
raised, or null; and how often rank 0 told its watcher that it begins something of validation, where it has one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import spoilt  # noqa: F401  an objective of the tests

from pipeline.checkpoint import claim_run
from pipeline.config import load_config
from pipeline.core.command import run_rank
from pipeline.core.errors import TesseraError
from pipeline.core.world import World
from pipeline.train import watch
from pipeline.train.keeper import Signals
from pipeline.train.watcher import Signs
from pipeline.train.worker import run_worker, settled, use_cores


class Counted(Signs):
    """Signs of life, counted."""

    begun: ClassVar[list[int]] = []

    def beat(self, phase: int, step: int | None = None) -> None:
        self.begun.append(phase)
        super().beat(phase, step)


def main(jobs: Path, results: Path) -> None:
    world = World.from_environment()
    use_cores(2)
    watch.Signs = Counted  # type: ignore[misc]
    done = []
    for job in json.loads(jobs.read_text()):
        error = None
        Counted.begun.clear()
        try:
            config = load_config(job["config"], [*job["overrides"], *job.get("by_rank", {}).get(str(world.rank), [])])
            run_worker(claim_run(settled(config, world)), world, None, Signals())
        except TesseraError as e:
            error = [type(e).__name__, str(e)]
        done.append({"error": error, "beats": Counted.begun.count(watch.VALIDATING)})
    assert "mlflow" not in sys.modules, "nobody tracks here, and importing it takes seconds of every rank's start"
    if world.is_main:
        results.write_text(json.dumps(done))


if __name__ == "__main__":
    run_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
