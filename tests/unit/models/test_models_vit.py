from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.errors import ConfigError
from pipeline.models import build_model, check_model, model_names
from pipeline.models.blocks import DropPath
from pipeline.models.vit import VisionTransformer, resize_positions

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def tiny(classes: int = 5, seed: int = 0, pixels: int = 8, **arguments: object) -> VisionTransformer:
    return build_model("vit", {**TINY, **arguments}, pixels=pixels, classes=classes, seed=seed)


def images(count: int = 3, pixels: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def wake(model: VisionTransformer) -> VisionTransformer:
    """A head that is not zero any more."""
    torch.nn.init.normal_(model.head.weight, std=1.0, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize(
    ("name", "with_head", "without"),
    [
        ("vit_b16", 86_567_656, 85_798_656),
        ("vit_b32", 88_224_232, 87_455_232),
        ("vit_l16", 304_326_632, 303_301_632),
        ("vit_l32", 306_535_400, 305_510_400),
        ("vit_h14", 632_045_800, 630_764_800),
        ("vit_g14", 1_012_611_432, 1_011_202_432),
        ("vit_gg14", 1_844_440_680, 1_842_775_680),
        ("vit_ti16", 5_717_416, 5_524_416),
        ("vit_s16", 22_050_664, 21_665_664),
    ],
)
def test_parameters(name: str, with_head: int, without: int) -> None:
    """Published counts at 224 pixels and 1,000 classes."""
    with torch.device("meta"):
        for classes, count in ((1000, with_head), (0, without)):
            model = build_model(name, {}, pixels=224, classes=classes)
            assert sum(p.numel() for p in model.parameters()) == count


def test_names_are_those_of_timm() -> None:
    names = set(tiny(depth=1).state_dict())
    block = {f"blocks.0.{m}.{p}" for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    ends = {"cls_token", "pos_embed", *(f"{m}.{p}" for m in ("patch_embed.proj", "norm", "head") for p in ("weight", "bias"))}
    assert names == block | ends


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_the_first_loss_is_ln_of_the_classes(pool: str) -> None:
    logits = tiny(classes=7, pool=pool)(images())
    assert torch.equal(logits, torch.zeros(3, 7))
    assert F.cross_entropy(logits, torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7), abs=1e-7)


def test_forward_by_hand() -> None:
    """The whole network again, in fp64, written out from the paper's equations 1 to 4."""
    model = wake(tiny(depth=1)).double().eval()
    w, x = model.state_dict(), images().double()
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


def test_pooling() -> None:
    token, gap = tiny(classes=0, pool="token"), tiny(classes=0, pool="gap")
    assert token.features(images()).shape == (3, 16)
    assert not torch.allclose(token(images()), gap(images()))
    assert torch.equal(token(images()), token.features(images()))  # without a head


def test_initialisation() -> None:
    model = tiny(width=256, depth=1, heads=4, patch=8, pixels=64)
    w = model.state_dict()
    bound = math.sqrt(6 / (256 + 256))  # xavier, of query, key and value each
    assert w["blocks.0.attn.qkv.weight"].abs().max() <= bound
    assert w["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert w["patch_embed.proj.weight"].std().item() == pytest.approx(math.sqrt(1 / 192), rel=0.02)  # LeCun
    assert w["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < w["blocks.0.mlp.fc1.bias"].abs().max() < 1e-5
    for name in ("cls_token", "head.weight", "head.bias", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias"):
        assert not w[name].any(), name


def test_seeds() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = tiny(seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)  # building draws nothing from others
    torch.rand(7)
    two, other = tiny(seed=3).state_dict(), tiny(seed=4).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["pos_embed"], other["pos_embed"])


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_gradients_reach_every_parameter(pool: str) -> None:
    model = wake(tiny(pool=pool))
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_randomness_is_of_training_alone() -> None:
    model = wake(tiny(dropout=0.5, drop_path=0.9))
    plain = wake(tiny())
    model.eval()
    assert torch.equal(model(images()), plain(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_drop_path() -> None:
    drop, ones = DropPath(0.25), torch.ones(20_000, 3, 2)
    torch.manual_seed(0)
    out = drop(ones)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))  # a whole sample at once
    assert out.unique().tolist() == pytest.approx([0, 4 / 3]) and out.mean().item() == pytest.approx(1, abs=0.02)
    assert DropPath(0.0)(ones) is ones and drop.eval()(ones) is ones
    assert [b.drop_path.p for b in tiny(depth=5, drop_path=0.4).blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert tiny(depth=1, drop_path=0.4).blocks[0].drop_path.p == 0


@pytest.mark.parametrize(("name", "pixels"), [("vit_ti16", 224), ("vit_b32", 224), ("vit_s16", 64)])
def test_flops(name: str, pixels: int) -> None:
    with torch.device("meta"):
        model = build_model(name, {}, pixels=pixels, classes=1000)
        with FlopCounterMode(display=False) as counted:
            model(torch.empty(1, 3, pixels, pixels))
    assert model.flops() == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_flops_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert build_model("vit_b16", {}, pixels=224, classes=1000).flops() == pytest.approx(2 * 17.58e9, rel=0.005)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (14, 24), (7, 5), (2, 3)])
def test_resize_positions(old: int, new: int) -> None:
    positions = torch.randn(1, 1 + old * old, 6, generator=torch.Generator().manual_seed(0))
    out = resize_positions(positions, new)
    assert out.shape == (1, 1 + new * new, 6) and torch.equal(out[:, 0], positions[:, 0])
    zoomed = ndimage.zoom(positions[0, 1:].reshape(old, old, 6).numpy(), (new / old, new / old, 1), order=1)  # as Google's code
    np.testing.assert_allclose(out[0, 1:].reshape(new, new, 6).numpy(), zoomed, atol=3e-6)
    assert resize_positions(positions, old) is positions


def test_resize_positions_known_values() -> None:
    grid = torch.tensor([9.0, 0, 2, 4, 6]).reshape(1, 5, 1)
    assert resize_positions(grid, 3).flatten().tolist() == [9, 0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert resize_positions(grid.bfloat16(), 3).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "arguments", "pixels", "message"),
    [
        ("vit_b61", {}, 224, r"pretrain.model.name: 'vit_b61' is not known, did you mean 'vit_b16'\? \(allowed: vit, vit_b16"),
        ("vit_b16", {"drop_pth": 0.1}, 224, r"pretrain.model.drop_pth: no such key, did you mean 'drop_path'\? \(allowed: name, depth"),
        ("vit", {"depth": 1, "heads": 2, "patch": 4}, 8, r"pretrain.model.width: is missing, a model of one's own size needs it"),
        ("vit", {**TINY, "heads": 3}, 8, r"pretrain.model.width: 16 is not a multiple of heads \(3\)"),
        ("vit", TINY, 10, r"pretrain.image.pixels: 10 is not a multiple of the patch, 4 pixels"),
        ("vit", {**TINY, "dropout": 1.0}, 8, r"pretrain.model.dropout: 1.0 should be less than 1"),
        ("vit", {**TINY, "depth": 0}, 8, r"pretrain.model.depth: 0 should be greater than 0"),
        ("vit", {**TINY, "depth": "two"}, 8, r"pretrain.model.depth: 'two' should be a valid integer"),
        ("vit", {**TINY, "pool": "max"}, 8, r"pretrain.model.pool: 'max' "),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], pixels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(name, arguments, pixels)
    with pytest.raises(ConfigError, match=message):
        build_model(name, arguments, pixels=pixels, classes=1)


def test_names() -> None:
    assert "vit" in model_names() and model_names() == sorted(model_names())
    assert check_model("vit_b16", {"drop_path": 0.1}, 224).drop_path == 0.1
