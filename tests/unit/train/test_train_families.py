"""Every family through the one loop, on real DeepSpeed: the loss curve does not depend on world size and ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import Workshop, close

from pipeline.checkpoint import find_model
from pipeline.core.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(360)]

VISION = "{kind: vit, width: 16, depth: 1, heads: 2, patch: 4}"
TEXT = "{kind: transformer, width: 16, depth: 1, heads: 2}"
CLIP = f"name: clip, embed: 8, vision: {VISION}, text: {TEXT}"
HALF = {"clip16": 1, "clip16-3": 3}  # in bf16, at a stage
VIT = "name: vit, width: 16, depth: 1, heads: 2, patch: 4"
IGPT = "{name: igpt, width: 16, depth: 2, heads: 2}"
CAPTIONS = "pretrain.text={size: 520, length: 8}"
# Name -> model, objective, and what else. The classifier with relative positions is the teacher of `distil`.
FAMILIES = {
    "relative": (f"{{{VIT}, pool: map, positions: relative}}", "name: classify"),
    "igpt": (IGPT, "name: next-pixel", "pretrain.palette={colors: 16}"),
    "bert": (IGPT, "name: bert-pixels", "pretrain.palette={url: three-bit}"),
    "joint": (IGPT, "name: pixels-and-classes", "pretrain.palette={colors: 16}"),
    "clip": (f"{{{CLIP}, logit_scale: 4.7}}", "name: contrastive", CAPTIONS),
    "siglip": (f"{{{CLIP}}}", "name: sigmoid-contrastive", CAPTIONS),
    "caption": (f"{{name: caption, vision: {VISION}, text: {TEXT}}}", "name: caption", CAPTIONS),
    "words": (f"{{{VIT}}}", "name: bag-of-words", CAPTIONS),
    "mae": ("{name: mae, width: 16, depth: 1, heads: 2, patch: 4, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}", "name: mae"),
    "patches": (f"{{{VIT}}}", "name: masked-patches"),
    "distil": (f"{{{VIT}}}", "name: distil, teacher: TEACHER"),
}  # fmt: skip


def job(shop: Workshop, name: str, family: str, *more: str) -> dict[str, Any]:
    model, objective, *other = FAMILIES[family]
    objective = objective.replace("TEACHER", shop.directory("relative").url)
    return shop.job(name, f"pretrain.model={model}", f"pretrain.objective={{{objective}}}", *other, *more)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("families")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    return Workshop(root)


@pytest.fixture(scope="module")
def alone(shop: Workshop) -> list[list[str] | None]:
    return shop.train(1, [job(shop, name, name) for name in FAMILIES] + [_resnet(shop, "resnet")])


@pytest.fixture(scope="module")
def pair(shop: Workshop, alone: object) -> list[list[str] | None]:
    """Two ranks: each family in three parts, and CLIP also at other stages and in bf16."""
    jobs = [job(shop, f"{name}3", name, "pretrain.zero.stage=3") for name in FAMILIES]
    jobs += [job(shop, f"clip{stage}", "clip", f"pretrain.zero.stage={stage}") for stage in (0, 1, 2)]
    jobs += [job(shop, name, "clip", "pretrain.precision=bf16", f"pretrain.zero.stage={stage}") for name, stage in HALF.items()]
    jobs.append(_resnet(shop, "resnet2"))
    return shop.train(2, jobs)


def _resnet(shop: Workshop, name: str) -> dict[str, Any]:
    return shop.job(name, "pretrain.model={name: resnet, depths: [1, 1, 1, 1], width: 8}", "pretrain.image={pixels: 32, enlarge: true}")


def test_everything_trains(alone: list[object], pair: list[object]) -> None:
    assert not any(alone) and not any(pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_from_where_theory_has_it(shop: Workshop, alone: object, family: str) -> None:
    losses = [row["train/loss"] for row in shop.rows(family) if "train/loss" in row]
    theory = {
        "relative": math.log(3), "igpt": math.log(16), "bert": math.log(512), "joint": math.log(16) + math.log(3),
        "words": math.log(find_model(shop.directory("words"))[0].options["classes"]), "patches": math.log(512),
    }  # fmt: skip
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert family not in theory or losses[0] == pytest.approx(theory[family], abs=0.05 if family == "patches" else 1e-6)


@pytest.mark.parametrize("name", [*(f"{name}3" for name in FAMILIES), "clip0", "clip1", "clip2"])
def test_two_ranks_and_every_stage_train_the_same(shop: Workshop, pair: object, name: str) -> None:
    """The gradient's norm may differ more than the loss: where logits are scaled by 100 it is ill-conditioned, and Adam's first steps
    make much of small gradients."""
    ours, theirs = shop.rows(name), shop.rows(name[:-1])
    norms = [[row.pop("train/grad_norm") for row in rows if "train/grad_norm" in row] for rows in (ours, theirs)]
    assert close(ours, theirs, 1e-5) and norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("name", ["clip", "clip0", "clip1", "clip2", "clip3", *HALF])
def test_the_logit_scale_is_kept_within_its_limit(shop: Workshop, pair: object, name: str) -> None:
    """It begins above ln 100, and six steps of 5e-3 and less would leave it there."""
    _, weights = find_model(shop.directory(name))
    limit = math.log(100)
    assert limit - 6 * 5e-3 < weights["logit_scale"].item() <= limit * (1 + 1e-6) and weights["logit_scale"].shape == ()
    assert all(math.isfinite(value) for row in shop.rows(name) for value in row.values())
    first, *later = [row["train/logit_scale"] for row in shop.rows(name) if "train/logit_scale" in row]
    assert first > 105 and max(later) < 100.1


def test_running_statistics_are_saved_and_agreed_on(shop: Workshop, pair: object) -> None:
    """Of BatchNorm: in the weights, moved from where they begin, and with two ranks the mean of what each saw."""
    (_, one), (_, two) = (find_model(shop.directory(name)) for name in ("resnet", "resnet2"))
    assert set(one) == set(two) and one["bn1.running_mean"].abs().max() > 1e-3
    assert not torch.allclose(one["bn1.running_var"], torch.ones(8))
    torch.testing.assert_close(two["bn1.running_mean"], one["bn1.running_mean"], rtol=0.7, atol=0.05)  # 15 of 30 micro-batches each


def test_the_card_holds_palette_and_tokenizer(shop: Workshop, alone: object, tmp_path: Path) -> None:
    card, _ = find_model(shop.directory("igpt"))
    palette = card.open_palette()
    assert palette is not None and palette.size == 16 and card.tokenizer is None
    card, _ = find_model(shop.directory("clip"))
    tokenizer = card.open_tokenizer()
    assert tokenizer is not None and tokenizer.size == card.options["vocabulary"] and card.palette is None
