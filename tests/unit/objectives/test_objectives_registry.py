from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.inputs import Image
from pipeline.config.pretrain import Best
from pipeline.core.errors import ConfigError
from pipeline.models.registry import GIVEN
from pipeline.objectives import OBJECTIVES, VALIDATION, Facts, check_best, check_mixing, model_options
from pipeline.stream.batches import filler
from tests.unit.objectives.small import FACTS, LENGTH, MODELS, NEEDED, PIXELS, a_batch, set_up


def options(objective: str, model: str, **own: Any) -> Any:
    return model_options(model, own, objective, NEEDED.get(objective, {}), PIXELS, FACTS)


def test_each_has_a_model_here() -> None:
    assert set(MODELS) == set(OBJECTIVES)
    assert all(family in OBJECTIVES[name].families for name, (family, _) in MODELS.items())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_it_can_be_learnt(name: str) -> None:
    """Three steps of SGD on one batch, and one and the same draw of masks."""
    model, objective = set_up(name, fresh=True, dtype=torch.float32)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-4), []
    for _ in range(4):
        torch.manual_seed(0)
        loss, _ = objective.loss(model, a_batch())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4, losses


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_loss_and_metrics_are_scalars_in_fp32_from_a_model_in_bf16(name: str) -> None:
    model, objective = set_up(name, dtype=torch.bfloat16)
    exact, of_exact = set_up(name, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    loss, metrics = objective.loss(model, a_batch())
    torch.manual_seed(0)
    expected, same = of_exact.loss(exact, a_batch())
    assert loss.dtype == torch.float32 and loss.shape == () and all(value.shape == () for value in metrics.values())
    assert set(metrics) == set(same) == type(objective).metrics and loss.item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_filler_gives_numbers(name: str) -> None:
    """Its loss counts 0 times, and 0 times what is no number is none."""
    model, objective = set_up(name)
    torch.manual_seed(0)
    loss, metrics = objective.loss(model, filler(2, PIXELS, LENGTH if "captions" in OBJECTIVES[name].needs else 0))
    (loss * 0).backward()
    assert torch.isfinite(loss) and all(torch.isfinite(value) for value in metrics.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())  # nan is something


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (
            "classify",
            "clip_vit_b32",
            r"^pretrain.objective.name: 'classify' trains models of bit or resnet or vit, and clip_vit_b32 is of clip "
            r"\(allowed for it: contrastive, sigmoid-contrastive\)$",
        ),
        (
            "mae",
            "vit_b16",
            r"trains models of mae, and vit_b16 is of vit \(allowed for it: bag-of-words, classify, distil, masked-patches\)",
        ),
        ("next-pixel", "mae_b16", r"trains models of igpt, and mae_b16 is of mae \(allowed for it: mae\)"),
        ("contrastive", "caption_vit_b32", r"and caption_vit_b32 is of caption \(allowed for it: caption\)"),
        ("classify", "igpt_s", r"and igpt_s is of igpt \(allowed for it: bert-pixels, next-pixel, pixels-and-classes\)"),
        ("masked-patches", "bit_r50x1", r"and bit_r50x1 is of bit \(allowed for it: bag-of-words, classify, distil\)"),
        ("classify", "vitt_b16", r"^pretrain.model.name: 'vitt_b16' is not known; the nearest are vit_"),
        ("clasify", "vit_b16", r"^pretrain.objective.name: 'clasify' is not known, did you mean 'classify'"),
    ],
)
def test_a_model_that_it_cannot_train(objective: str, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(objective, model)


@pytest.mark.parametrize("key", sorted(GIVEN))
def test_what_is_said_elsewhere(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pretrain.model.{key}: is not said here, it follows from the data and from pretrain.image$"):
        options("classify", "vit_b16", **{key: 7})


def test_errors_name_the_place_in_the_config() -> None:
    with pytest.raises(ConfigError, match=r"^pretrain.image.pixels: 8 is not a multiple of the patch, 16 pixels$"):
        options("classify", "vit_b16")
    with pytest.raises(ConfigError, match=r"^pretrain.model.widht: no such key, did you mean 'width'\? \(allowed: name, ") as e:
        options("classify", "vit", widht=3, patch=4, depth=1, heads=1, width=3)
    assert not GIVEN & set(str(e.value).replace(",", "").replace(")", "").split())
    with pytest.raises(ConfigError, match=r"^pretrain.model.vision.widht: no such key, did you mean 'width'"):
        options("contrastive", "clip_vit_b32", vision={"widht": 3})


@pytest.mark.parametrize(
    ("objective", "model", "expected"),
    [
        ("classify", "vit_b16", {"classes": 5, "masked": False}),
        ("masked-patches", "vit_b16", {"classes": 0, "masked": True}),
        ("bag-of-words", "resnet50", {"classes": 30}),
        ("next-pixel", "igpt_s", {"colors": 6, "classes": 0}),
        ("pixels-and-classes", "igpt_s", {"colors": 6, "classes": 5}),
        ("contrastive", "clip_vit_b16", {"vocabulary": 30, "context": 7, "logit_bias": None}),
        ("sigmoid-contrastive", "clip_rn50", {"vocabulary": 30, "context": 7, "logit_bias": -10}),
        ("caption", "caption_vit_b32", {"vocabulary": 30, "context": 7}),
    ],
)
def test_what_follows_from_the_data(objective: str, model: str, expected: dict[str, Any]) -> None:
    facts = Facts(5, 6, 30, 7)
    made = model_options(model, {}, objective, {}, 224, facts)
    assert {name: getattr(made, name) for name in expected} == expected and made.pixels == 224  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_what_has_no_labels_to_mix(name: str) -> None:
    check_mixing(name, Image())
    for key in ("mixup", "cutmix"):
        if name in ("classify", "distil"):
            check_mixing(name, Image(**{key: 0.2}))
        else:
            message = rf"^pretrain.image.{key}: mixes images with their labels, and '{name}' has none \(allowed for: classify, distil\)$"
            with pytest.raises(ConfigError, match=message):
                check_mixing(name, Image(**{key: 0.2}))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_best_is_chosen_by_what_is_measured(name: str) -> None:
    for metric in ("loss", *OBJECTIVES[name].metrics):
        check_best(name, Best(metric=f"{VALIDATION}{metric}"))
    for metric in ("top1", "validate/", "validate/accuracy"):
        with pytest.raises(ConfigError, match=rf"^pretrain.save.best.metric: '{metric}' is not known.*\(allowed: .*validate/loss"):
            check_best(name, Best(metric=metric))
