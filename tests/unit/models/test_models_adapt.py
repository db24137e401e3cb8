"""A Vision Transformer from the weights of another: pixels, classes, tokens, positions, objectives."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from pipeline.models import create
from pipeline.models.positions import resize_positions
from pipeline.models.vit import VisionTransformer
from tests.unit.models.peers import error, images, in_transformers, randomise

TINY = {"width": 12, "depth": 2, "heads": 3, "mlp": 20, "patch": 4, "pixels": 12, "classes": 5}
ENCODER = {key: value for key, value in TINY.items() if key != "classes"}
CLIP = {
    "pixels": 12, "embed": 5, "vision": {"kind": "vit", "patch": 4, "width": 12, "depth": 2, "heads": 3, "mlp": 20},
    "text": {"kind": "transformer", "width": 8, "depth": 1, "heads": 2}, "vocabulary": 30, "context": 6,
}  # fmt: skip


def tiny(seed: int = 0, **options: object) -> VisionTransformer:
    model = create("vit", seed=seed, **{**TINY, **options})
    assert isinstance(model, VisionTransformer)
    return model


def start(model: VisionTransformer, source: torch.nn.Module) -> VisionTransformer:
    """`model` with the weights of `source`; strict, so that every name and shape has been seen to."""
    model = model.double().eval()
    model.load_state_dict(model.adapt(source.state_dict()), strict=True)
    return model


def test_a_state_of_ones_own_is_left_as_it_is() -> None:
    for options in ({}, {"distilled": True}, {"masked": True}, {"pool": "map"}, {"representation": 4}, {"positions": "relative"}):
        model = randomise(tiny(**options))
        adapted = tiny(seed=1, **options).adapt(model.state_dict())
        assert set(adapted) == set(model.state_dict())
        assert all(torch.equal(adapted[name], tensor) for name, tensor in model.state_dict().items())


def test_the_given_state_is_not_changed() -> None:
    state = randomise(tiny(distilled=True)).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    tiny(pixels=20, classes=3).adapt(state)
    assert set(state) == set(before) and all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("resize", ["google", "timm-npz", "timm-hybrid", "hf"])
def test_other_pixels_and_classes(resize: str) -> None:
    source = randomise(tiny())
    model = start(tiny(seed=1, pixels=20, classes=3, resize=resize), source)
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, 5, resize))
    assert not model.head.weight.any() and not model.head.bias.any()
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    same_classes = start(tiny(seed=1, pixels=20, resize=resize), source)
    assert torch.equal(same_classes.head.weight, source.head.weight)


def test_hf_resizes_as_transformers() -> None:
    source = randomise(tiny())
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=12, patch_size=4, num_labels=5,
        layer_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = ViTForImageClassification(config).double().eval()
    theirs.load_state_dict(in_transformers(source.state_dict()), strict=True)
    model = start(tiny(seed=1, pixels=28, resize="hf"), source)
    assert error(model(images(2, 28)), theirs(images(2, 28), interpolate_pos_encoding=True).logits) < 1e-12


@pytest.mark.parametrize(
    "kind", [{"positions": "learned-2d"}, {"positions_at": "layers"}, {"positions": "learned-2d", "positions_at": "layers"}]
)
def test_other_positions_on_another_grid(kind: dict[str, str]) -> None:
    source = randomise(tiny(**kind))
    model = start(tiny(seed=1, pixels=20, **kind), source)
    expected = resize_positions(source._positions()[:, 1:], 5)
    torch.testing.assert_close(model._positions()[:, 1:], expected, rtol=0, atol=1e-12)


def test_a_head_is_added_or_left_out() -> None:
    headless = start(tiny(seed=1, classes=0), randomise(tiny()))
    assert torch.equal(headless(images(2, 12)), randomise(tiny()).features(images(2, 12)))
    assert not start(tiny(seed=1), headless).head.weight.any()


def test_class_tokens() -> None:
    """Dropped with its position, or fresh with a position of zero; the patches' positions stay theirs."""
    with_token, without = randomise(tiny(pool="gap", class_token=True)), randomise(tiny(pool="gap"))
    dropped = start(tiny(seed=1, pool="gap"), with_token)
    assert torch.equal(dropped.pos_embed, with_token.pos_embed[:, 1:])
    added = start(tiny(seed=1, pool="gap", class_token=True), without)
    assert torch.equal(added.pos_embed[:, 1:], without.pos_embed) and not added.pos_embed[:, 0].any() and not added.cls_token.any()
    later = {**randomise(tiny()).state_dict()}  # big_vision adds positions before it joins the class token
    rows = later["pos_embed"] = later["pos_embed"][:, 1:]
    fitted = tiny().double().adapt(later)
    assert torch.equal(fitted["pos_embed"][:, 1:], rows) and torch.equal(fitted["cls_token"], later["cls_token"])


