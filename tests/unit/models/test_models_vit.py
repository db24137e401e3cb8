"""The Vision Transformer and DeiT against transformers, against the paper's equations, and against its published counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, PreTrainedModel, ViTConfig, ViTForImageClassification

from pipeline.models import create, flops
from pipeline.models.sizes import VIT
from pipeline.models.vit import VisionTransformer
from tests.unit.models.peers import BF16, error, images, in_transformers, largest_error, misfit, randomise
from tests.unit.models.residual import saved_numbers

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def tiny(seed: int = 0, **options: object) -> VisionTransformer:
    model = create("vit", seed=seed, **{**TINY, "pixels": 8, "classes": 5, **options})
    assert isinstance(model, VisionTransformer)
    return model


def small(count: int = 3, pixels: int = 8) -> torch.Tensor:
    return images(count, pixels).float()


def wake(model: VisionTransformer) -> VisionTransformer:
    """A head that is not zero any more."""
    torch.nn.init.normal_(model.head.weight, std=1.0, generator=torch.Generator().manual_seed(2))
    return model


# --- against transformers ---

SHAPES = [
    ({"pixels": 24, "patch": 8, "width": 30, "heads": 3, "mlp": 44, "depth": 2, "classes": 7}, 3, 1.0),
    ({"pixels": 24, "patch": 8, "width": 30, "heads": 3, "mlp": 44, "depth": 2, "classes": 7}, 3, 1e-3),
    ({"pixels": 35, "patch": 5, "width": 22, "heads": 2, "mlp": 13, "depth": 3, "classes": 4, "activation": "quick-gelu"}, 2, 1.0),
    ({"pixels": 35, "patch": 5, "width": 22, "heads": 2, "mlp": 13, "depth": 3, "classes": 4, "eps": 1e-12}, 2, 1e-3),
]


def peer(model: VisionTransformer) -> PreTrainedModel:
    o = model.options
    kind, config = (DeiTForImageClassificationWithTeacher, DeiTConfig) if o.distilled else (ViTForImageClassification, ViTConfig)
    return kind(
        config(
            hidden_size=o.width, num_hidden_layers=o.depth, num_attention_heads=o.heads, intermediate_size=o.mlp, image_size=o.pixels,
            patch_size=o.patch, num_labels=o.classes, layer_norm_eps=o.eps, hidden_act=o.activation.replace("-", "_"),
            attn_implementation="sdpa",
        )
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("options", "batch", "scale"), SHAPES)
def test_parity(distilled: bool, options: dict[str, object], batch: int, scale: float) -> None:
    model = randomise(tiny(**options, distilled=distilled))
    theirs, prefix = peer(model), "deit" if distilled else "vit"

    def reference(parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(theirs, in_transformers(parameters, prefix), (x,), strict=True).logits

    x = images(batch, model.options.pixels, scale)
    assert largest_error(model, reference, x) <= 1e-12
    if distilled:
        out = functional_call(theirs, in_transformers(dict(model.named_parameters()), prefix), (x,), strict=True)
        for ours, other in zip(model(x, heads=True), (out.cls_logits, out.distillation_logits), strict=True):
            assert error(ours, other) <= 1e-12


# --- by the paper ---


@pytest.mark.parametrize(
    ("name", "with_head", "without"),
    [
        ("vit_b16", 86_567_656, 85_798_656),
        ("vit_b32", 88_224_232, 87_455_232),
        ("vit_l16", 304_326_632, 303_301_632),
        ("vit_l32", 306_535_400, 305_510_400),
        ("vit_h14", 632_045_800, 630_764_800),
        ("vit_g14", 1_012_611_432, 1_011_202_432),
        ("vit_bigg14", 1_844_440_680, 1_842_775_680),
        ("vit_ti16", 5_717_416, 5_524_416),
        ("vit_s16", 22_050_664, 21_665_664),
        ("vit_r50_b16", 98_659_112, 97_890_112),
        ("deit_ti16", 5_910_800, 5_910_800 - 2 * 193_000),
        ("deit_s16", 22_436_432, 22_436_432 - 2 * 385_000),
        ("deit_b16", 87_338_192, 87_338_192 - 2 * 769_000),
    ],
)
def test_parameters(name: str, with_head: int, without: int) -> None:
    """Published counts at 224 pixels and 1,000 classes; a DeiT has two heads."""
    for options, count in (({}, with_head), ({"classes": 0}, without)):
        assert create(name, device="meta", **options).parameter_count == count


@pytest.mark.parametrize("options", [{}, {"distilled": True}])
def test_names_are_those_of_timm(options: dict[str, bool]) -> None:
    names = set(tiny(depth=1, **options).state_dict())
    block = {f"blocks.0.{m}.{p}" for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    ends = {"cls_token", "pos_embed", *(f"{m}.{p}" for m in ("patch_embed.proj", "norm", "head") for p in ("weight", "bias"))}
    assert names == block | ends | ({"dist_token", "head_dist.weight", "head_dist.bias"} if options else set())


@pytest.mark.parametrize("options", [{"pool": "token"}, {"pool": "gap"}, {"pool": "map"}, {"distilled": True}, {"representation": 6}])
def test_the_first_loss_is_ln_of_the_classes(options: dict[str, object]) -> None:
    logits = tiny(classes=7, **options)(small())
    assert torch.equal(logits, torch.zeros(3, 7))
    assert F.cross_entropy(logits, torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7), abs=1e-7)


def test_forward_by_hand() -> None:
    """The whole network again, in fp64, written out from the paper's equations 1 to 4."""
    model = wake(tiny(depth=1)).double().eval()
    w, x = model.state_dict(), small().double()
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 4, 48)
    z = patches @ w["patch_embed.proj.weight"].reshape(16, 48).T + w["patch_embed.proj.bias"]
    z = torch.cat([w["cls_token"].expand(3, 1, 16), z], 1) + w["pos_embed"]

    def norm(t: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
        return (t - mean) / (var + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(t: torch.Tensor, name: str) -> torch.Tensor:
        return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    q, k, v = dense(norm(z, "blocks.0.norm1"), "blocks.0.attn.qkv").split(16, -1)
    heads = [torch.softmax(q[..., i : i + 8] @ k[..., i : i + 8].transpose(1, 2) / math.sqrt(8), -1) @ v[..., i : i + 8] for i in (0, 8)]
    z = z + dense(torch.cat(heads, -1), "blocks.0.attn.proj")
    hidden = dense(norm(z, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    z = z + dense(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), "blocks.0.mlp.fc2")
    expected = dense(norm(z, "norm")[:, 0], "head")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_initialisation() -> None:
    model = tiny(width=256, depth=1, heads=4, patch=8, pixels=64, pool="map", representation=128, distilled=False, masked=True)
    w = model.state_dict()
    bound = math.sqrt(6 / (256 + 256))  # xavier, of query, key and value each
    for name in ("blocks.0.attn.qkv.weight", "attn_pool.kv.weight", "attn_pool.q.weight"):
        assert w[name].abs().max() <= bound
        assert w[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert w["patch_embed.proj.weight"].std().item() == pytest.approx(math.sqrt(1 / 192), rel=0.02)  # LeCun
    assert w["pre_logits.weight"].std().item() == pytest.approx(math.sqrt(1 / 256), rel=0.02)
    assert w["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert w["mask_token"].std().item() == pytest.approx(0.02, rel=0.2)
    assert math.sqrt(6 / 257) * 0.9 < w["attn_pool.latent"].abs().max() <= math.sqrt(6 / 257)
    for name in ("blocks.0.mlp.fc1.bias", "attn_pool.mlp.fc2.bias"):
        assert 0 < w[name].abs().max() < 1e-5
    for name in ("head.weight", "head.bias", "mask_head.weight", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "pre_logits.bias"):
        assert not w[name].any(), name
    deit = tiny(width=256, heads=4, distilled=True).state_dict()
    assert not deit["cls_token"].any() and not deit["head_dist.weight"].any()
    assert deit["dist_token"].std().item() == pytest.approx(0.02, rel=0.2)
    assert tiny(head_bias_init=-10.0).head.bias.tolist() == [-10.0] * 5


def test_flops_are_the_published_ones() -> None:
    """MAE's and DeiT's tables count multiply-adds: 17.6G for B/16."""
    assert flops(create("vit_b16", device="meta")) == pytest.approx(2 * 17.58e9, rel=0.005)


@pytest.mark.parametrize(("name", "pixels"), [("vit_ti16", 224), ("vit_b32", 224), ("vit_s16", 64)])
def test_flops_by_hand(name: str, pixels: int) -> None:
    width, depth, mlp, _ = VIT[name[4:].rstrip("0123456789")]
    patch = int(name[-2:])
    n = (pixels // patch) ** 2
    block = 4 * width * width + 2 * width * mlp + 2 * (n + 1) * width
    expected = 2 * (n * 3 * patch**2 * width + depth * (n + 1) * block + 1000 * width)
    assert flops(create(name, device="meta", pixels=pixels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"mlp": 24}, {"layer_scale": 0.1, "qk_norm": True}, {"positions": "relative"}, {"pool": "gap"}, {"stem": (1, 1), "patch": 8}],
)
def test_activations(options: dict[str, object]) -> None:
    """Within a quarter of what autograd keeps; a deep model, so that what comes before and after the blocks is small."""
    model = tiny(depth=6, width=32, pixels=32, **options)
    assert model.activations() == pytest.approx(saved_numbers(model, lambda batch: model.example(batch)[0]), rel=0.25)


# --- precision ---


@pytest.mark.parametrize("options", [{}, {"pool": "map"}, {"positions": "relative"}, {"distilled": True}])
def test_bf16_is_within_its_rounding(options: dict[str, object]) -> None:
    """Of weights and images that bf16 holds exactly, so that its arithmetic alone is measured."""
    model, x = randomise(tiny(**options)).bfloat16(), images(8).bfloat16()
    half, expected = model(x), model.double()(x.double())
    assert half.dtype == torch.bfloat16 and misfit(half, expected) < BF16
    single = model.float()(x.float())
    assert misfit(single, expected) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert misfit(single, expected) < misfit(model(x.float()), expected) < BF16


def test_compiled_and_eager_agree() -> None:
    model = wake(tiny(depth=1, positions="relative", pool="map", qk_norm=True, layer_scale=0.1))
    compiled = torch.compile(model, fullgraph=True)
    labels, gradients = torch.tensor([0, 1, 2]), []
    for run in (model, compiled):
        model.zero_grad()
        F.cross_entropy(run(small()), labels).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert error(compiled(small()), model(small())) < 1e-5
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
