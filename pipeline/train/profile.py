"""A trace of a few steps by torch's profiler, and a table of the operators that took longest, in the run directory:

profile/step-<first>-rank-<r>.json.gz   for chrome://tracing or https://ui.perfetto.dev
profile/step-<first>-rank-<r>.txt       the table
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.pretrain import Profile
from pipeline.core.errors import CredentialsError, StorageError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.world import World

FOLDER = "profile"
_ROWS = 30  # of the table


class Profiler:
    """Traces `config.steps` steps of a job, from `config.after` steps after its first on. The steps that are traced are slower; others cost
    nothing. Without a config nothing is done."""

    def __init__(self, config: Profile | None, first: int, run: Storage, world: World) -> None:
        self._run, self._world = run, world
        is_mine = config is not None and (world.is_main or config.ranks == "all")
        self._begin = first + config.after if config and is_mine else None
        self._left = config.steps if config else 0  # steps to trace: counted, for training may go back meanwhile
        self._profile: profile | None = None

    def after_step(self, step: int) -> None:
        """`step` steps are done."""
        if self._begin is None:
            return
        if self._profile is not None:
            self._left -= 1
            if not self._left:
                self.close()
        elif self._profile is None and step == self._begin:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.start()

    def close(self) -> None:
        """What is traced until now is kept as it is."""
        if self._profile is not None:
            self._profile.stop()
            self._keep(self._profile)
            self._profile = self._begin = None

    def _keep(self, traced: profile) -> None:
        """A store that fails costs the trace, not the run."""
        name = f"{FOLDER}/step-{(self._begin or 0) + 1}-rank-{self._world.rank}"
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        with tempfile.TemporaryDirectory(prefix="tessera-profile-") as scratch:
            trace = Path(scratch) / "trace.json.gz"
            traced.export_chrome_trace(str(trace))
            try:
                self._run.write(f"{name}.json.gz", trace.read_bytes())
                self._run.write(f"{name}.txt", table.encode())
            except (StorageError, CredentialsError) as e:
                say(f"warning: pretrain.profile: the trace could not be kept ({e})")
                return
        if self._world.is_main:
            say(f"pretrain     steps {(self._begin or 0) + 1:,} and on are traced in {self._run.url}/{name}.json.gz")
