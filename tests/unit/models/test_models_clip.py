"""CLIP against transformers' CLIPModel, and its ResNet against a short reference of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from pipeline.core.errors import ConfigError
from pipeline.models import check_model, create
from pipeline.models.clip import CLIP
from pipeline.models.clip_resnet import CLIPResNet
from pipeline.models.positions import resize_positions
from pipeline.models.text import TextTower

V, L, EOT = 97, 11, 96
TEXT = {"kind": "transformer", "width": 12, "depth": 3, "heads": 2, "mlp": 20}
VIT = {"kind": "vit", "patch": 5, "width": 24, "depth": 2, "heads": 3, "mlp": 36}
RESNET = {"kind": "resnet", "depths": (1, 2, 1, 1), "width": 4}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth sharing out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clip(seed: int = 0, **changes: Any) -> CLIP:
    options = {"pixels": 15, "embed": 10, "vision": VIT, "text": TEXT, "vocabulary": V, "context": L, **changes}
    model = create("clip", seed=seed, **options)
    assert isinstance(model, CLIP)
    return model


def stirred(model: CLIP) -> CLIP:
    """In fp64 with every parameter random, so that nothing hides behind a zero or a one."""
    draw = torch.Generator().manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5) + gain)
    return model


def captions(count: int = 4, length: int = L, seed: int = 2) -> torch.Tensor:
    """[SOT], words, [EOT] at different places, zeros."""
    tokens = torch.randint(1, EOT - 1, (count, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = EOT - 1
    for row, end in enumerate(torch.linspace(2, length - 1, count).long().tolist()):
        tokens[row, end], tokens[row, end + 1 :] = EOT, 0
    return tokens


def pictures(count: int = 4, pixels: int = 15, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def near(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-12) -> None:
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


# --- transformers ---


def peer(model: CLIP) -> tuple[CLIPModel, dict[str, str]]:
    """transformers' model with the weights of ours, and which of its parameters is which of ours ("qkv" are three)."""
    o = model.options
    config = CLIPConfig(
        projection_dim=o.embed,
        text_config={
            "vocab_size": V, "hidden_size": o.text.width, "intermediate_size": o.text.mlp, "num_hidden_layers": o.text.depth,
            "num_attention_heads": o.text.heads, "max_position_embeddings": L, "hidden_act": "quick_gelu", "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": o.vision.width, "intermediate_size": o.vision.mlp, "num_hidden_layers": o.vision.depth,
            "num_attention_heads": o.vision.heads, "image_size": o.pixels, "patch_size": o.vision.patch, "hidden_act": "quick_gelu",
        },
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = CLIPModel(config).double()
    ends = {
        "logit_scale": "logit_scale", "visual_projection.weight": "visual.head.weight", "text_projection.weight": "text.proj.weight",
        "vision_model.embeddings.class_embedding": "visual.cls_token", "vision_model.embeddings.patch_embedding.weight": "visual.patch_embed.proj.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.pos_embed", "vision_model.pre_layrnorm": "visual.norm_pre",
        "vision_model.post_layernorm": "visual.norm", "text_model.embeddings.token_embedding.weight": "text.token_embed.weight",
        "text_model.embeddings.position_embedding.weight": "text.pos_embed", "text_model.final_layer_norm": "text.norm",
    }  # fmt: skip
    inner = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names = {}
    for name, parameter in theirs.named_parameters():
        head, _, leaf = name.rpartition(".")
        if ".layers." in name:
            tower, _, rest = name.partition(".encoder.layers.")
            number, _, part = rest.partition(".")
            module = part.rpartition(".")[0]
            ours = {f"self_attn.{c}_proj": f"attn.qkv.{i}" for i, c in enumerate("qkv")} | inner
            names[name] = f"{'visual' if tower == 'vision_model' else 'text'}.blocks.{number}.{ours[module]}.{leaf}"
        else:
            names[name] = ends.get(name) or f"{ends[head]}.{leaf}"
        with torch.no_grad():
            parameter.copy_(part_of(dict(model.named_parameters()), names[name]).reshape(parameter.shape))
    assert len(names) == len(list(theirs.parameters()))
    return theirs, names


def part_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name`; of "attn.qkv.1.weight" the second third of "attn.qkv.weight"."""
    if ".qkv." not in name:
        return tensors[name]
    head, number, leaf = name.rsplit(".", 2)
    return tensors[f"{head}.{leaf}"].chunk(3)[int(number)]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(
    "changes", [{}, {"pixels": 28, "embed": 7, "vision": {**VIT, "patch": 7, "width": 16, "heads": 4}, "text": {**TEXT, "depth": 1}}]
)
def test_equals_transformers(changes: dict[str, Any], scale: float) -> None:
    """Logits of all pairs, and all gradients."""
    ours = stirred(clip(**changes))
    theirs, names = peer(ours)
    images, tokens = pictures(pixels=ours.options.pixels, scale=scale), captions()
    seen, read, logit_scale = ours(images, tokens)
    logits = logit_scale * seen @ read.T
    wanted = theirs(input_ids=tokens, pixel_values=images).logits_per_image
    near(logits, wanted)
    target = torch.arange(len(logits))
    for each in (logits, wanted):
        ((F.cross_entropy(each, target) + F.cross_entropy(each.T, target)) / 2).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        mine = part_of(gradients, names[name]).reshape(p.shape)
        # A bias of the keys moves all logits alike: its gradient is nothing but rounding.
        near(mine, p.grad) if "k_proj.bias" not in name else torch.testing.assert_close(mine, p.grad, atol=1e-14, rtol=0)


# --- the ResNet ---


def reference_resnet(state: Mapping[str, torch.Tensor], depths: tuple[int, ...], heads: int, x: torch.Tensor) -> torch.Tensor:
    """The paper's section 2.4 in functions, in training mode; a stride is a mean over squares, attention is written out."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        gain, bias = (state[f"{name}.{end}"][:, None, None] for end in ("weight", "bias"))
        return (y - mean) / (variance + 1e-5).sqrt() * gain + bias

    def shrink(y: torch.Tensor, by: int) -> torch.Tensor:
        return y.unflatten(3, (-1, by)).unflatten(2, (-1, by)).mean((3, 5))

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = norm(F.conv2d(x, state[f"conv{i}.weight"], stride=stride, padding=1), f"bn{i}").clamp(min=0)
    x = shrink(x, 2)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            at, by = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = norm(F.conv2d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1").clamp(min=0)
            y = norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2").clamp(min=0)
            y = norm(F.conv2d(shrink(y, by), state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if not block:
                x = norm(F.conv2d(shrink(x, by), state[f"{at}.downsample.0.weight"]), f"{at}.downsample.1")
            x = (x + y).clamp(min=0)
    x = x.flatten(2).permute(0, 2, 1)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + state["attnpool.positional_embedding"]
    q, k, v = linear(x[:, 0], "attnpool.q_proj"), linear(x, "attnpool.k_proj"), linear(x, "attnpool.v_proj")
    size = q.shape[1] // heads
    out = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = (torch.einsum("bd,bnd->bn", q[:, part], k[:, :, part]) / math.sqrt(size)).softmax(1)
        out.append(torch.einsum("bn,bnd->bd", weights, v[:, :, part]))
    return linear(torch.cat(out, 1), "attnpool.c_proj")


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("pixels", "width"), [(64, 4), (96, 6)])
def test_resnet_equals_its_reference(pixels: int, width: int, scale: float) -> None:
    """Both results are sums of many terms that BatchNorm over four images blows up: 1e-12 still holds, gradients included."""
    model = stirred(clip(pixels=pixels, vision={**RESNET, "width": width})).visual
    assert isinstance(model, CLIPResNet)
    images = pictures(pixels=pixels, scale=scale)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ours, wanted = model(images), reference_resnet(state, (1, 2, 1, 1), width * 32 // 64, images)
    near(ours, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for each in (ours, wanted):
        (each * weights).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name != "attnpool.k_proj.bias":
            near(p.grad, state[name].grad)


def test_resnet_names_and_running_means() -> None:
    model = clip(pixels=64, vision=RESNET)
    names = {name.removeprefix("visual.") for name in model.state_dict() if name.startswith("visual.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {f"layer2.0.bn3.{leaf}" for leaf in norm} | {f"layer2.0.downsample.1.{leaf}" for leaf in norm} <= names
    assert {
        "conv3.weight",
        "layer2.1.conv3.weight",
        "layer2.0.downsample.0.weight",
        "attnpool.positional_embedding",
        "attnpool.c_proj.bias",
    } <= names
    assert not any(name.startswith("layer2.1.downsample") for name in names)
    images = pictures(pixels=64).float()
    with torch.no_grad():
        trained = model.visual(images)
        assert not torch.allclose(model.eval().visual(images), trained)


# --- counts and initialisation ---

PUBLISHED = {
    "clip_vit_b32": (151_277_313, 87_849_216),
    "clip_vit_b16": (149_620_737, 86_192_640),
    "clip_vit_l14": (427_616_513, 303_966_208),
    "clip_vit_l14_336": (427_944_193, 304_293_888),
    "clip_rn50": (102_007_137, 38_316_896),
    "clip_rn101": (119_688_033, 56_259_936),
    "clip_rn50x4": (178_300_601, 87_137_080),
    "clip_rn50x16": (290_979_217, 167_328_912),
    "clip_rn50x64": (623_258_305, 420_380_352),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    model = create(name, device="meta")
    assert isinstance(model, CLIP)
    assert (model.parameter_count, sum(p.numel() for p in model.visual.parameters())) == PUBLISHED[name]
    if "rn101" in name or "b32" in name:
        seen, read, scale = model(*model.example(2))
        assert seen.shape == read.shape == (2, 512) and scale.shape == ()


def test_initialisation() -> None:
    """Table of OpenAI's `initialize_parameters`, at sizes where a standard deviation is sure to 5%."""
    model = clip(
        embed=96, vision={**VIT, "width": 192, "mlp": 768}, text={**TEXT, "width": 128, "heads": 2, "mlp": 512, "depth": 4}, vocabulary=997
    )
    state = model.state_dict()
    branch = 128**-0.5 * 8**-0.5
    wanted = {
        "text.token_embed.weight": 0.02, "text.pos_embed": 0.01, "text.proj.weight": 128**-0.5,
        "text.blocks.3.attn.qkv.weight": 128**-0.5, "text.blocks.3.attn.proj.weight": branch,
        "text.blocks.3.mlp.fc1.weight": 256**-0.5, "text.blocks.3.mlp.fc2.weight": branch,
        "visual.pos_embed": 192**-0.5, "visual.head.weight": 192**-0.5,
        "visual.blocks.1.attn.qkv.weight": math.sqrt(2 / (4 * 192)), "visual.blocks.1.attn.proj.weight": (3 * 192) ** -0.5,
        "visual.blocks.1.mlp.fc1.weight": (3 * 192) ** -0.5, "visual.blocks.1.mlp.fc2.weight": (3 * 768) ** -0.5,
        "visual.patch_embed.proj.weight": (3 * 75) ** -0.5,
    }  # fmt: skip
    for name, std in wanted.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert 0.7 < state["visual.cls_token"].std() * 192**0.5 < 1.3
    for tower in ("visual", "text"):
        assert not any(state[f"{tower}.blocks.0.attn.{layer}.bias"].any() for layer in ("qkv", "proj"))
        assert state[f"{tower}.blocks.0.mlp.fc1.bias"].any()
    assert "visual.patch_embed.proj.bias" not in state and "visual.head.bias" not in state
    assert state["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))


def test_initialisation_of_the_resnet() -> None:
    state = clip(pixels=64, vision={**RESNET, "width": 8}).visual.state_dict()
    assert not state["layer2.1.bn3.weight"].any() and (state["layer2.1.bn2.weight"] == 1).all()
    assert (state["layer2.0.downsample.1.weight"] == 1).all() and (state["bn3.weight"] == 1).all()
    for name in ("positional_embedding", "q_proj.weight", "k_proj.weight", "v_proj.weight", "c_proj.weight"):
        assert state[f"attnpool.{name}"].std().item() == pytest.approx(256**-0.5, rel=0.1), name


# --- behaviour ---


@pytest.mark.parametrize("padding", [0, 17, EOT])
def test_text_is_causal_and_ends_at_eot(padding: int) -> None:
    text = stirred(clip()).text
    tokens = captions()
    changed = torch.where(torch.arange(L) > tokens.argmax(1, keepdim=True), padding, tokens)
    torch.testing.assert_close(text(changed), text(tokens), rtol=1e-13, atol=1e-14)
    shorter = text(tokens[:1, : int(tokens[0].argmax()) + 1])
    torch.testing.assert_close(shorter, text(tokens)[:1], rtol=1e-13, atol=1e-14)
    other = tokens.clone()
    other[:, 1] = other[:, 1] % (EOT - 2) + 1
    assert (text(other) - text(tokens)).abs().amax(1).min() > 1e-3


def bag() -> TextTower:
    return stirred(clip(text={"kind": "bag-of-words", "width": 12})).text


def test_bag_of_words_knows_no_order_and_no_marks() -> None:
    text, tokens = bag(), captions()
    assert {name for name, _ in text.named_parameters()} == {"token_embed.weight", "proj.weight"}
    turned = tokens.clone()
    for row, end in enumerate(tokens.argmax(1).tolist()):
        turned[row, 1:end] = tokens[row, 1:end].flip(0)
    assert (turned != tokens).any()
    torch.testing.assert_close(text(turned), text(tokens), rtol=1e-13, atol=1e-14)
    words = tokens[2, 1 : int(tokens[2].argmax())]
    torch.testing.assert_close(text(tokens)[2], text.proj.weight @ text.token_embed.weight[words].mean(0), rtol=1e-13, atol=1e-14)


def test_bag_of_words_counts_token_0_as_a_word_but_not_as_padding() -> None:
    text = bag()
    with_mark = torch.tensor([[EOT - 1, 5, 0, EOT, 0, 0, 0]])
    wanted = text.proj.weight @ text.token_embed.weight[[5, 0]].mean(0)
    torch.testing.assert_close(text(with_mark)[0], wanted, rtol=1e-13, atol=1e-14)


def test_an_empty_bag_of_words_has_a_finite_gradient() -> None:
    model = clip(text={"kind": "bag-of-words", "width": 12})
    seen, read, scale = model(pictures(2).float(), torch.tensor([[EOT - 1, EOT, 0], [EOT - 1, 3, EOT]]))
    assert not read[0].any() and read[1].norm().item() == pytest.approx(1)
    (scale * seen @ read.T).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.text.parameters())


def test_either_side_alone() -> None:
    model = clip().double()
    images, tokens = pictures(), captions()
    seen, read, scale = model(images, tokens)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(read.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert model(images=images)[1] is None and model(tokens=tokens)[0] is None
    torch.testing.assert_close(model.encode_image(images), seen, rtol=0, atol=0)
    torch.testing.assert_close(model.encode_text(tokens), read, rtol=0, atol=0)
    projected = F.normalize(model.features(images) @ model.visual.head.weight.T, dim=1)
    torch.testing.assert_close(projected, seen)


def test_the_scale_is_bounded_and_the_bias_asked_for() -> None:
    model = clip()
    assert set(model.limits) <= set(dict(model.named_parameters())) and model.limits["logit_scale"] == (0.0, math.log(100))
    assert "logit_bias" not in dict(model.named_parameters())
    siglip = clip(logit_bias=-10.0, logit_scale=math.log(10))
    *_, scale, bias = siglip(pictures(2).float(), captions(2))
    assert scale.item() == pytest.approx(10) and bias.item() == -10.0 and bias.requires_grad
    kept = {name for name, _ in siglip.named_parameters() if name.endswith(tuple(siglip.unpenalised))}
    assert kept == {"visual.cls_token", "logit_scale", "logit_bias"}


def test_features_of_a_resnet_are_those_of_its_attention_pool() -> None:
    model = clip(pixels=64, vision=RESNET).eval()
    images = pictures(pixels=64).float()
    torch.testing.assert_close(F.normalize(model.features(images), dim=1), model.encode_image(images))


@pytest.mark.parametrize(
    "vision", [VIT, {**VIT, "pool": "gap", "positions": "sincos-2d", "qk_norm": True, "layer_scale": 0.1}, {**VIT, "pool": "map"}]
)
def test_any_vit_is_a_tower(vision: dict[str, Any]) -> None:
    model = clip(vision=vision)
    seen, _, _ = model(pictures().float(), captions())
    assert seen.shape == (4, 10)
    seen.sum().backward()
    assert all(p.grad is not None for p in model.visual.parameters())


def test_options_travel() -> None:
    for name in ("clip_vit_l14_336", "clip_rn50x4"):
        options = check_model(name, {})
        assert type(options).model_validate(options.model_dump(mode="json")) == options
    other = check_model("clip", {**check_model("clip_vit_l14_336", {}).model_dump(), "pixels": 224})
    assert other.vision.pixels == 224  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": {"pixels": 32}}, "model.vision.pixels: is not a tower's own"),
        ({"vision": {"patch": 15}}, "model.vision.pixels: 224 is not a multiple"),
        ({"vision": {"distilled": True}}, "model.vision: an image tower"),
        ({"vision": {"wdith": 32}}, "model.vision.wdith: no such key, did you mean 'width'? (allowed: activation"),
        ({"vision": {"kind": "vitt"}}, "model.vision.kind: should be one of 'vit', 'resnet'"),
        ({"text": {"heads": 7}}, "model.text.width: 512 is not a multiple of heads"),
        ({"text": {"kind": "bag"}}, "model.text.kind"),
        ({"embd": 3}, "did you mean"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        check_model("clip_vit_b32", changes)
    assert said in str(e.value)
    with pytest.raises(ConfigError, match="not a multiple of 32"):
        check_model("clip_rn50", {"pixels": 100})
    for count, bound in ((3, "least"), (5, "most")):
        with pytest.raises(ConfigError, match=rf"model\.vision\.depths: should have at {bound} 4 items$"):
            check_model("clip_rn50", {"vision": {"depths": [1] * count}})
    with pytest.raises(ConfigError, match=r"model\.vision\.kind: is missing \(allowed: resnet, vit\)$"):
        check_model("clip", {"embed": 8, "vision": {"width": 8}, "text": {"width": 8}})


def test_other_pixels_and_a_shorter_context() -> None:
    old = clip(seed=1)
    state = old.state_dict()
    new = clip(seed=2, pixels=25, context=7)
    new.load_state_dict(new.adapt(state))
    torch.testing.assert_close(new.visual.pos_embed, resize_positions(old.visual.pos_embed, 5, "timm-hybrid"))
    torch.testing.assert_close(new.text.pos_embed, old.text.pos_embed[:7])
    for name in ("visual.head.weight", "text.proj.weight", "logit_scale"):
        torch.testing.assert_close(new.state_dict()[name], state[name])
    tokens = captions(length=7)
    torch.testing.assert_close(new.encode_text(tokens), old.encode_text(tokens))
    narrow = clip(embed=6)
    with pytest.raises(RuntimeError, match=r"visual\.head\.weight"):
        narrow.load_state_dict(narrow.adapt(state))


def test_other_pixels_of_a_resnet() -> None:
    old, new = clip(pixels=64, vision=RESNET), clip(seed=1, pixels=96, vision=RESNET)
    new.load_state_dict(new.adapt(old.state_dict()))
    pool = new.visual.attnpool.positional_embedding
    assert pool.shape == (10, 128)
    torch.testing.assert_close(pool[0], old.visual.attnpool.positional_embedding[0])


def test_bf16() -> None:
    """Embeddings have length 1: they agree within a few roundings of 2^-8."""
    for changes in ({}, {"pixels": 64, "vision": RESNET}):
        model = clip(**changes).eval()
        images, tokens = pictures(pixels=model.options.pixels), captions()
        with torch.no_grad():
            exact = model.double()(images, tokens)
            rough = model.bfloat16()(images.bfloat16(), tokens)
        for a, b in zip(rough[:2], exact[:2], strict=True):
            assert (a.double() - b).norm(dim=1).max() < 2**-5


def test_compiled_equals_eager() -> None:
    """Embeddings and gradients. A whole ResNet tower is traced with its gradients, but takes a minute to generate code for: that is done
    for its attention pool, the rest being convolutions, norms and means."""

    def results(model: torch.nn.Module, run: Any, *arguments: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        out = run(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        sum((y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum() for y in out).backward()
        return [*out, *(p.grad for p in model.parameters())]

    pair = stirred(clip(vision={**VIT, "depth": 1}, text={**TEXT, "depth": 1}))
    tower = stirred(clip(pixels=64, vision={**RESNET, "depths": (1, 1, 1, 1)})).visual
    maps = torch.randn(4, 128, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for model, arguments, backend in (
        (pair, (pictures(), captions()), "inductor"),
        (tower.attnpool, (maps,), "inductor"),
        (tower, (pictures(pixels=64),), "aot_eager"),
    ):
        compiled = torch.compile(model, backend=backend)
        for ours, wanted in zip(results(model, compiled, *arguments), results(model, model, *arguments), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12 * max(1.0, wanted.abs().max().item()))
