"""Losses over all pairs of a global batch, and their gradients, tile by tile.

    rank r:  own images, own captions ── all-gather ──▶ everyone's        2 N E numbers
             own rows x tiles of everyone's captions  ─▶ log-sum-exp of each image     ── all-gather ──▶ N numbers
             own captions x tiles of everyone's images ─▶ that of each caption         ── all-gather ──▶ N numbers
             the same tiles again ─▶ the gradient of own rows, whole: nothing more is sent

Since every rank knows everyone's features and log-sums, it has the gradient of the whole loss by its own features, and no gradient goes
back through the gather. A tile is n x T numbers, so memory is O(n T + N E) a rank, never N x N (the idea of Inf-CL, arXiv 2410.17243).

Shapes: n own pairs, N pairs of all ranks, E embedding, T pairs of a tile. All in fp32 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.core.world import World

TILE = 4096


@dataclass(frozen=True)
class Pairs:
    """Images and captions that belong together, (n, E) each: a rank's own, or everyone's."""

    images: torch.Tensor
    captions: torch.Tensor


@dataclass(frozen=True)
class PairLoss:
    """`loss`, `hits` (images nearest to their own caption) and the gradients by `scale` and `bias` () are this rank's share, of which all
    ranks' sum is the whole; the gradients by its `images` and `captions` (n, E) are those of the whole loss."""

    loss: torch.Tensor
    hits: torch.Tensor
    images: torch.Tensor
    captions: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


def softmax_pairs(own: Pairs, scale: torch.Tensor, sizes: Sequence[int], world: World, tile: int = TILE) -> PairLoss:
    """CLIP's loss (arXiv 2103.00020, figure 3): the mean over images of the cross-entropy of their caption among all N, and over captions
    of that of their image, halved. `sizes`: n of each rank. All ranks together."""
    everyone, first, total = _gather(own, sizes, world)
    by_image, hits = _log_sums(own.images, everyone.captions, scale, first, tile)
    by_caption, _ = _log_sums(own.captions, everyone.images, scale, first, tile)
    all_by_image, all_by_caption = (world.concatenate(sums, sizes) for sums in (by_image, by_caption))
    matching = scale * (own.images * own.captions).sum(dim=1)

    def pulls(mine: torch.Tensor, others: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """By how likely each column is for its row, and each row for its column."""

        def weights(logits: torch.Tensor, at: slice) -> torch.Tensor:
            return (logits - rows[:, None]).exp() + (logits - columns[at]).exp()

        return _gradient(mine, others, scale, tile, weights)

    images = pulls(own.images, everyone.captions, by_image, all_by_caption)
    captions = pulls(own.captions, everyone.images, by_caption, all_by_image)
    images, captions = ((g - 2 * scale * partner) / (2 * total) for g, partner in ((images, own.captions), (captions, own.images)))
    loss = (by_image + by_caption - 2 * matching).sum() / (2 * total)
    return PairLoss(loss, hits, images, captions, _of_scale(images, own.images, scale), torch.zeros_like(scale))


def sigmoid_pairs(own: Pairs, scale: torch.Tensor, bias: torch.Tensor, sizes: Sequence[int], world: World, tile: int = TILE) -> PairLoss:
    """SigLIP's loss (arXiv 2303.15343, equation 1): each of N x N pairs on its own, summed over pairs, a mean over images. As above."""
    everyone, first, total = _gather(own, sizes, world)
    matching = scale * (own.images * own.captions).sum(dim=1) + bias
    loss, by_bias = -matching.sum(), torch.zeros_like(matching[:0].sum())
    best = _Best(len(own.images), first, matching)
    for at in _tiles(len(everyone.images), tile):
        logits = scale * own.images @ everyone.captions[at].T + bias
        loss = loss + F.softplus(logits).sum()
        by_bias = by_bias + logits.sigmoid().sum()
        best.see(logits, at)
    images, captions = (
        (_gradient(mine, others, scale, tile, lambda logits, at: (logits + bias).sigmoid()) - scale * partner) / total
        for mine, others, partner in ((own.images, everyone.captions, own.captions), (own.captions, everyone.images, own.images))
    )
    by_bias = (by_bias - len(own.images)) / total
    return PairLoss(loss / total, best.hits(), images, captions, _of_scale(images, own.images, scale), by_bias)


def _gather(own: Pairs, sizes: Sequence[int], world: World) -> tuple[Pairs, int, int]:
    """Everyone's pairs in the order of ranks, which is that of the global batch; where this rank's begin; N."""
    everyone = Pairs(world.concatenate(own.images, sizes), world.concatenate(own.captions, sizes))
    return everyone, sum(sizes[: world.rank]), sum(sizes)


def _tiles(total: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, total)) for start in range(0, total, tile))


def _log_sums(mine: torch.Tensor, others: torch.Tensor, scale: torch.Tensor, first: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp of each row of scale x mine @ others.T, (n,), and how many rows are largest at their own column."""
    sums = torch.full_like(mine[:, 0], -torch.inf)
    best = _Best(len(mine), first, sums)
    for at in _tiles(len(others), tile):
        logits = scale * mine @ others[at].T
        sums = torch.logaddexp(sums, logits.logsumexp(dim=1))
        best.see(logits, at)
    return sums, best.hits()


def _gradient(
    mine: torch.Tensor,
    others: torch.Tensor,
    scale: torch.Tensor,
    tile: int,
    weights: Callable[[torch.Tensor, slice], torch.Tensor],
) -> torch.Tensor:
    """scale x the sum over columns of weights(logits, columns) @ others, (n, E): what pulls each row."""
    total = torch.zeros_like(mine)
    for at in _tiles(len(others), tile):
        total += weights(scale * mine @ others[at].T, at) @ others[at]
    return scale * total


def _of_scale(gradient: torch.Tensor, mine: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Logits are scale x images . captions, so the sum of G_ij x_ij, with G the gradient by logits and x the cosines, is that of the
    images' gradient times the images, over scale."""
    return (gradient * mine).sum() / scale


class _Best:
    """The largest logit of each row and its column, over tiles; of equal ones the first."""

    def __init__(self, rows: int, first: int, like: torch.Tensor) -> None:
        self._value = torch.full((rows,), -torch.inf, device=like.device, dtype=like.dtype)
        self._column = torch.full((rows,), -1, device=like.device)
        self._own = torch.arange(first, first + rows, device=like.device)

    def see(self, logits: torch.Tensor, at: slice) -> None:
        if logits.shape[0] == 0:
            return
        value, column = logits.max(dim=1)
        self._column = torch.where(value > self._value, column + at.start, self._column)
        self._value = torch.maximum(value, self._value)

    def hits(self) -> torch.Tensor:
        return (self._column == self._own).sum()
