"""Small models of every family with random numbers everywhere, and what it means that two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.models import create
from pipeline.models.formats import Imported
from pipeline.models.model import Model

VIT = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "pixels": 16, "classes": 5}
MAE = {"width": 32, "depth": 2, "heads": 4, "patch": 4, "pixels": 16, "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
IGPT = {"width": 16, "depth": 2, "heads": 2, "pixels": 4, "colors": 8}
TEXT = {"kind": "transformer", "width": 24, "depth": 2, "heads": 3}
CLIP = {"pixels": 16, "embed": 6, "text": TEXT, "vocabulary": 50, "context": 7}
CLIP_VIT = {**CLIP, "vision": {"kind": "vit", "patch": 4, "width": 32, "depth": 2, "heads": 2}}
CLIP_RESNET = {**CLIP, "pixels": 64, "vision": {"kind": "resnet", "depths": (1, 2, 1, 1), "width": 8}}


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Also gains, biases and running statistics; what is fixed (MAE's positions) stays."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=random) + 0.5)
    return model.eval()


def make(family: str, options: dict[str, Any]) -> Model:
    return randomise(create(family, seed=0, **options))


def large(family: str, options: dict[str, Any]) -> Model:
    """As `make`, without the time that initialising takes."""
    model = create(family, device="meta", **options).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=random)
        for buffer in model.buffers():
            buffer.fill_(1)
    return model.eval()


def images(pixels: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def captions(vocabulary: int = 50, context: int = 7) -> torch.Tensor:
    """The largest token is the end."""
    tokens = torch.randint(3, vocabulary - 1, (2, context), generator=torch.Generator().manual_seed(2))
    tokens[0, 4:], tokens[0, 3], tokens[1, -1] = 0, vocabulary - 1, vocabulary - 1
    return tokens


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.float64
    assert float((a - b).abs().max() / b.abs().max()) < 1e-12


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same(found: Imported, model: Model) -> None:
    """Bit for bit, options too."""
    assert found.options == model.options.model_dump(mode="json")
    assert_same_state(found.state, model.state_dict())
    assert_same_state(dict(found.model().state_dict()), model.state_dict())
