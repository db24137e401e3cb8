"""timm's names and configs, and who else uses them: DeiT, MAE, torchvision."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_models import CLIP_VIT, IGPT, MAE, VIT, assert_close, assert_same, assert_same_state, images, large, make
from safetensors.torch import load_file, save_file

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models.formats import export, load, read

# Listed by timm 1.0.31 for img_size 8, patch_size 4, embed_dim 8, depth 1, num_heads 2, num_classes 3.
VIT_TABLE = """
cls_token 1 1 8; pos_embed 1 5 8; patch_embed.proj.weight 8 3 4 4; patch_embed.proj.bias 8; blocks.0.norm1.weight 8;
blocks.0.norm1.bias 8; blocks.0.attn.qkv.weight 24 8; blocks.0.attn.qkv.bias 24; blocks.0.attn.proj.weight 8 8;
blocks.0.attn.proj.bias 8; blocks.0.norm2.weight 8; blocks.0.norm2.bias 8; blocks.0.mlp.fc1.weight 32 8; blocks.0.mlp.fc1.bias 32;
blocks.0.mlp.fc2.weight 8 32; blocks.0.mlp.fc2.bias 8; norm.weight 8; norm.bias 8; head.weight 3 8; head.bias 3
"""
DEIT_TABLE = VIT_TABLE.replace("pos_embed 1 5 8", "pos_embed 1 6 8; dist_token 1 1 8; head_dist.weight 3 8; head_dist.bias 3")
# And with global_pool map, class_token False, qk_norm, init_values .1, pre_norm.
MAP_TABLE = VIT_TABLE.replace("cls_token 1 1 8; pos_embed 1 5 8", "pos_embed 1 4 8").replace("patch_embed.proj.bias 8", "norm_pre.weight 8") + """;
norm_pre.bias 8; blocks.0.attn.q_norm.weight 4; blocks.0.attn.q_norm.bias 4; blocks.0.attn.k_norm.weight 4; blocks.0.attn.k_norm.bias 4;
blocks.0.ls1.gamma 8; blocks.0.ls2.gamma 8; attn_pool.latent 1 1 8; attn_pool.q.weight 8 8; attn_pool.q.bias 8;
attn_pool.kv.weight 16 8; attn_pool.kv.bias 16; attn_pool.proj.weight 8 8; attn_pool.proj.bias 8; attn_pool.norm.weight 8;
attn_pool.norm.bias 8; attn_pool.mlp.fc1.weight 32 8; attn_pool.mlp.fc1.bias 32; attn_pool.mlp.fc2.weight 8 32; attn_pool.mlp.fc2.bias 8
"""  # fmt: skip


def table(text: str) -> dict[str, torch.Tensor]:
    random, found = torch.Generator().manual_seed(0), {}
    for row in text.replace("\n", " ").split(";"):
        name, *shape = row.split()
        found[name] = torch.randn([int(n) for n in shape], generator=random)
    return found


def timm_config(path: Path, architecture: str, **top: Any) -> None:
    (path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": {}, **top}))


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", VIT),
    "gap": ("vit", {**VIT, "pool": "gap", "fc_norm": True}),
    "gap with a class token": ("vit", {**VIT, "pool": "gap", "class_token": True, "qk_norm": True, "layer_scale": 0.1}),
    "map": ("vit", {**VIT, "pool": "map", "mlp": 50}),
    "clip tower": ("vit", {**VIT, "pre_norm": True, "patch_bias": False, "eps": 1e-5, "activation": "quick-gelu", "classes": 0}),
    "fixed positions": ("vit", {**VIT, "positions": "sincos-2d", "activation": "gelu-tanh"}),
    "regularised": ("vit", {**VIT, "mlp": 128, "dropout": 0.1, "drop_path": 0.1, "resize": "timm-npz", "head_bias_init": -10.0}),
    "deit": ("vit", {**VIT, "distilled": True}),
}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {  # timm has none that are smaller
    "hybrid": ("vit", {**VIT, "patch": 16, "pixels": 32, "stem": (3, 4, 9)}),
    "bit": ("bit", {"depths": (3, 4, 6, 3), "classes": 3, "pixels": 64}),
    "resnet": ("resnet", {"depths": (1, 2, 1, 1), "classes": 3, "zero_init_residual": False, "pixels": 48}),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """And from the tensors and what timm itself says, to the same function."""
    family, options = MODELS[name]
    model = make(family, options)
    export(model, str(tmp_path / "out"), "timm", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), classes=["a", "b", "c"])
    found = read(str(tmp_path / "out"))
    assert_same(found, model)
    assert (found.mean, found.std, found.classes) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ["a", "b", "c"])
    state = load_file(tmp_path / "out" / "model.safetensors")
    export(found.model(), str(tmp_path / "again"), "timm")
    assert_same_state(state, load_file(tmp_path / "again" / "model.safetensors"))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["tessera"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    x = images(model.options.model_dump()["pixels"])
    with torch.no_grad():
        assert_close(load(str(tmp_path / "out")).double()(x), model.double()(x))


@pytest.mark.parametrize("name", LARGE)
def test_round_trip_of_large_ones(name: str, tmp_path: Path) -> None:
    model = large(*LARGE[name])
    export(model, str(tmp_path / "out"), "timm")
    assert_same(read(str(tmp_path / "out")), model)
    assert_same_state(load_file(tmp_path / "out" / "model.safetensors"), dict(model.state_dict()))


def test_mae_gives_its_encoder(tmp_path: Path) -> None:
    model = make("mae", MAE)
    export(model, str(tmp_path / "out"), "timm")
    found = read(str(tmp_path / "out"))
    assert found.name == "vit" and found.options["classes"] == 0
    assert_same_state(found.state, {n: t for n, t in model.state_dict().items() if not n.startswith(("decoder", "mask_token"))})
    with torch.no_grad():
        assert_close(found.model().double()(images(16)), model.double().features(images(16)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VIT_TABLE, {"classes": 3, "pool": "token", "pixels": 8, "patch": 4, "width": 8, "depth": 1, "mlp": 32, "eps": 1e-6}),
        (DEIT_TABLE, {"classes": 3, "distilled": True, "pixels": 8}),
        (
            MAP_TABLE,
            {"pool": "map", "class_token": False, "qk_norm": True, "pre_norm": True, "patch_bias": False, "eps": 1e-5, "layer_scale": 1e-5},
        ),
        (
            VIT_TABLE.replace("norm.weight 8; norm.bias", "fc_norm.weight 8; fc_norm.bias"),
            {"pool": "gap", "class_token": True, "fc_norm": True},
        ),
        (VIT_TABLE.replace("; head.weight 3 8; head.bias 3", ""), {"classes": 0}),
    ],
)
def test_published_names(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    state = table(text)
    save_file(state, tmp_path / "some.safetensors")
    found = read(str(tmp_path / "some.safetensors"), heads=2)
    assert {key: found.options[key] for key in expected} == expected and found.options["heads"] == 2
    assert_same_state(found.state, state)
    found.model()


def test_no_positions_for_the_class_token(tmp_path: Path) -> None:
    """timm's no_embed_class: the same as a position of zero."""
    state = table(VIT_TABLE.replace("pos_embed 1 5 8", "pos_embed 1 4 8"))
    save_file(state, tmp_path / "some.safetensors")
    found = read(str(tmp_path / "some.safetensors"), heads=2)
    assert not found.state["pos_embed"][:, 0].any() and torch.equal(found.state["pos_embed"][:, 1:], state["pos_embed"])


