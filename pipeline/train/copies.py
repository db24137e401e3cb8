"""Whether ranks still hold the same numbers where each has a copy of them: memory and devices fail without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from pipeline.core.errors import InfrastructureError
from pipeline.core.world import World

_NAMED = 8  # ranks


def compare(copies: Iterable[tuple[str, torch.Tensor]], world: World) -> None:
    """All ranks together, each with its `copies` by name, the same ones in the same order.

    Raises:
        InfrastructureError: on all ranks, where one differs in a single bit.
    """
    if world.size == 1:
        return
    names, sums = [], []
    for name, tensor in copies:
        names.append(name)
        sums.append(checksum(tensor))
    if not sums:
        return
    every = torch.stack(sums)
    totals = world.gather(int(every.sum()))
    if len(set(totals)) == 1:
        return
    by_rank = world.gather(every.tolist())
    differing = [name for i, name in enumerate(names) if len({own[i] for own in by_rank}) > 1]
    what = f"{differing[0]}{f' and {len(differing) - 1} more' if len(differing) > 1 else ''}"
    usual, count = Counter(totals).most_common(1)[0]
    others = [rank for rank, total in enumerate(totals) if total != usual]
    if 2 * count > world.size:
        told = f"{_ranks(others)} not the same numbers of {what} as the others"
    else:
        told = f"{_ranks(list(range(world.size)))} not the same numbers of {what}, and which are right cannot be told"
    raise InfrastructureError(
        f"pretrain: {told}: memory, a device or the network has failed; nothing of it is saved, and the same command goes on from the last "
        "checkpoint"
    )


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, as whole numbers modulo 2^64: int64 (). One bit changes it."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(torch.uint8)
    if bits.storage_offset() % 8:  # cannot be read eight bytes at a time where it is
        bits = bits.clone()
    whole = bits.numel() // 8 * 8
    return bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} holds"
    return f"ranks {', '.join(map(str, ranks[:_NAMED]))}{' ..' if len(ranks) > _NAMED else ''} hold"
