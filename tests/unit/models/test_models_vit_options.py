"""What each option of a Vision Transformer does, against short references from the papers, and which do not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from pipeline.core.errors import ConfigError
from pipeline.models import check_model, create
from pipeline.models.blocks import DropPath
from pipeline.models.vit import VisionTransformer
from tests.unit.models.peers import error, images, largest_error, randomise

TINY = {"width": 12, "depth": 2, "heads": 3, "mlp": 20, "patch": 4, "pixels": 12, "classes": 5}


def tiny(**options: object) -> VisionTransformer:
    model = create("vit", seed=0, **{**TINY, **options})
    assert isinstance(model, VisionTransformer)
    return model


def tokens_of(model: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    return model(x, tokens=True)


# --- pooling ---


def test_pooling() -> None:
    """The class token, or the mean of the patches, with or without a class token among the tokens."""
    x = images(3, 12)
    token, gap, both = (randomise(tiny(classes=0, **o)) for o in ({}, {"pool": "gap"}, {"pool": "gap", "class_token": True}))
    assert [tokens_of(m, x).shape for m in (token, gap, both)] == [(3, 10, 12), (3, 9, 12), (3, 10, 12)]
    torch.testing.assert_close(token.features(x), tokens_of(token, x)[:, 0])
    torch.testing.assert_close(gap.features(x), tokens_of(gap, x).mean(dim=1))
    torch.testing.assert_close(both.features(x), tokens_of(both, x)[:, 1:].mean(dim=1))
    assert torch.equal(gap(x), gap.features(x))  # without a head


def test_map_by_hand() -> None:
    """A probe as the only query, then z + MLP(LN(z)) (arXiv 2106.04560, section 3.2)."""
    pool = randomise(tiny(pool="map")).attn_pool
    w, x = dict(pool.named_parameters()), images(2, 6).reshape(2, 9, 12)

    def reference(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        q = w["latent"][0, 0] @ w["q.weight"].T + w["q.bias"]
        k, v = (x @ w["kv.weight"].T + w["kv.bias"]).split(12, dim=2)
        heads = [(k[..., i : i + 4] @ q[i : i + 4] / 2).softmax(dim=1)[:, None] @ v[..., i : i + 4] for i in (0, 4, 8)]
        z = torch.cat(heads, dim=2)[:, 0] @ w["proj.weight"].T + w["proj.bias"]
        normed = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-6).sqrt() * w["norm.weight"] + w["norm.bias"]
        hidden = normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return z + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    assert largest_error(pool, reference, x) < 1e-12
    names = {"latent", *(f"{m}.{p}" for m in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias"))}
    assert set(w) == names  # timm's
    model = randomise(tiny(pool="map"))
    torch.testing.assert_close(model.features(images(2, 12)), model.attn_pool(tokens_of(model, images(2, 12))))


def test_map_adds_the_probe_and_a_block() -> None:
    """g/14 without a class token and its position, with latent, four projections, a norm and an MLP."""
    d, m = 1408, 6144
    pool = d + 4 * (d * d + d) + 2 * d + 2 * d * m + d + m
    assert create("vit_g14", device="meta", pool="map").parameter_count == 1_012_611_432 - 2 * d + pool


# --- heads ---


def test_representation_and_fc_norm() -> None:
    x = images(3, 12)
    model = randomise(tiny(representation=7))
    assert model.features(x).shape == (3, 7) and model.head.weight.shape == (5, 7)
    pooled = tokens_of(model, x)[:, 0]
    torch.testing.assert_close(model.features(x), torch.tanh(pooled @ model.pre_logits.weight.T + model.pre_logits.bias))
    after = randomise(tiny(pool="gap", fc_norm=True))
    assert not any(name.startswith("norm.") for name in after.state_dict())
    pooled = tokens_of(after, x).mean(dim=1)
    expected = F.layer_norm(pooled, (12,), after.fc_norm.weight, after.fc_norm.bias, 1e-6)
    torch.testing.assert_close(after(x), expected @ after.head.weight.T + after.head.bias)


def test_distilled() -> None:
    """Two tokens, two heads; their mean at test time (arXiv 2012.12877, section 5.2)."""
    model, x = randomise(tiny(distilled=True)), images(3, 12)
    z = tokens_of(model, x)
    assert z.shape == (3, 11, 12)
    of_class, of_teacher = model(x, heads=True)
    torch.testing.assert_close(of_class, z[:, 0] @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(of_teacher, z[:, 1] @ model.head_dist.weight.T + model.head_dist.bias)
    torch.testing.assert_close(model(x), (of_class + of_teacher) / 2)
    torch.testing.assert_close(model.features(x), (z[:, 0] + z[:, 1]) / 2)


def test_options_of_a_clip_tower() -> None:
    """A norm before the first block, no biases in patches and head, another activation and epsilon."""
    model, x = randomise(tiny(pre_norm=True, patch_bias=False, head_bias=False, activation="quick-gelu", eps=1e-2)), images(3, 12)
    names = set(tiny().state_dict())
    assert set(model.state_dict()) == names - {"patch_embed.proj.bias", "head.bias"} | {"norm_pre.weight", "norm_pre.bias"}
    z = torch.cat(
        [model.cls_token.expand(3, 1, 12), F.conv2d(x, model.patch_embed.proj.weight, stride=4).flatten(2).transpose(1, 2)], dim=1
    )
    z = F.layer_norm(z + model.pos_embed, (12,), model.norm_pre.weight, model.norm_pre.bias, 1e-2)
    for block in model.blocks:
        z = z + block.attn(F.layer_norm(z, (12,), block.norm1.weight, block.norm1.bias, 1e-2))
        hidden = F.linear(F.layer_norm(z, (12,), block.norm2.weight, block.norm2.bias, 1e-2), block.mlp.fc1.weight, block.mlp.fc1.bias)
        z = z + F.linear(hidden * torch.sigmoid(1.702 * hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
    z = F.layer_norm(z[:, 0], (12,), model.norm.weight, model.norm.bias, 1e-2)
    assert error(model(x), z @ model.head.weight.T) < 1e-12


# --- masked patch prediction ---


def test_masked_patches() -> None:
    """-1 keeps an embedding, -2 is the mask token, j that of patch j, before positions are added."""
    model, x = randomise(tiny(masked=True)), images(2, 12)
    corruption = torch.tensor([[-1, -2, 5, -1, -1, 5, -2, 0, -1], [-1] * 8 + [-2]])

    def reference(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        rows = []
        for image, changes in zip(x, corruption.tolist(), strict=True):
            own = [
                torch.einsum("cij,dcij->d", image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4], w["patch_embed.proj.weight"])
                + w["patch_embed.proj.bias"]
                for r in range(3)
                for c in range(3)
            ]
            put = [own[i] if j == -1 else w["mask_token"][0, 0] if j == -2 else own[j] for i, j in enumerate(changes)]
            rows.append(torch.stack([w["cls_token"][0, 0], *put]))
        z = torch.stack(rows) + w["pos_embed"]
        for i, block in enumerate(model.blocks):
            z = functional_call(block, {n.removeprefix(f"blocks.{i}."): p for n, p in w.items() if n.startswith(f"blocks.{i}.")}, (z,))
        z = F.layer_norm(z[:, 1:], (12,), w["norm.weight"], w["norm.bias"], 1e-6)
        logits = z @ w["mask_head.weight"].T + w["mask_head.bias"]
        return torch.cat([logits.flatten(), 0 * w["head.weight"].flatten() + 1, w["head.bias"]])

    def ours(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, dict(w), (x,), {"corruption": corruption})
        assert logits.shape == (2, 9, 512)
        return torch.cat([logits.flatten(), 0 * w["head.weight"].flatten() + 1, w["head.bias"]])

    model.head.requires_grad_(True)
    results = [function(dict(model.named_parameters()), x) for function in (ours, reference)]
    assert error(*results) < 1e-12
    gradients = []
    for y in results:
        names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
        gradients.append(torch.autograd.grad((y * seed).sum(), [model.get_parameter(name) for name in names]))
    assert max(error(a, b) for a, b in zip(*gradients, strict=True)) < 1e-12
    torch.testing.assert_close(model(x), randomise(tiny(masked=True))(x))  # without corruption a classifier as ever
    kept = torch.full((2, 9), -1)
    expected = tokens_of(model, x)[:, 1:] @ model.mask_head.weight.T + model.mask_head.bias
    torch.testing.assert_close(model(x, corruption=kept), expected)


def test_the_first_loss_of_masked_patches_is_ln_512() -> None:
    logits = tiny(masked=True)(images(2, 12).float(), corruption=torch.full((2, 9), -2))
    assert F.cross_entropy(logits.flatten(0, 1), torch.arange(18)).item() == pytest.approx(math.log(512), abs=1e-6)


# --- randomness ---


def test_randomness_is_of_training_alone() -> None:
    model, plain = (randomise(tiny(**o)).float() for o in ({"dropout": 0.5, "drop_path": 0.9}, {}))
    x = images(3, 12).float()
    assert torch.equal(model(x), plain(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_where_dropout_is() -> None:
    """After the position add and after every dense layer but query, key and value (appendix B.1): three places in a block."""
    model = randomise(tiny(dropout=0.25)).train()
    places: dict[str, list[float]] = {}

    def keep(name: str) -> object:
        return lambda module, inputs, out: places.setdefault(name, []).append(float(((out == 0) & (inputs[0] != 0)).double().mean()))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(keep(name))
    torch.manual_seed(0)
    model(images(200, 12))
    assert {name: len(zeros) for name, zeros in places.items()} == {
        "pos_drop": 1, "blocks.0.drop": 1, "blocks.0.mlp.drop": 2, "blocks.1.drop": 1, "blocks.1.mlp.drop": 2,
    }  # fmt: skip
    assert all(zeros == pytest.approx(0.25, abs=0.02) for each in places.values() for zeros in each)


def test_drop_path() -> None:
    drop, ones = DropPath(0.25), torch.ones(20_000, 3, 2)
    torch.manual_seed(0)
    out = drop(ones)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))  # a whole sample at once
    assert out.unique().tolist() == pytest.approx([0, 4 / 3]) and out.mean().item() == pytest.approx(1, abs=0.02)
    assert DropPath(0.0)(ones) is ones and drop.eval()(ones) is ones
    assert [b.drop_path.p for b in tiny(depth=5, drop_path=0.4).blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert tiny(depth=1, drop_path=0.4).blocks[0].drop_path.p == 0


def test_layer_scale_and_qk_norm() -> None:
    """A gain on each branch; queries and keys of a head with mean 0 and variance 1 before their own gain."""
    x = images(2, 6).reshape(2, 9, 12)
    scaled = tiny(layer_scale=1e-5)
    assert torch.equal(scaled.blocks[0].ls2.gamma, torch.full((12,), 1e-5))
    block, plain = (randomise(tiny(**o)).blocks[0] for o in ({"layer_scale": 0.1}, {}))
    plain.load_state_dict({name: p for name, p in block.state_dict().items() if name in plain.state_dict()})
    middle = x + block.ls1.gamma * plain.attn(plain.norm1(x))
    torch.testing.assert_close(block(x), middle + block.ls2.gamma * plain.mlp(plain.norm2(middle)))

    attention = randomise(tiny(qk_norm=True)).blocks[0].attn
    q, k, v = (part.view(2, 9, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=2))
    q = F.layer_norm(q, (4,), attention.q_norm.weight, attention.q_norm.bias, 1e-6)
    k = F.layer_norm(k, (4,), attention.k_norm.weight, attention.k_norm.bias, 1e-6)
    expected = ((q @ k.transpose(2, 3) / 2).softmax(dim=3) @ v).transpose(1, 2).reshape(2, 9, 12)
    assert error(attention(x), attention.proj(expected)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{}, {"pool": "gap"}, {"pool": "map"}, {"distilled": True}, {"positions": "relative", "pool": "gap"}, {"positions": "learned-2d", "positions_at": "layers"},
     {"representation": 4, "qk_norm": True, "layer_scale": 0.1}, {"stem": (1, 1), "patch": 8, "pixels": 24}],
)  # fmt: skip
def test_gradients_reach_every_parameter(options: dict[str, object]) -> None:
    model = randomise(tiny(**options))
    F.cross_entropy(model(images(3, model.options.pixels)), torch.tensor([0, 1, 2])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    penalised = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(tuple(model.unpenalised))}
    assert not [n for n in penalised if "token" in n or "pos_embed" in n]


# --- what does not go together ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 30}, "pixels: 30 is not a multiple of the patch, 4 pixels"),
        ({"heads": 5}, r"width: 12 is not a multiple of heads \(5\)"),
        ({"class_token": False}, "class_token: pool token needs one"),
        ({"pool": "map", "class_token": True}, "class_token: pool map looks at the patches alone"),
        ({"distilled": True, "pool": "gap"}, "distilled: needs pool token"),
        ({"distilled": True, "representation": 4}, "distilled: has two heads of its own"),
        ({"distilled": True, "masked": True}, "distilled: does not go together with masked"),
        ({"fc_norm": True, "masked": True}, "fc_norm: leaves the tokens without a norm"),
        ({"positions": "none", "positions_at": "layers"}, "positions_at: there are no positions"),
        ({"positions": "relative", "positions_at": "shared"}, "positions_at: relative positions are in every block already"),
        ({"positions": "sincos-2d", "positions_at": "layers"}, "positions_at: fixed ones are the same everywhere"),
        ({"positions": "sincos-2d", "width": 6}, "width: 6 is not a multiple of 4"),
        ({"positions": "learned-2d", "width": 15}, "width: 15 is odd"),
        ({"head_bias": False, "head_bias_init": -10}, "head_bias_init: the head has no bias"),
        ({"stem": (3, 4, 9)}, "patch: 4 is not a multiple of the stem's stride, 16 pixels"),
        ({"dropout": 1.0}, "dropout: 1.0 should be less than 1"),
        ({"depth": 0}, "depth: 0 should be greater than 0"),
        ({"stem": 3}, "stem: 3 should be a list$"),
        ({"stem": []}, "stem: should have at least 1 item$"),
        ({"depth": "two"}, "depth: 'two' should be a valid integer"),
        ({"pool": "max"}, "pool: 'max' "),
        ({"resize": "nearest"}, "resize: 'nearest' "),
        ({"drop_pth": 0.1}, r"drop_pth: no such key, did you mean 'drop_path'\? \(allowed: name, activation"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    for refuse in (check_model, lambda name, options, where: create(name, **options)):
        with pytest.raises(ConfigError, match=f"model.{message}"):
            refuse("vit", {**TINY, **options}, "model")