def test_what_timms_config_says(tmp_path: Path) -> None:
    save_file(table(VIT_TABLE), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="says nowhere how many heads its 8 channels are split into, give heads"):
        read(str(tmp_path))
    timm_config(tmp_path, "vit_base_patch16_clip_quickgelu_224", model_args={"num_heads": 4}, global_pool="avg")
    options = read(str(tmp_path)).options
    assert (options["heads"], options["activation"], options["pool"]) == (4, "quick-gelu", "gap")
    timm_config(tmp_path, "vit", model_args={"num_heads": 4, "act_layer": "gelu_tanh", "init_values": 0.3}, label_names=["x", "y", "z"])
    assert read(str(tmp_path)).options["activation"] == "gelu-tanh" and read(str(tmp_path)).classes == ["x", "y", "z"]
    timm_config(tmp_path, "vit", model_args={"num_heads": 4, "act_layer": "silu"})
    with pytest.raises(CheckpointError, match="its activation is 'silu'"):
        read(str(tmp_path))


def test_published_sizes_have_published_heads(tmp_path: Path) -> None:
    for name, heads in (("vit_ti16", 3), ("vit_s16", 6), ("vit_h14", 16)):
        save_file(dict(large(name, {"depth": 1, "pixels": 112, "classes": 0}).state_dict()), tmp_path / f"{name}.safetensors")
        assert read(str(tmp_path / f"{name}.safetensors")).options["heads"] == heads


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module", ""])
def test_what_training_scripts_save(wrapper: str, tmp_path: Path) -> None:
    """Beside the weights: arguments, optimiser, step; the prefix of DistributedDataParallel."""
    state = table(DEIT_TABLE)
    inner = {f"module.{name}": t for name, t in state.items()} if wrapper == "state_dict" else state
    rest = {"epoch": 3, "args": argparse.Namespace(lr=1e-3, name="x"), "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save({wrapper: inner, **rest} if wrapper else inner, tmp_path / "deit.pth")
    found = read(str(tmp_path / "deit.pth"), heads=2)
    assert_same_state(found.state, state)
    assert found.options["distilled"] and found.mean == ((0.485, 0.456, 0.406) if wrapper == "model" else None)
    assert found.options["resize"] == ("hf" if wrapper == "model" else "timm-hybrid")


def test_old_files(tmp_path: Path) -> None:
    """Before torch 1.6 they were no zip archives; timm's representation layer had another name."""
    state = table(VIT_TABLE + "; pre_logits.fc.weight 8 8; pre_logits.fc.bias 8")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read(str(tmp_path / "old.pth"), heads=2)
    assert found.options["representation"] == 8 and torch.equal(found.state["pre_logits.weight"], state["pre_logits.fc.weight"])


@pytest.mark.parametrize("decoder", [True, False])
def test_facebooks_mae(decoder: bool, tmp_path: Path) -> None:
    model = make("mae", MAE)
    names = [n for n in model.state_dict() if decoder or not n.startswith(("decoder", "mask_token"))]
    torch.save({"model": {n: model.state_dict()[n] for n in names}}, tmp_path / "mae.pth")
    found = read(str(tmp_path / "mae.pth"), heads=4, **({"decoder_heads": 2} if decoder else {}))
    assert found.name == ("mae" if decoder else "vit") and list(found.state) and set(found.state) == set(names)
    assert found.mean == (0.485, 0.456, 0.406)
    own = found.model().double()
    with torch.no_grad():
        assert_close(own.features(images(16)), model.double().features(images(16)))
        tuned = found.load(classes=4, pixels=24) if not decoder else None
    assert tuned is None or (tuned.head.weight.shape == (4, 32) and not tuned.head.weight.any() and tuned.pos_embed.shape == (1, 37, 32))


@pytest.mark.parametrize("name", sorted(table(DEIT_TABLE)))
@pytest.mark.parametrize("change", ["flat", "scalar", "half", "gone"])
def test_every_wrong_tensor_ends_in_a_sentence(name: str, change: str, tmp_path: Path) -> None:
    """That names it, also where the sizes of the model are read from it; one bias fewer is a model without."""
    state = table(DEIT_TABLE)
    tensor = state.pop(name)
    if change != "gone":
        changes = {"flat": tensor.flatten()[None, None, None], "scalar": torch.zeros(()), "half": tensor[..., : tensor.shape[-1] // 2 or 1]}
        state[name] = changes[change].contiguous()
    save_file(state, tmp_path / "some.safetensors")
    optional = {"patch_embed.proj.bias", "dist_token", "head.weight", "head.bias"}
    if (change == "gone" and name in optional) or (change == "half" and state[name].shape == tensor.shape):
        return
    with pytest.raises((CheckpointError, ConfigError)) as refused:  # the latter where the heads that are given do not fit
        read(str(tmp_path / "some.safetensors"), heads=2)
    assert str(refused.value).startswith(f"{tmp_path}/some.safetensors: ")


def test_hybrid_and_bit_names(tmp_path: Path) -> None:
    """Sizes are read from the names; timm's small constants are taken."""
    hybrid, bit = {**VIT, "patch": 8, "pixels": 16, "stem": (2, 1)}, {"depths": (2, 1), "classes": 3}
    for family, options, key in (("vit", hybrid, "stem"), ("bit", bit, "depths")):
        model = make(family, options)
        save_file(dict(model.state_dict()), tmp_path / "some.safetensors")
        found = read(str(tmp_path / "some.safetensors"), **({"heads": 2} if family == "vit" else {}))
        assert found.options[key] == [2, 1] and found.options["numerics"] == "timm"
        assert_same_state(found.state, model.state_dict())


def test_torchvisions_resnet(tmp_path: Path) -> None:
    """Without the counters of its norms, as it was before there were any."""
    model = make("resnet", {"depths": (1, 2, 1, 1), "classes": 4, "width": 8, "zero_init_residual": True})
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.1.weight", "layer4.0.conv3.weight", "fc.bias"} <= set(state)
    torch.save(state, tmp_path / "resnet.pth")
    found = read(str(tmp_path / "resnet.pth"))
    assert found.options["depths"] == [1, 2, 1, 1] and found.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        assert_close(found.model().double()(images(48)), model.double()(images(48)))


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("vit", {**VIT, "positions": "relative"}, "timm: has no positions relative"),
        ("vit", {**VIT, "positions_at": "shared"}, "timm: cannot express positions_at: shared"),
        ("vit", {**VIT, "representation": 8}, "timm: cannot express representation: 8"),
        ("vit", {**VIT, "masked": True}, "timm: cannot express masked: True"),
        ("vit", {**VIT, "head_bias": False}, "timm: cannot express head_bias: False"),
        ("vit", {**VIT, "patch_bias": False}, "timm: cannot express patch_bias: False"),
        ("vit", {**VIT, "eps": 1e-3}, "timm: has no eps of 0.001"),
        ("vit", {**VIT, "patch": 8, "pixels": 16, "stem": (1, 1)}, r"timm: has no stem (1, 1)"),
        ("bit", {"depths": (1, 1), "classes": 3}, "timm: has no BiT of depths (1, 1)"),
        ("resnet", {"depths": (1, 1), "classes": 3}, "timm: has no ResNet of 2 stages"),
        ("igpt", IGPT, "timm: has no igpt"),
        ("clip", CLIP_VIT, "timm: has no clip"),
    ],
)
def test_what_it_cannot_express_is_refused(family: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        export(make(family, options), str(tmp_path / "out"), "timm")
    assert str(refused.value).startswith(sentence) and not (tmp_path / "out").exists()
