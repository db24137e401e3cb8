"""The recorded metrics of a run, as its checkpoints hold them."""

from __future__ import annotations

import json

from pipeline.checkpoint.commit import HISTORY, Checkpoints
from pipeline.core.storage import Storage


def read_history(run: Storage) -> list[dict[str, float]]:
    """The recorded metrics of a run up to its newest checkpoint, a row a record; empty where there is no checkpoint.

    They are part of the checkpoint, so a row of a step that a resume repeats is never there twice.
    """
    checkpoints = Checkpoints(run)
    commits = checkpoints.commits()
    if not commits:
        return []
    return [json.loads(line) for line in checkpoints.fetch(commits[-1], HISTORY).splitlines()]
