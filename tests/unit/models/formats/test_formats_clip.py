"""OpenAI's archives and names, and open_clip's files. Exports were loaded with open_clip 3.3 by hand: embeddings to 1e-15."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_models import (
    CLIP,
    CLIP_RESNET,
    CLIP_VIT,
    IGPT,
    TEXT,
    VIT,
    assert_close,
    assert_same,
    assert_same_state,
    captions,
    images,
    make,
)
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models.formats import export, load, read

# As clip.load("ViT-B/32") lists them: width 64, patch 4, 8 pixels, one layer; text width 64; embedding 6, 50 words, context 7.
TABLE = """
positional_embedding 7 64; text_projection 64 6; logit_scale; visual.class_embedding 64; visual.positional_embedding 5 64;
visual.proj 64 6; visual.conv1.weight 64 3 4 4; visual.ln_pre.weight 64; visual.ln_pre.bias 64; visual.ln_post.weight 64;
visual.ln_post.bias 64; token_embedding.weight 50 64; ln_final.weight 64; ln_final.bias 64
"""
for tower in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
    TABLE += f"""; {tower}.attn.in_proj_weight 192 64; {tower}.attn.in_proj_bias 192; {tower}.attn.out_proj.weight 64 64;
    {tower}.attn.out_proj.bias 64; {tower}.ln_1.weight 64; {tower}.ln_1.bias 64; {tower}.mlp.c_fc.weight 256 64; {tower}.mlp.c_fc.bias 256;
    {tower}.mlp.c_proj.weight 64 256; {tower}.mlp.c_proj.bias 64; {tower}.ln_2.weight 64; {tower}.ln_2.bias 64"""


def published(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    random, state = torch.Generator().manual_seed(0), {}
    for row in TABLE.replace("\n", " ").split(";"):
        name, *shape = row.split()
        state[name] = (torch.randn([int(n) for n in shape], generator=random) * 0.3).to(dtype)
    return state


class Holder(nn.Module):
    """A module that holds one level of a state dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """The state dict as a TorchScript archive, in modules of the same names, with OpenAI's numbers about the model."""
    root = Holder()
    numbers = {"input_resolution": torch.tensor(8), "context_length": torch.tensor(7), "vocab_size": torch.tensor(50)}
    for name, tensor in {**state, **numbers}.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Holder())
            module = getattr(module, parent)
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, OpenAI's files are not
        torch.jit.script(root).save(str(path))


