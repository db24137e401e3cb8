"""Models by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pipeline.core.errors import ConfigError
from pipeline.models import build, check_model, create, model_names
from pipeline.models.registry import FAMILIES, GIVEN
from pipeline.models.sizes import LISTED, VIT, published

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "pixels": 8, "classes": 5}


def test_names() -> None:
    assert {"vit", "vit_b16", "vit_bigg14", "vit_r50_b16", "deit_b16", "mae_l16"} <= set(model_names())
    assert len(model_names()) == len(set(model_names()))
    assert check_model("vit_b16", {"drop_path": 0.1}).drop_path == 0.1


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_model_can_be_made(name: str) -> None:
    model = create(name, device="meta")
    assert all(p.is_meta for p in model.parameters()) and model.parameter_count > 5e6
    assert model.options == check_model(name, {})


def test_models_of_the_configs_are_listed() -> None:
    """A config that names none has that of the one it extends."""
    configs = [yaml.safe_load(path.read_text()) for path in (Path(__file__).parents[3] / "configs/pretrain").glob("*.yaml")]
    models = [config["pretrain"].get("model", {}) for config in configs]
    names = {model if isinstance(model, str) else model.get("name", "vit") for model in models}
    assert {"vit_r50_l16", "vit_r50_b32", "clip_vit_b32"} <= names <= {*LISTED, *FAMILIES}


@pytest.mark.parametrize("name", ["clip_vit_so400m14", "caption_vit_e14"])
def test_text_towers_are_not_made_up(name: str) -> None:
    assert create("clip_vit_ti16", device="meta").options.text.width == 512  # ours
    with pytest.raises(ConfigError, match=f"'{name}' is not known"):
        check_model(name, {})


@pytest.mark.parametrize("name", ["vit_b16", "vit_r50_b16", "deit_s16", "mae_b16"])
def test_as_published(name: str) -> None:
    """224 pixels, a class token, 1,000 classes."""
    model = create(name, device="meta")
    assert model.options.pixels == 224 and model.cls_token.shape[:2] == (1, 1)
    assert [tuple(x.shape[:2]) for x in model.example(3)] == [(3, 3)] if name != "mae_b16" else [(3, 3), (3, 196)]
    if name != "mae_b16":
        assert model(*model.example(2)).shape == (2, 1000)


def test_other_patches_of_published_sizes() -> None:
    assert published("vit_l8") == ("vit", {**dict(zip(("width", "depth", "mlp", "heads"), VIT["l"], strict=True)), "patch": 8})
    assert create("vit_ti8", device="meta").pos_embed.shape == (1, 1 + 28 * 28, 192)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("vit_bb16", "vit_b16"), ("ViT-B/16", "vit_b16"), ("deit_base16", "deit_b16"), ("mae_l", "mae_l16"), ("xyzzy", "vit")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pretrain.model.name: '{name}' is not known; the nearest are (.*, )?{nearest}[, ]"):
        check_model(name, {}, "pretrain.model")
    with pytest.raises(ConfigError, match=r"python -m pipeline\.models"):
        create(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_b16", {"drop_pth": 0.1}, r"pretrain.model.drop_pth: no such key, did you mean 'drop_path'\? \(allowed: name, "),
        ("vit", {"depth": 1, "heads": 2, "patch": 4}, "pretrain.model.width: is missing"),
        ("vit", {**TINY, "heads": 3}, r"pretrain.model.width: 16 is not a multiple of heads \(3\)"),
        ("vit", {**TINY, "pixels": 10}, "pretrain.model.pixels: 10 is not a multiple of the patch, 4 pixels"),
        ("vit_b14", {"pixels": 32}, "pretrain.model.pixels: 32 is not a multiple of the patch, 14 pixels"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(name, options, "pretrain.model")


def test_what_the_pipeline_gives_is_not_offered_to_the_person() -> None:
    with pytest.raises(ConfigError, match="allowed: ") as e:
        check_model("vit_b16", {"wdith": 1})
    assert not GIVEN & set(str(e.value).partition("allowed: ")[2].rstrip(")").split(", "))


def test_published_options_can_be_changed() -> None:
    assert create("vit_ti16", device="meta", depth=3, pool="gap").options.depth == 3
    assert check_model("clip_vit_b32", {"vision": {"depth": 2}}).vision.width == 768  # section by section


def test_seeds() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = create("vit", seed=3, **TINY).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)  # building draws nothing from others
    torch.rand(7)
    two, other = create("vit", seed=3, **TINY).state_dict(), create("vit", seed=4, **TINY).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pos_embed"], other["pos_embed"])
    built = build("vit", check_model("vit", TINY), seed=3).state_dict()
    assert all(torch.equal(one[name], built[name]) for name in one)
    torch.manual_seed(5)
    drawn = create("vit", **TINY).state_dict()
    assert not torch.equal(torch.random.get_rng_state(), before) and not torch.equal(drawn["pos_embed"], one["pos_embed"])


def test_options_are_kept_and_cannot_be_changed() -> None:
    model = create("vit", **TINY)
    assert FAMILIES["vit"].options.model_validate(model.options.model_dump()) == model.options
    with pytest.raises(ValueError, match="frozen"):
        model.options.depth = 3
