"""The masked autoencoder against transformers' ViTMAEForPreTraining, and what the paper says of it."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from pipeline.core.errors import ConfigError
from pipeline.models import check_model, create
from pipeline.models.mae import MAE, targets
from pipeline.models.patches import patchify
from tests.unit.models.peers import BF16, error, images, in_transformers, largest_error, misfit, randomise
from tests.unit.models.residual import saved_numbers

TINY = {"width": 24, "depth": 2, "heads": 3, "mlp": 36, "patch": 4, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def tiny(pixels: int = 12, **options: object) -> MAE:
    model = create("mae", seed=0, **{**TINY, "pixels": pixels, **options})
    assert isinstance(model, MAE)
    return model


def noise(batch: int, patches: int) -> torch.Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(2))


def theirs(model: MAE, **changes: object) -> ViTMAEForPreTraining:
    o = model.options
    config = ViTMAEConfig(
        hidden_size=o.width, num_hidden_layers=o.depth, num_attention_heads=o.heads, intermediate_size=o.mlp, image_size=o.pixels,
        patch_size=o.patch, layer_norm_eps=o.eps, mask_ratio=o.mask, decoder_hidden_size=o.decoder_width,
        decoder_num_hidden_layers=o.decoder_depth, decoder_num_attention_heads=o.decoder_heads,
        decoder_intermediate_size=4 * o.decoder_width, attn_implementation="sdpa", **changes,
    )  # fmt: skip
    return ViTMAEForPreTraining(config).double().eval()


@pytest.mark.parametrize(
    ("options", "batch", "scale"),
    [({"pixels": 24, "patch": 8}, 3, 1.0), ({"pixels": 24, "patch": 8}, 3, 1e-3), ({"pixels": 35, "patch": 7, "mask": 0.6}, 2, 1.0)],
)
def test_parity(options: dict[str, object], batch: int, scale: float) -> None:
    model = randomise(tiny(**options))
    peer = theirs(model, norm_pix_loss=True)
    fixed = in_transformers(dict(model.named_buffers()))
    x, draw = images(batch, model.options.pixels, scale), noise(batch, model.options.side**2)

    def reference(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(peer, {**in_transformers(parameters), **fixed}, (x,), {"noise": draw}, strict=True).logits

    def ours(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x, draw))[0]

    assert largest_error(model, reference, x, ours) <= 1e-12
    peer.load_state_dict(in_transformers(model.state_dict()), strict=True)
    expected = peer(x, noise=draw)
    predictions, mask = model(x, draw)
    assert torch.equal(mask, expected.mask) and int((1 - mask).sum()) == batch * model.options.seen
    loss = ((predictions - targets(x, model.options.patch)) ** 2).mean(dim=2)
    torch.testing.assert_close((loss * mask).sum() / mask.sum(), expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("side", "width"), [(3, 24), (5, 8)])
def test_fixed_positions_are_those_of_transformers(side: int, width: int) -> None:
    """[columns, rows], the order of the published weights; transformers' function has the rows first."""
    rows_first = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True, dtype=torch.float64)
    model = tiny(pixels=4 * side, width=width, heads=2)
    expected = torch.cat([rows_first[:, width // 2 :], rows_first[:, : width // 2]], dim=1)[None].float()
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=1e-7)


def test_targets() -> None:
    """Each patch by hand: the unbiased variance, and 1e-6."""
    x = images(2, 8)
    for b, row, column in ((0, 0, 1), (1, 1, 0)):
        patch = x[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).reshape(48)
        assert torch.equal(patchify(x, 4)[b, 2 * row + column], patch)
        variance = ((patch - patch.sum() / 48) ** 2).sum() / 47
        torch.testing.assert_close(targets(x, 4)[b, 2 * row + column], (patch - patch.sum() / 48) / (variance + 1e-6).sqrt())
    assert torch.equal(targets(torch.ones(1, 3, 8, 8), 4), torch.zeros(1, 4, 48))
    assert torch.equal(targets(x, 4, normalise=False), theirs(tiny(8)).patchify(x))


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("mae_b16", {}, 111_655_680),
        ("mae_l16", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}, 329_239_296),
        ("mae_h14", {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14}, 656_613_964),
    ],
)  # fmt: skip
def test_parameters(name: str, config: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        peer = ViTMAEForPreTraining(ViTMAEConfig(**config))
    model = create(name, device="meta")
    assert model.parameter_count == count == sum(p.numel() for p in peer.parameters() if p.requires_grad)
    assert sum(t.numel() for t in model.state_dict().values()) == sum(t.numel() for t in peer.state_dict().values())


def test_only_the_seen_patches_matter() -> None:
    """Of a masked patch nothing reaches the predictions; what is seen is a random quarter, another of each image."""
    model = randomise(tiny(pixels=16))
    x, draw = images(4, 16), noise(4, 16)
    predictions, mask = model(x, draw)
    assert mask.sum(dim=1).tolist() == [12.0] * 4 and len({tuple(row) for row in mask.tolist()}) > 1
    blank = mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    torch.testing.assert_close(model(x.masked_fill(blank, 7.0), draw)[0], predictions, rtol=0, atol=1e-12)
    assert error(model(x.masked_fill(~blank, 7.0), draw)[0], predictions) > 0.01


def test_features_are_the_class_token_of_all_patches() -> None:
    model = randomise(tiny())
    vit = create("vit", **{key: TINY[key] for key in ("width", "depth", "heads", "mlp", "patch")}, pixels=12, classes=0, seed=1).double()
    vit.load_state_dict(vit.adapt(model.state_dict()))
    assert model.features(images(3, 12)).shape == (3, 24)
    torch.testing.assert_close(model.features(images(3, 12)), vit.features(images(3, 12)), rtol=0, atol=1e-12)


def test_initialisation() -> None:
    w = tiny(width=256, decoder_width=256, patch=8, pixels=64, heads=4, mlp=1024).state_dict()
    for name, fan in (("blocks.0.attn.qkv.weight", 512), ("patch_embed.proj.weight", 448), ("decoder_embed.weight", 512)):
        bound = (6 / fan) ** 0.5  # xavier, of query, key and value each
        assert 0.99 * bound < w[name].abs().max() <= bound, name
    assert w["cls_token"].std().item() == pytest.approx(0.02, rel=0.2) and w["mask_token"].std().item() == pytest.approx(0.02, rel=0.2)


def test_adapts_to_other_pixels() -> None:
    model, larger = tiny(), tiny(pixels=24)
    larger.load_state_dict(larger.adapt(model.state_dict()))
    assert torch.equal(larger.pos_embed, tiny(pixels=24).pos_embed)
    assert torch.equal(larger.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)


def test_gradients_reach_every_parameter() -> None:
    model = tiny()
    predictions, mask = model(images(2, 12).float(), noise(2, 9))
    (((predictions - targets(images(2, 12).float(), 4)) ** 2).mean(dim=2) * mask).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fp32_and_compiled() -> None:
    exact = randomise(tiny(depth=1))
    x, draw = images(2, 12), noise(2, 9)
    expected = exact(x, draw)[0]
    single = tiny(depth=1)
    single.load_state_dict(exact.state_dict())
    assert error(single(x.float(), draw)[0].double(), expected) < 1e-5
    with torch.no_grad():
        assert error(torch.compile(single, fullgraph=True)(x.float(), draw)[0].double(), expected) < 1e-5


def test_bf16_is_within_its_rounding() -> None:
    """Of weights and images that bf16 holds exactly."""
    model, x, draw = randomise(tiny()).bfloat16(), images(4, 12).bfloat16(), noise(4, 9)
    half, expected = model(x, draw)[0], model.double()(x.double(), draw)[0]
    assert half.dtype == torch.bfloat16 and misfit(half, expected) < BF16
    with torch.autocast("cpu", torch.bfloat16):
        assert misfit(model.float()(x.float(), draw)[0], expected) < BF16


def test_activations() -> None:
    model = tiny(pixels=32)
    kept = saved_numbers(lambda arguments: model(*arguments)[0], model.example)
    assert model.activations() == pytest.approx(kept, rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 30}, "model.pixels: 30 is not a multiple of the patch, 4 pixels"),
        ({"decoder_heads": 3}, r"model.decoder_width: 16 is not a multiple of decoder_heads \(3\)"),
        ({"width": 6}, "model.width: 6 is not a multiple of 4"),
        ({"mask": 0.95}, "model.mask: 0.95 of 9 patches leaves none to see"),
        ({"mask": 0.0}, "model.mask: 0.0 of 9 patches hides none"),
        ({"mask": 1.0}, "model.mask: 1.0 should be less than 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model("mae", {**TINY, "pixels": 12, **options})


def test_positions_are_not_rounded_in_16_bits() -> None:
    model = create("mae", pixels=8, patch=4, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, seed=0)
    exact = model.pos_embed.clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    model = model.bfloat16()
    assert torch.equal(model.pos_embed, exact) and model.cls_token.dtype == torch.bfloat16
    predicted, _ = model(torch.randn(2, 3, 8, 8).bfloat16(), torch.rand(2, 4))
    assert predicted.dtype == torch.bfloat16 and model.double().pos_embed.dtype == torch.float64