def reference(state: dict[str, torch.Tensor], x: torch.Tensor, tokens: torch.Tensor, gelu: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP with ViT as its paper has it, under OpenAI's names, in fp64."""
    s = {name: t.double() for name, t in state.items()}

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.layer_norm(y, y.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-5)

    def block(y: torch.Tensor, name: str, causal: bool) -> torch.Tensor:
        q, k, v = (norm(y, f"{name}.ln_1") @ s[f"{name}.attn.in_proj_weight"].T + s[f"{name}.attn.in_proj_bias"]).chunk(3, -1)
        weights = q @ k.transpose(1, 2) / 8  # one head of 64
        if causal:
            weights = weights + torch.full_like(weights, -torch.inf).triu(1)
        y = y + weights.softmax(-1) @ v @ s[f"{name}.attn.out_proj.weight"].T + s[f"{name}.attn.out_proj.bias"]
        hidden = gelu(norm(y, f"{name}.ln_2") @ s[f"{name}.mlp.c_fc.weight"].T + s[f"{name}.mlp.c_fc.bias"])
        return y + hidden @ s[f"{name}.mlp.c_proj.weight"].T + s[f"{name}.mlp.c_proj.bias"]

    patches = nn.functional.conv2d(x, s["visual.conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    seen = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), patches], 1) + s["visual.positional_embedding"]
    seen = norm(block(norm(seen, "visual.ln_pre"), "visual.transformer.resblocks.0", False)[:, 0], "visual.ln_post") @ s["visual.proj"]
    words = block(s["token_embedding.weight"][tokens] + s["positional_embedding"], "transformer.resblocks.0", True)
    read_ = norm(words, "ln_final")[torch.arange(len(tokens)), tokens.argmax(-1)] @ s["text_projection"]
    return nn.functional.normalize(seen, dim=-1), nn.functional.normalize(read_, dim=-1)


def quick(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def test_openais_archive(tmp_path: Path) -> None:
    state = published()
    archive(state, tmp_path / "ViT.pt")
    found = read(str(tmp_path / "ViT.pt"))
    assert found.format == "OpenAI CLIP" and found.options["activation"] == "quick-gelu"
    assert found.options["vision"]["heads"] == found.options["text"]["heads"] == 1 and found.options["pixels"] == 8
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)
    model = found.model().double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.no_grad():
        for ours, expected in zip(model(images(8), captions())[:2], reference(state, images(8), captions(), quick), strict=True):
            assert_close(ours, expected)
    # The other way the names and numbers are the same.
    export(found.model(), str(tmp_path / "out"), "open_clip")
    assert_same_state(load_file(tmp_path / "out" / "open_clip_model.safetensors"), {name: t.float() for name, t in state.items()})


@pytest.mark.parametrize("kind", ["quick-gelu", "gelu", "gelu-tanh"])
def test_which_activation(kind: str, tmp_path: Path) -> None:
    """A file of open_clip alone does not say it; its config does, or the person."""
    state = published(torch.float32)
    activations = {"quick-gelu": quick, "gelu": nn.functional.gelu, "gelu-tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "open_clip_pytorch_model.bin")
    url = str(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not say which activation it was trained with; give activation=quick-gelu for OpenAI's"):
        read(url)
    with torch.no_grad():
        given = load(url, activation=kind).double()(images(8), captions())[0]
        assert_close(given, reference(state, images(8), captions(), activations[kind])[0])
    tanh = {"act_kwargs": {"approximate": "tanh"}} if kind == "gelu-tanh" else {}
    config = {"embed_dim": 6, "vision_cfg": tanh, "text_cfg": tanh, **({"quick_gelu": True} if kind == "quick-gelu" else {})}
    written = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    for where in (url, str(tmp_path)):
        found = read(where)
        assert found.options["activation"] == kind and found.mean == (0.1, 0.2, 0.3)


def test_plain_state_dict_of_openai(tmp_path: Path) -> None:
    """Their numbers about the model give them away."""
    torch.save({**published(), "input_resolution": torch.tensor(8), "vocab_size": torch.tensor(50)}, tmp_path / "clip.pt")
    found = read(str(tmp_path / "clip.pt"))
    assert found.options["activation"] == "quick-gelu" and all(t.dtype == torch.float32 for t in found.state.values())


MODELS = {
    "vit": CLIP_VIT,
    "laion": {**CLIP_VIT, "activation": "gelu", "logit_scale": 1.0, "text": {**TEXT, "mlp": 70}},
    "own": {
        **CLIP_VIT,
        "logit_bias": -10.0,
        "vision": {**CLIP_VIT["vision"], "mlp": 50, "layer_scale": 0.1, "dropout": 0.1, "resize": "hf"},
    },
    "resnet": CLIP_RESNET,
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = make("clip", MODELS[name])
    export(model, str(tmp_path / "out"), "open_clip", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert_same(read(str(tmp_path / "out")), model)
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    del config["tessera"]
    (tmp_path / "out" / "open_clip_config.json").write_text(json.dumps(config))
    x = images(model.options.pixels)
    with torch.no_grad():
        for ours, expected in zip(load(str(tmp_path / "out")).double()(x, captions()), model.double()(x, captions()), strict=True):
            assert_close(ours, expected)


def test_resnet_under_openais_names(tmp_path: Path) -> None:
    model = make("clip", {**CLIP_RESNET, "text": {"width": 64, "depth": 1}})
    export(model, str(tmp_path / "out"), "open_clip")
    state = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert {
        "visual.conv3.weight",
        "visual.layer2.1.bn3.running_var",
        "visual.layer4.0.downsample.0.weight",
        "visual.attnpool.c_proj.bias",
    } <= set(state)
    archive({name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}, tmp_path / "RN50.pt")
    found = read(str(tmp_path / "RN50.pt"))
    assert found.options["vision"] == {"kind": "resnet", "depths": [1, 2, 1, 1], "width": 8} and found.options["pixels"] == 64
    assert_same_state(found.state, dict(model.state_dict()))


def test_other_pixels(tmp_path: Path) -> None:
    """Positions are resized as open_clip does."""
    archive(published(), tmp_path / "ViT.pt")
    larger = load(str(tmp_path / "ViT.pt"), pixels=16, context=5)
    grid = published()["visual.positional_embedding"].float()[1:].T.reshape(1, 64, 2, 2)
    expected = nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T
    assert torch.allclose(larger.visual.pos_embed[0, 1:], expected, atol=1e-6)
    assert larger.text.pos_embed.shape == (5, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visual.trunk.pos_embed": torch.zeros(1)}, "has a tower of timm's or of transformers inside open_clip's names"),
        ({"text.transformer.embeddings.x": torch.zeros(1)}, "has a tower of timm's or of transformers"),
        ({"visual.ln_post.weight": None, "logit_scale": None}, "missing: logit_scale, visual.ln_post.weight"),
        ({"extra": torch.zeros(1)}, "unknown: extra"),
        ({"text_projection": None}, "missing: text_projection"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    state = {name: t for name, t in {**published(), **change}.items() if t is not None}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match=sentence) as refused:
        read(str(tmp_path / "clip.safetensors"), activation="gelu")
    assert str(refused.value).startswith(f"{tmp_path}/clip.safetensors: ")


def test_towers_that_ours_are_not(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "open_clip_model.safetensors")
    for key, part in (("vision_cfg", {"pool_type": "avg"}), ("text_cfg", {"no_causal_mask": True})):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {key: part}}))
        with pytest.raises(CheckpointError, match=f"open_clip_config.json, {key}, has {next(iter(part))}"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("clip", {**CLIP_VIT, "text": {"kind": "bag-of-words", "width": 8}}, "open_clip: cannot express text.kind: bag-of-words"),
        ("clip", {**CLIP_VIT, "vision": {**CLIP_VIT["vision"], "qk_norm": True}}, "open_clip: cannot express vision.qk_norm: True"),
        ("caption", {key: value for key, value in CLIP_VIT.items() if key != "embed"}, "open_clip: has no caption"),
        ("vit", VIT, "open_clip: has no vit"),
        ("igpt", IGPT, "open_clip: has no igpt"),
    ],
)
def test_what_it_cannot_express_is_refused(family: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        export(make(family, options), str(tmp_path / "out"), "open_clip")
    assert str(refused.value).startswith(sentence) and not (tmp_path / "out").exists()


def test_names_are_all_there() -> None:
    assert set(CLIP) <= set(CLIP_VIT) and len(published()) == 14 + 24
