"""Classification without training anything: by nearest neighbours, and by captions.

Shapes: N images of a bank, M images to classify, D features, E embedding, C classes, T captions of a class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_CHUNK = 2**24  # similarities at a time


def nearest_classes(
    bank: torch.Tensor, labels: torch.Tensor, images: torch.Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> torch.Tensor:
    """Classes (M,) of `images` (M, D) by those of the `k` nearest of `bank` (N, D) with `labels` (N,): a vote in which a neighbour of
    cosine s counts exp(s / temperature) (Wu et al. 2018, arXiv 1805.01978, section 3.4; k = 20 as DINO has it, arXiv 2104.14294,
    section 3.2). Of classes with as many votes the first."""
    bank, k = F.normalize(bank.float(), dim=-1), min(k, len(bank))
    found = []
    for piece in F.normalize(images.float(), dim=-1).split(max(1, _CHUNK // len(bank))):
        cosines, rows = (piece @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(piece), classes, device=bank.device)
        # Less the largest possible cosine, so that a small temperature does not overflow.
        votes.scatter_add_(1, labels[rows], ((cosines - 1) / temperature).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found) if found else labels[:0]


def mean_captions(captions: torch.Tensor, classes: int) -> torch.Tensor:
    """(C, E), of length 1: the mean of a class's T captions, each of length 1, made as long again. `captions` is (C T, E), those of a class
    in a row (CLIP, arXiv 2103.00020, section 3.1.4)."""
    return F.normalize(captions.view(classes, -1, captions.shape[-1]).mean(dim=1), dim=-1)
