"""What a rank saves of the engine's own memory, without the engine."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pipeline.core.world import World
from pipeline.train.state import State


def test_tensors_that_moved_are_saved_from_where_they_are() -> None:
    """An optimiser may put another tensor in the place of its own at any step."""
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    state = State(SimpleNamespace(module=module, optimizer=optimizer), 0, World())

    def saved(key: str, name: str) -> torch.Tensor:
        return next(f.tensor for f in state.owned() if (f.key, f.name) == (key, name))

    assert saved("exp_avg", "weight") is saved("exp_avg", "weight"), "not looked up each time"
    optimizer.state[module.weight]["exp_avg"] = torch.full((2, 3), 7.0)
    assert saved("exp_avg", "weight").tolist() == [7.0] * 6
    module.bias.data = torch.tensor([5.0, 6.0])
    assert saved("weight", "bias").tolist() == [5.0, 6.0]
    with torch.no_grad():
        module.bias.add_(1)
    assert saved("weight", "bias").tolist() == [6.0, 7.0]
