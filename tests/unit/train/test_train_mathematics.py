"""The same mathematics everywhere: the loss curve and the contrastive gradient do not depend on ranks, ZeRO stage and micro-batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mathematics import EXACT, FAMILIES, FEW, STATISTICS, VARIANTS, Task
from workshop import Workshop

from pipeline.config import load_config
from pipeline.core.storage import Storage
from pipeline.core.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Found = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("mathematics")
    make_dataset(Storage(str(root / "data")), {"train": 50})
    shop = Workshop(root)
    # CLIP's epsilon: with 1e-8 Adam makes steps of what rounding leaves of gradients that are zero (those of keys' biases are).
    shop.change(batch=12, micro_batch=4, validate=None, optimizer={"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "clip": 1.0})
    return shop


@pytest.fixture(scope="module")
def found(shop: Workshop) -> Found:
    """By world size."""
    for size in (1, 2, 3, 4):
        results = str(shop.root / f"{size}.json")
        shop.fork(size, [str(Path(__file__).with_name("mathematics.py")), str(shop.root / "config.yaml"), results], seconds=800)
    return {size: json.loads((shop.root / f"{size}.json").read_text()) for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_curve_is_the_same(found: Found, family: str) -> None:
    one = found[1][f"{family}0"]
    assert one[-1] < one[0]
    for size, results in found.items():
        for stage in range(4):
            assert results[f"{family}{stage}"] == pytest.approx(one, abs=1e-5), (size, stage)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_it_is_with_other_optimisers_and_memory_in_other_places(found: Found, name: str) -> None:
    """Recomputed, compiled, offloaded and partitioned once more, a model trains as it does without."""
    same = {"recompute": "clip", "again": "igpt", "offload": "vit", "all": "vit", "hpz": "vit", "compile": "still"}.get(name, name)
    one = found[1][f"{same}0"][:FEW]
    _, stages, sizes = VARIANTS[name]
    assert len(set(one)) == FEW
    for size in sizes:
        for stage in stages:
            assert found[size][f"{name}{stage}"] == pytest.approx(one, abs=1e-5), (size, stage)


def test_factored_moments_move_to_another_stage(found: Found) -> None:
    """Saved after half of the steps, and read into an engine of the next stage."""
    for stage in range(4):
        assert found[2][f"moved{stage}"] == pytest.approx(found[1]["adafactor0"], abs=1e-5), stage


def test_the_average_is_the_same_everywhere(found: Found) -> None:
    one = found[1]["averages0"]
    for stage in range(4):
        for key, average in found[2][f"averages{stage}"].items():
            assert average == pytest.approx(one[key], abs=1e-5), (stage, key)


@pytest.mark.parametrize("name", EXACT)
def test_the_contrastive_gradient_is_that_of_one_big_batch(shop: Workshop, found: Found, name: str) -> None:
    """Against autograd, which goes through all N x N logits at once, in fp32."""
    task = Task(load_config(str(shop.root / "config.yaml"), [f"name={name}-whole", *EXACT[name], "pretrain.micro_batch=12"]), World())
    model, batch = task.model, next(task.batches)
    images, texts, scale, *bias = model(task.objective.inputs.images(batch), batch.tokens)
    own = torch.arange(12)
    if name == "softmax":
        logits = scale * images @ texts.T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    else:
        logits = scale * images @ texts.T + bias[0]
        loss = -F.logsigmoid((2 * torch.eye(12) - 1) * logits).sum() / 12
    loss.backward()
    expected = {key: p.grad.flatten() for key, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values())
    for size, results in found.items():
        for stage in range(4):
            for micro in (3, 12):
                value, found_gradient = results[f"{name}{stage}-{micro}"]
                assert value == pytest.approx(loss.item(), rel=1e-6), (size, stage, micro)
                for key, gradient in expected.items():
                    off = (torch.tensor(found_gradient[key]) - gradient).abs().max()
                    assert off <= 1e-6 * max(1.0, largest), (size, stage, micro, key, float(off))


def test_running_statistics_move_once(shop: Workshop, found: Found) -> None:
    """Of an image tower with BatchNorm, although each micro-batch passes through it twice."""
    one, two = found[1]["statistics"], found[2]["statistics"]
    assert one["visual.bn1.num_batches_tracked"] == 3 and two["visual.bn1.num_batches_tracked"] == 1, (
        "three micro-batches; of two ranks the first has one"
    )
    task = Task(load_config(str(shop.root / "config.yaml"), ["name=whole-statistics", *STATISTICS]), World())
    tower = task.model.visual
    with torch.no_grad():
        for _ in range(3):
            tower(task.objective.inputs.images(next(task.batches)))
    for name in ("running_mean", "running_var"):
        assert one[f"visual.bn1.{name}"] == pytest.approx(getattr(tower.bn1, name).tolist(), rel=1e-5), name
