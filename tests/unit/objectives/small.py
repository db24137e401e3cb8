"""The smallest model of each objective, and batches for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.models import Model, build, create
from pipeline.objectives import Facts, Inputs, Objective, Teacher, build_objective, model_options
from pipeline.stream.batches import MicroBatch, collate
from pipeline.stream.mixing import Mix
from pipeline.stream.palette import Palette

PIXELS, CLASSES, COLORS, VOCABULARY, LENGTH = 8, 5, 6, 30, 7
FACTS = Facts(CLASSES, COLORS, VOCABULARY, LENGTH)
SOT, EOT = VOCABULARY - 2, VOCABULARY - 1
PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)

SIZE = {"width": 16, "depth": 1, "heads": 2}
VIT = {**SIZE, "patch": 4}
PAIR = {"vision": {"kind": "vit", **VIT}, "text": SIZE}
# Objective -> its smallest model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("vit", VIT),
    "next-pixel": ("igpt", SIZE),
    "bert-pixels": ("igpt", SIZE),
    "pixels-and-classes": ("igpt", SIZE),
    "masked-patches": ("vit", VIT),
    "mae": ("mae", {**VIT, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}),
    "distil": ("vit", {**VIT, "distilled": True}),
    "contrastive": ("clip", {**PAIR, "embed": 12}),
    "sigmoid-contrastive": ("clip", {**PAIR, "embed": 12}),
    "caption": ("caption", PAIR),
    "bag-of-words": ("vit", VIT),
}
NEEDED = {"distil": {"teacher": "/the/teacher"}}  # arguments without a default


def randomised(model: Model, seed: int = 0) -> Model:
    """With numbers in all parameters, so that nothing hides in zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def a_teacher(**inputs: Any) -> Teacher:
    """A classifier that knows nothing, but is sure of it; normalises as no other."""
    model = randomised(create("vit", pixels=PIXELS, classes=CLASSES, **VIT), seed=5).double()
    return Teacher(model.eval().requires_grad_(False), **{"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.6), **inputs})


def set_up(
    name: str, arguments: Mapping[str, Any] | None = None, *, fresh: bool = False, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Model, Objective]:
    """The model and the objective as training makes them; in fp64 the model is exact, and its weights are random, not `fresh`."""
    arguments = {**NEEDED.get(name, {}), **(arguments or {})}
    family, own = MODELS[name]
    model = build(family, model_options(family, {**own, **options}, name, arguments, PIXELS, FACTS), seed=1)
    teacher = a_teacher()
    teacher.model.to(dtype)
    inputs = Inputs(MEAN, STD, dtype, PALETTE, teacher)
    return (model if fresh else randomised(model)).to(dtype), build_objective(name, arguments, inputs)


def a_batch(
    labels: Sequence[int] = (0, 3, 1, 4), *, captions: Sequence[Sequence[int]] | None = None, mix: Mix | None = None, seed: int = 0
) -> MicroBatch:
    """Noise of a colour of its own, with `labels` and `captions`, lists of words below [SOT]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), PIXELS, PIXELS, 3)
    color = torch.randint(0, 128, (len(labels), 1, 1, 3), generator=generator)
    images = (torch.randint(0, 128, shape, generator=generator) + color).to(torch.uint8)
    if captions is None:
        captions = [torch.randint(1, SOT, (1 + n % (LENGTH - 2),), generator=generator).tolist() for n in range(len(labels))]
    made = collate(0, [], images)
    return replace(made, labels=torch.tensor(labels), tokens=as_tokens(captions), mix=mix)


def as_tokens(captions: Sequence[Sequence[int]]) -> torch.Tensor:
    """(b, LENGTH): as a tokenizer gives them."""
    rows = [[SOT, *words, EOT] for words in captions]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def as_input(batch: MicroBatch, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """fp64 (b, 3, P, P), (x / 255 - mean) / std, pixel by pixel of what mixup leaves of it."""
    x = (batch.images.double() / 255 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    if batch.mix is not None:
        assert batch.mix.box is None
        x = torch.stack([batch.mix.lam * x[i] + (1 - batch.mix.lam) * x[len(x) - 1 - i] for i in range(len(x))])
    return x.permute(0, 3, 1, 2)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, by its definition in fp64."""
    exact = logits.detach().double()
    return exact - exact.exp().sum(dim=-1, keepdim=True).log()


def gradients(model: Model) -> dict[str, bool]:
    """Which parameters have a gradient that is not zero."""
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
