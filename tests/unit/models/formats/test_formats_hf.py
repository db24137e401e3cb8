"""Against `transformers` itself: it saves, we read; we export, it loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from formats_models import (
    CLIP_RESNET,
    CLIP_VIT,
    IGPT,
    MAE,
    VIT,
    assert_close,
    assert_same,
    assert_same_state,
    images,
    make,
    randomise,
)
from formats_transformers import KINDS, TEXT, TOWER, outputs, saved, tensors, theirs
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models.formats import export, load, read


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "theirs")
    found = read(str(tmp_path / "theirs"))
    for ours, expected in outputs(kind, model, found.model()):
        assert_close(ours, expected)
    export(found.model(), str(tmp_path / "ours"), "hf", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.6), classes=found.classes)
    assert_same_state(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"add_pooling_layer": False} if kind == "vit-bare" else {}
        back, problems = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not any(problems.values()), problems
    assert back.config.architectures == [type(model).__name__]
    own = load(str(tmp_path / "ours"))
    assert not own.training and own.parameter_count == found.model().parameter_count
    for ours, expected in outputs(kind, back.eval(), own):
        assert_close(ours, expected)


MODELS = {
    "vit": ("vit", VIT),
    "vit without a head": ("vit", {**VIT, "classes": 0, "eps": 1e-5}),
    "representation": ("vit", {**VIT, "classes": 0, "representation": 12, "activation": "gelu-tanh"}),
    "fixed positions": ("vit", {**VIT, "positions": "sincos-2d", "mlp": 128}),
    "regularised": ("vit", {**VIT, "dropout": 0.1, "drop_path": 0.2, "head_bias_init": -10.0, "resize": "timm-npz"}),
    "deit": ("vit", {**VIT, "distilled": True}),
    "mae": ("mae", {**MAE, "mask": 0.5}),
    "clip": ("clip", {**CLIP_VIT, "activation": "gelu"}),
    "igpt": ("igpt", IGPT),
    "igpt with biases": ("igpt", {**IGPT, "bias": True, "dropout": 0.1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = make(*MODELS[name])
    export(model, str(tmp_path / "out"), "hf")
    assert_same(read(str(tmp_path / "out")), model)


def test_biases_that_are_zero_stay_where_the_model_has_them(tmp_path: Path) -> None:
    model = make("igpt", {**IGPT, "bias": True})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    export(model, str(tmp_path / "out"), "hf")
    assert_same(read(str(tmp_path / "out")), model)


def test_igpt_without_biases_is_openais(tmp_path: Path) -> None:
    model = theirs("igpt")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    found = read(str(tmp_path))
    assert found.options["bias"] is False and not any(name.endswith("qkv.bias") for name in found.state)
    for ours, expected in outputs("igpt", model, found.model()):
        assert_close(ours, expected)


def test_igpt_classifier_keeps_its_colours(tmp_path: Path) -> None:
    """transformers' classifier has no head for colours: theirs is read with a zero one, ours is kept beside it."""
    saved("igpt-classifier", tmp_path / "theirs")
    assert not read(str(tmp_path / "theirs")).state["head.weight"].any()
    model = make("igpt", {**IGPT, "classes": 3})
    with pytest.raises(ConfigError, match="bias in iGPT's classifier"):
        export(model, str(tmp_path / "out"), "hf")
    nn.init.zeros_(model.classifier.bias)
    export(model, str(tmp_path / "out"), "hf")
    assert_same(read(str(tmp_path / "out")), model)
    transformers.ImageGPTForImageClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("how", ["sharded", "pickle", "sharded-pickle", "half", "bfloat16", "file", "config"])
def test_ways_of_storing(how: str, tmp_path: Path) -> None:
    model = saved("vit", tmp_path, **({"max_shard_size": "20KB"} if how == "sharded" else {}))
    expected, url = read(str(tmp_path)), str(tmp_path)
    match how:
        case "sharded":
            assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
            tmp_path = tmp_path.parent / "whole"
            model.save_pretrained(tmp_path)
            assert_same_state(read(str(tmp_path)).state, expected.state)
        case "pickle":
            torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
            (tmp_path / "model.safetensors").unlink()
        case "sharded-pickle":
            whole = load_file(tmp_path / "model.safetensors")
            (tmp_path / "model.safetensors").unlink()
            parts = {f"pytorch_model-{i}.bin": dict(list(whole.items())[i::2]) for i in range(2)}
            for name, part in parts.items():
                torch.save(part, tmp_path / name)
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        case "half" | "bfloat16":
            kind = torch.float16 if how == "half" else torch.bfloat16
            whole = {name: t.to(kind) for name, t in load_file(tmp_path / "model.safetensors").items()}
            save_file(whole, tmp_path / "model.safetensors")
            expected.state.update({name: t.to(kind).float() for name, t in expected.state.items()})
        case "file":
            url = str(tmp_path / "model.safetensors")
        case _:
            url = str(tmp_path / "config.json")
    found = read(url)
    assert found.options == expected.options and all(t.dtype == torch.float32 for t in found.state.values())
    assert_same_state(found.state, expected.state)


def test_what_a_directory_says(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    found = read(str(tmp_path))
    assert found.classes == ["cat", "dog", "cow"]
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.4, 0.5, 0.6)
    assert (found.name, found.format) == ("vit", "Hugging Face vit")
    export(found.model(), str(tmp_path / "out"), "hf", mean=found.mean, std=found.std, classes=found.classes)
    again = read(str(tmp_path / "out"))
    assert (again.classes, again.mean, again.std) == (found.classes, found.mean, found.std)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.size["height"] == 12