def test_distilled_and_plain() -> None:
    deit = randomise(tiny(distilled=True))
    plain = start(tiny(seed=1), deit)
    assert torch.equal(plain.pos_embed, torch.cat([deit.pos_embed[:, :1], deit.pos_embed[:, 2:]], dim=1))
    assert torch.equal(plain.head.weight, deit.head.weight)
    back = start(tiny(seed=1, distilled=True), plain)
    assert torch.equal(back.pos_embed[:, [0, *range(2, 11)]], plain.pos_embed) and not back.pos_embed[:, 1].any()
    assert torch.equal(back.dist_token, tiny(seed=1, distilled=True).dist_token.double()) and not back.head_dist.weight.any()


def test_a_head_goes_with_its_representation() -> None:
    """Of the same shape as the new one, and yet of other inputs."""
    source = randomise(tiny(representation=12))
    model = start(tiny(seed=1), source)
    assert source.head.weight.shape == model.head.weight.shape and not model.head.weight.any()


def test_norms_that_stand_elsewhere_are_fresh() -> None:
    model = start(tiny(seed=1, pool="gap", class_token=True, fc_norm=True), randomise(tiny()))
    assert torch.equal(model.fc_norm.weight, torch.ones(12).double()) and not model.fc_norm.bias.any()
    state = {name: tensor for name, tensor in tiny().state_dict().items() if not name.startswith("norm.")}
    assert "norm.weight" not in tiny().adapt(state)  # one that is missing altogether is not made up


def test_masked_pretraining() -> None:
    model = start(tiny(seed=1), randomise(tiny(masked=True, classes=0)))
    assert not model.head.weight.any()


def test_mae() -> None:
    """Learned positions begin as the fixed ones; with fixed ones there is nothing to load; the decoder stays behind."""
    mae = randomise(create("mae", **ENCODER, decoder_width=8, decoder_depth=1, decoder_heads=2))
    learned, fixed = start(tiny(seed=1), mae), start(tiny(seed=1, positions="sincos-2d"), mae)
    assert torch.equal(learned.pos_embed, mae.pos_embed)
    assert torch.equal(learned.features(images(2, 12)), mae.features(images(2, 12)))
    assert torch.equal(fixed.features(images(2, 12)), mae.features(images(2, 12)))
    mean = start(tiny(seed=1, pixels=20, pool="gap", class_token=True), mae)
    assert torch.equal(mean.pos_embed, resize_positions(mae.pos_embed, 5))


def test_clip() -> None:
    """The image tower, whose projection is no classifier, not even where it has the shape of one."""
    clip = randomise(create("clip", **CLIP))
    options = clip.visual.options.model_dump(exclude={"kind"})
    model = start(create("vit", seed=1, **{**options, "head_bias": True, "activation": "quick-gelu", "pixels": 12, "classes": 5}), clip)
    assert clip.visual.head.weight.shape == model.head.weight.shape
    assert not model.head.weight.any() and not model.head.bias.any()
    assert torch.equal(model.features(images(2, 12)), clip.visual.features(images(2, 12)))


def test_what_differs_otherwise_is_left_to_be_seen() -> None:
    deeper = randomise(tiny(depth=3)).state_dict()
    with pytest.raises(RuntimeError, match=r"blocks\.2"):
        tiny().load_state_dict(tiny().adapt(deeper))
    missing = {name: tensor for name, tensor in tiny().state_dict().items() if "mlp.fc2" not in name}
    with pytest.raises(RuntimeError, match=r"mlp\.fc2"):
        tiny().load_state_dict(tiny().adapt(missing))
    relative = tiny(positions="relative").state_dict()
    with pytest.raises(RuntimeError, match="relative"):
        tiny(positions="relative", pixels=20).load_state_dict(tiny(positions="relative", pixels=20).adapt(relative))
