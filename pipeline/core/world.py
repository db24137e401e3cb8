"""One object for rank vocabulary: who am I among how many, on which device, and the few collectives we need by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

JOINED = timedelta(minutes=10)  # that ranks may start after each other; torch would wait for half an hour


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment() -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which torchrun and Ray Train both set; alone where they are absent."""
        env = os.environ
        return World(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in fp64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def table(self, values: Sequence[float]) -> list[list[float]]:
        """Each rank's values (as many on each), by rank, in fp64, on every rank."""
        rows = [[0.0] * len(values) for _ in range(self.size)]
        rows[self.rank] = [float(value) for value in values]
        sums = self.sum([value for row in rows for value in row])
        return [sums[r * len(values) : (r + 1) * len(values)] for r in range(self.size)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. The value must be picklable and small."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def concatenate(self, rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """`rows` (n, ..) of all ranks, one rank's after the other's, (N, ..); `sizes` says n of each rank. No gradient goes through."""
        if self.size == 1:
            return rows
        most = max(sizes)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = rows.new_empty((self.size * most, *rows.shape[1:]))
        dist.all_gather_into_tensor(found, padded)
        if min(sizes) == most:
            return found
        return torch.cat([part[:n] for part, n in zip(found.split(most), sizes, strict=True)])

    def rows(self, own: torch.Tensor) -> torch.Tensor:
        """The rows (n_r, ..) of every rank's tensor in rank order, on every rank; n_r may differ, also be 0."""
        if self.size == 1:
            return own
        return self.concatenate(own, [int(count) for [count] in self.table([len(own)])])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