def test_a_fine_tuned_export_is_read_as_it_is_now(tmp_path: Path) -> None:
    """transformers keeps what our config says beside its own, though the model may be another by then."""
    export(make("vit", {**VIT, "drop_path": 0.1}), str(tmp_path / "out"), "hf")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out", num_labels=7, ignore_mismatched_sizes=True)
    model.config.layer_norm_eps = 1e-4
    model.save_pretrained(tmp_path / "tuned")
    options = read(str(tmp_path / "tuned")).options
    assert (options["classes"], options["eps"], options["drop_path"]) == (7, 1e-4, 0.1)


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("vit", {**VIT, "pool": "map"}, "hf: cannot express pool: map"),
        ("vit", {**VIT, "pool": "gap"}, "hf: cannot express pool: gap"),
        ("vit", {**VIT, "positions": "relative"}, "hf: has no positions relative"),
        ("vit", {**VIT, "positions": "learned-2d"}, "hf: has no positions learned-2d"),
        ("vit", {**VIT, "positions_at": "layers"}, "hf: cannot express positions_at: layers"),
        ("vit", {**VIT, "representation": 8}, "hf: cannot express representation: 8"),
        ("vit", {**VIT, "qk_norm": True}, "hf: cannot express qk_norm: True"),
        ("vit", {**VIT, "masked": True}, "hf: cannot express masked: True"),
        ("vit", {**VIT, "patch": 16, "pixels": 32, "stem": (1, 1, 1)}, "hf: cannot express stem"),
        ("igpt", {**IGPT, "masked": True}, "hf: cannot express masked: True"),
        ("clip", CLIP_RESNET, "hf: has no CLIP with a ResNet"),
        ("clip", {**CLIP_VIT, "logit_bias": -10.0}, "hf: cannot express logit_bias: -10.0"),
        ("clip", {**CLIP_VIT, "text": {"kind": "bag-of-words", "width": 8}}, "hf: cannot express text.kind: bag-of-words"),
        ("clip", {**CLIP_VIT, "vision": {**CLIP_VIT["vision"], "pool": "gap"}}, "hf: cannot express vision.tokens: 0"),
        ("resnet", {"depths": (1, 1), "width": 8, "classes": 3}, "hf: has no resnet"),
    ],
)
def test_what_it_cannot_express_is_refused(family: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        export(make(family, options), str(tmp_path / "out"), "hf")
    assert str(refused.value).startswith(sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("vit", {"num_channels": 1}, "config.json has num_channels: 1, our models have 3 alone"),
        ("vit", {"qkv_bias": False}, "config.json has qkv_bias: False"),
        ("vit", {"hidden_act": "relu"}, "config.json has hidden_act: 'relu'"),
        ("vit", {"image_size": [12, 16]}, r"config.json has image_size: \[12, 16\], a number is wanted"),
        ("vit", {"model_type": "swin"}, "is a 'swin' of transformers, known are vit, deit"),
        ("vit", {"num_attention_heads": 5}, "width: 24 is not a multiple of heads"),
        ("mae", {"decoder_intermediate_size": 32}, "its decoder's hidden layers are not four times as wide"),
        ("clip", {"vision_config": {**TOWER, "hidden_act": "gelu"}}, "its towers have different activations"),
        ("clip", {"text_config": {**TEXT, "layer_norm_eps": 1e-6}}, "config.json, text_config, has layer_norm_eps"),
        ("igpt", {"scale_attn_by_inverse_layer_idx": True}, "config.json has scale_attn_by_inverse_layer_idx: True"),
        ("igpt", {"n_inner": 20}, "config.json has n_inner: 20"),
        ("igpt", {"n_positions": 15}, "n_positions has 15 places, which are no square grid"),
    ],
)
def test_what_ours_cannot_be_is_refused(kind: str, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((CheckpointError, ConfigError), match=sentence) as refused:
        read(str(tmp_path))
    assert str(refused.value).startswith(str(tmp_path))


def test_a_deit_without_the_second_head_is_refused(tmp_path: Path) -> None:
    randomise(transformers.DeiTForImageClassification(transformers.DeiTConfig(**TOWER, num_labels=5))).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="whose distillation token has no head"):
        read(str(tmp_path))


def test_encoders_without_heads(tmp_path: Path) -> None:
    x = images(12)
    mae = randomise(transformers.ViTMAEModel(transformers.ViTMAEConfig(**TOWER, mask_ratio=0.0)))
    mae.save_pretrained(tmp_path / "mae")
    found = read(str(tmp_path / "mae"))
    assert found.name == "vit" and found.options["classes"] == 0
    noise = torch.arange(9, dtype=torch.float64).expand(2, -1)
    with torch.no_grad():
        assert_close(found.model().double()(x), mae.double()(x, noise=noise).last_hidden_state[:, 0])
    deit = randomise(transformers.DeiTModel(transformers.DeiTConfig(**TOWER)))
    deit.save_pretrained(tmp_path / "deit")
    with torch.no_grad():
        assert_close(load(str(tmp_path / "deit")).double()(x, tokens=True), deit.double()(x).last_hidden_state)


def test_other_pixels_and_classes(tmp_path: Path) -> None:
    model = saved("vit", tmp_path)
    x = images(20).float()
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path), pixels=20)(x), model(x, interpolate_pos_encoding=True).logits, rtol=0, atol=1e-5)
    assert not load(str(tmp_path), classes=4).head.weight.any()
    headless = load(str(tmp_path), classes=0, dropout=0.1)
    assert headless(images(12).float()).shape == (2, 24) and headless.options.dropout == 0.1
