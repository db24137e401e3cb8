from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from pipeline.models import create
from tests.unit.objectives.small import a_batch, as_input, gradients, set_up


def cosines(model: torch.nn.Module, batch) -> list[list[float]]:  # type: ignore[no-untyped-def]
    """[image][caption], from each tower alone."""
    images = model.visual(as_input(batch)).detach()  # type: ignore[operator]
    texts = model.text(batch.tokens).detach()  # type: ignore[operator]
    return [[float(i @ t / (i @ i).sqrt() / (t @ t).sqrt()) for t in texts] for i in images]


@pytest.mark.parametrize("name", ["contrastive", "sigmoid-contrastive"])
def test_the_scale_is_the_models_and_all_learns(name: str) -> None:
    model, objective = set_up(name)
    batch = a_batch()
    loss, metrics = objective.loss(model, batch)
    assert metrics["logit_scale"].item() == pytest.approx(math.exp(model.logit_scale.item()), rel=1e-6)
    near = cosines(model, batch)
    assert metrics["top1"].item() == sum(row[b] == max(row) for b, row in enumerate(near)) / 4
    loss.backward()
    assert all(gradients(model).values()), "both towers, scale and bias"
    assert objective.count(batch).item() == 4


def test_contrastive_is_a_loop_over_pairs() -> None:
    """Figure 3: for each image its caption among all, for each caption its image among all, the mean of both."""
    model, objective = set_up("contrastive")
    batch = a_batch()
    scale, near = math.exp(model.logit_scale.item()), cosines(model, batch)
    total = 0.0
    for b in range(4):
        total += math.log(sum(math.exp(scale * near[b][other]) for other in range(4))) - scale * near[b][b]
        total += math.log(sum(math.exp(scale * near[other][b]) for other in range(4))) - scale * near[b][b]
    assert objective.loss(model, batch)[0].item() == pytest.approx(total / 8, rel=1e-5)


def test_sigmoid_contrastive_is_a_loop_over_pairs() -> None:
    """Equation 1: -1 / b of the sum over pairs of log(1 / (1 + exp(z (-t x . y - c)))), z = 1 for those that belong together, else -1."""
    model, objective = set_up("sigmoid-contrastive")
    batch = a_batch()
    t, c, near = math.exp(model.logit_scale.item()), model.logit_bias.item(), cosines(model, batch)
    total = 0.0
    for i, j in product(range(4), repeat=2):
        z = 1 if i == j else -1
        total += math.log(1 + math.exp(z * (-t * near[i][j] - c)))
    assert objective.loss(model, batch)[0].item() == pytest.approx(total / 4, rel=1e-5)


def alike(model: torch.nn.Module) -> tuple[object, float]:
    """A batch of one image and one caption, eight times, and their cosine."""
    batch = a_batch(range(8))
    batch = replace(batch, images=batch.images[:1].expand_as(batch.images), tokens=batch.tokens[3:4].expand_as(batch.tokens))  # type: ignore[index,union-attr]
    return batch, cosines(model, batch)[0][0]


def test_contrastives_first_loss() -> None:
    """ln b where no image is told from another; the fresh features of different ones are not far apart."""
    model, objective = set_up("contrastive", fresh=True)
    batch, _ = alike(model)
    assert objective.loss(model, batch)[0].item() == pytest.approx(math.log(8), rel=1e-6)  # type: ignore[arg-type]
    different = objective.loss(model, a_batch(range(8)))[0].item()
    assert different != pytest.approx(math.log(8), rel=1e-3) and different == pytest.approx(math.log(8), abs=1.5)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_sigmoid_contrastives_first_loss() -> None:
    """Section 3.2: t' = ln 10 and the bias -10, so that pairs that do not belong together begin near nothing."""
    model, objective = set_up("sigmoid-contrastive", fresh=True)
    assert model.logit_scale.exp().item() == pytest.approx(10, rel=1e-6) and model.logit_bias.item() == -10
    batch, cosine = alike(model)
    expected = math.log1p(math.exp(10 - 10 * cosine)) + 7 * math.log1p(math.exp(10 * cosine - 10))
    assert objective.loss(model, batch)[0].item() == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


def test_a_config_may_begin_elsewhere() -> None:
    model, _ = set_up("sigmoid-contrastive", fresh=True, logit_bias=-3.0, logit_scale=0.5)
    assert (model.logit_bias.item(), model.logit_scale.item()) == (-3, 0.5)


def test_embeddings_of_a_16_bit_model_have_length_one() -> None:
    """And the scale is exact: at 100 of it, bf16 would move logits by 0.3. An empty caption is no NaN in fp16."""
    options = {"embed": 8, "pixels": 8, "vocabulary": 520, "context": 8, "logit_scale": 4.6}
    vision, text = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}, {"width": 16, "depth": 1, "heads": 2}
    model = create("clip", seed=0, vision=vision, text={"kind": "transformer", **text}, **options).bfloat16()
    tokens = torch.tensor([[518, 5, 6, 519, 0, 0, 0, 0]])
    image, caption, scale = model(torch.randn(3, 3, 8, 8).bfloat16(), tokens)
    assert all(x.dtype == torch.float32 and (x.norm(dim=1) - 1).abs().max() < 1e-6 for x in (image, caption))
    assert scale.item() == pytest.approx(math.exp(model.logit_scale.float().item()), rel=1e-6)
    bag = create("clip", seed=0, vision=vision, text={"kind": "bag-of-words", **text}, **options).half()
    empty = torch.tensor([[518, 519, 0, 0, 0, 0, 0, 0]])
    assert not bag(tokens=empty)[1].any()
