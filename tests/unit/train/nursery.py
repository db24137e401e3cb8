"""Ranks that are forked from one process which has imported what all of them need: that takes seconds, which each of them would spend.

Started once a session of tests (`workshop.py`). Each line of its input asks for a group of ranks, as JSON: {arguments: of Python, size,
env, said: the file that gets what they say}; each line of its output tells that they have ended: their exit codes, by rank. Where one has
failed, the others are killed, as by torchrun. A single one is started as Python would be, without a word of ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pipeline.train.worker  # noqa: F401  and all that it imports
from pipeline.core.command import run_rank
from pipeline.train.library import import_deepspeed


def main() -> None:
    import_deepspeed()
    for later in ("deepspeed.runtime.zero.muon.muon_optimizer", "pandas"):  # what a first step imports; the former, torch's compiler
        importlib.import_module(later)
    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1 + threads.count("jemalloc_bg_thd"), f"forks lose all but one of {threads}"  # it is ready for them
    gc.freeze()  # DeepSpeed collects at every start, which would go through all that was imported
    for line in sys.stdin:
        asked = json.loads(line)
        ranks = {fork(asked, rank): rank for rank in range(asked["size"])}
        codes: dict[int, int] = {}
        while len(codes) < len(ranks):
            pid, status = os.wait()
            if (rank := ranks.get(pid)) is None:  # what an import has started, and never waited for
                continue
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                for other, its in ranks.items():
                    if its not in codes:
                        os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def fork(asked: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if not pid:
        run_rank(lambda: be(asked, rank))
    return pid


def be(asked: dict[str, Any], rank: int) -> None:
    size = str(asked["size"])
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size} if asked["size"] > 1 else {}
    os.environ.clear()
    os.environ.update(asked["env"] | ranks)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    said = os.open(asked["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    script, *_ = sys.argv = asked["arguments"]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
