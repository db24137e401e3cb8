"""The plain ResNet, and the stem of the hybrid Vision Transformers."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from residual import SHAPES, Function, images, largest_error, randomise, saved_numbers
from transformers import BitConfig, BitModel, ResNetConfig, ResNetForImageClassification

from pipeline.models import create
from pipeline.models.hybrid import HybridEmbed
from pipeline.models.model import flops
from pipeline.models.resnet import BatchNorm, ResNet, ResNetOptions

STEM = (2, 1)


def tiny(depths: tuple[int, ...] = (2, 1), classes: int = 5, width: int = 8, **options: object) -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetOptions(depths=depths, classes=classes, width=width, pixels=33, **options)).double()


def stem(patch: int = 8, numerics: str = "google") -> HybridEmbed:
    torch.manual_seed(0)
    return HybridEmbed(STEM, patch, 24, numerics).double()


@pytest.mark.parametrize(("name", "count"), [("resnet50", 25_557_032), ("resnet101", 44_549_160), ("resnet152", 60_192_808)])
def test_parameters(name: str, count: int) -> None:
    model = create(name, device="meta")
    assert model.parameter_count == count


def test_shapes() -> None:
    model = create("resnet50", device="meta")
    assert model.features(*model.example(2)).shape == (2, 2048)
    assert model(*model.example(2)).shape == (2, 1000)
    assert flops(model) == pytest.approx(2 * 4.09e9, rel=1e-3)  # multiply-adds with the stride on the 3x3, as torchvision states them
    headless = create("resnet50", device="meta", classes=0)
    assert headless.parameter_count == 25_557_032 - 1000 * 2049
    assert headless(*headless.example(2)).shape == (2, 2048)


def test_parameters_of_the_hybrid_stem() -> None:
    """R50+ViT-B/16 has 98,659,112 with its head: ViT-B/16's 86,567,656, with the stem's for those of 16x16 patches."""
    with torch.device("meta"):
        embed = HybridEmbed((3, 4, 9), 16, 768)
        large = HybridEmbed((3, 4, 6, 3), 32, 1024)
    assert sum(p.numel() for p in embed.parameters()) == 98_659_112 - 86_567_656 + (16 * 16 * 3 + 1) * 768
    assert embed(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 14 * 14, 768)
    assert large(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 7 * 7, 1024)
    assert (embed.side(224), large.side(224), embed.side(225)) == (14, 7, 15)
    with pytest.raises(ValueError, match="patch: 24 is not a multiple of 16"):
        HybridEmbed((3, 4, 9), 24, 768)


def test_names_are_those_of_torchvision() -> None:
    def norm(name: str) -> set[str]:
        return {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

    wanted = {"conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"}
    for block, first in (("layer1.0", True), ("layer1.1", False), ("layer2.0", True)):
        for i in (1, 2, 3):
            wanted |= {f"{block}.conv{i}.weight", *norm(f"{block}.bn{i}")}
        if first:
            wanted |= {f"{block}.downsample.0.weight", *norm(f"{block}.downsample.1")}
    assert set(tiny().state_dict()) == wanted


def test_names_of_the_stem_are_those_of_timm() -> None:
    wanted = {"proj.weight", "proj.bias"} | {f"backbone.stem.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")}
    for block, first in (("0.blocks.0", True), ("0.blocks.1", False), ("1.blocks.0", True)):
        prefix = f"backbone.stages.{block}"
        wanted |= {f"{prefix}.conv{i}.weight" for i in (1, 2, 3)} | {f"{prefix}.norm{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")}
        wanted |= {f"{prefix}.downsample.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")} if first else set()
    assert set(stem().state_dict()) == wanted


def reference(state: dict[str, torch.Tensor], depths: tuple[int, ...], training: bool) -> Function:
    """arXiv 1512.03385, figure 5 (right) and table 1, with the normalisation of arXiv 1502.03167, algorithms 1 and 2."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).pow(2).mean((0, 2, 3))
        y = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def convolve(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        w = state[f"{name}.weight"]
        return F.conv2d(F.pad(x, (w.shape[2] // 2,) * 4), w, stride=stride)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.pad(norm(convolve(x, "conv1", 2), "bn1").clamp(min=0), (1, 1, 1, 1)), 3, 2)
        for s, depth in enumerate(depths):
            for b in range(depth):
                name, stride = f"layer{s + 1}.{b}", 2 if s > 0 and b == 0 else 1
                y = norm(convolve(x, f"{name}.conv1"), f"{name}.bn1").clamp(min=0)
                y = norm(convolve(y, f"{name}.conv2", stride), f"{name}.bn2").clamp(min=0)
                y = norm(convolve(y, f"{name}.conv3"), f"{name}.bn3")
                x = norm(convolve(x, f"{name}.downsample.0", stride), f"{name}.downsample.1") if b == 0 else x
                x = (x + y).clamp(min=0)
        return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]

    return forward


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_by_hand(shape: tuple[int, int, int, float], training: bool) -> None:
    model = tiny().train(training)
    randomise(model)
    parameters = dict(model.named_parameters())
    by_hand = reference({**parameters, **{k: v.clone() for k, v in model.named_buffers()}}, (2, 1), training)
    assert largest_error(model, by_hand, images(*shape), parameters, parameters) < 1e-12


def peer_of(model: ResNet) -> tuple[ResNetForImageClassification, dict[str, str]]:
    """The same network of `transformers`, with this one's weights, and the names that each tensor has there."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[32, 64], depths=[2, 1], num_labels=5)
    peer, names = ResNetForImageClassification(config).double(), {}
    for name in peer.state_dict():
        ours = name.replace("classifier.1", "fc").replace("resnet.embedder.embedder.convolution", "conv1")
        ours = ours.replace("resnet.embedder.embedder.normalization", "bn1")
        if found := re.match(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(.*)", ours):
            stage, block, rest = found.groups()
            rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
            rest = re.sub(r"layer\.(\d)\.(\w+)", lambda m: ("conv" if m[2] == "convolution" else "bn") + str(int(m[1]) + 1), rest)
            ours = f"layer{int(stage) + 1}.{block}.{rest}"
        names[ours] = name
    state = model.state_dict()
    peer.load_state_dict({there: state[ours] for ours, there in names.items()})
    assert set(names) == set(state)
    return peer, names


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_transformers(shape: tuple[int, int, int, float], training: bool) -> None:
    model = tiny().train(training)
    randomise(model)
    peer, names = peer_of(model)
    peer.train(training)
    parameters, theirs = dict(model.named_parameters()), dict(peer.named_parameters())
    others = {name: theirs[names[name]] for name in parameters}
    assert largest_error(model, lambda x: peer(x).logits, images(*shape), parameters, others) < 1e-12
    buffers, wanted = dict(model.named_buffers()), dict(peer.named_buffers())
    assert all(torch.allclose(buffers[n], wanted[names[n]], rtol=1e-12, atol=1e-12) for n in buffers)


def stem_by_hand(p: dict[str, torch.Tensor]) -> Function:
    """Post-activated bottlenecks, SAME padding, filters divided by deviation + 1e-5, GroupNorm with 1e-6: Google's JAX code."""

    def pad(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
        sides = []
        for size in (x.shape[3], x.shape[2]):
            total = max(kernel - (size % stride or stride), 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)

    def convolve(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        w = p[f"{name}.weight"]
        centred = w - w.mean((1, 2, 3), keepdim=True)
        w = centred / (centred.pow(2).mean((1, 2, 3), keepdim=True).sqrt() + 1e-5)
        return F.conv2d(pad(x, w.shape[2], stride), w, stride=stride)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        groups = x.reshape(x.shape[0], 32, -1)
        centred = groups - groups.mean(2, keepdim=True)
        y = (centred / (centred.pow(2).mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        return y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = norm(convolve(x, "backbone.stem.conv", 2), "backbone.stem.norm").clamp(min=0)
        x = F.max_pool2d(pad(x, 3, 2), 3, 2)
        for s, depth in enumerate(STEM):
            for b in range(depth):
                name, stride = f"backbone.stages.{s}.blocks.{b}", 2 if s > 0 and b == 0 else 1
                y = norm(convolve(x, f"{name}.conv1"), f"{name}.norm1").clamp(min=0)
                y = norm(convolve(y, f"{name}.conv2", stride), f"{name}.norm2").clamp(min=0)
                y = norm(convolve(y, f"{name}.conv3"), f"{name}.norm3")
                x = norm(convolve(x, f"{name}.downsample.conv", stride), f"{name}.downsample.norm") if b == 0 else x
                x = (x + y).clamp(min=0)
        k = p["proj.weight"].shape[2]
        patches = F.unfold(x, k, stride=k).transpose(1, 2)
        return patches @ p["proj.weight"].flatten(1).T + p["proj.bias"]

    return forward


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_stem_by_hand(shape: tuple[int, int, int, float], patch: int) -> None:
    embed = stem(patch)
    randomise(embed)
    parameters, x = dict(embed.named_parameters()), images(*shape)
    assert embed(x).shape == (shape[0], embed.side(shape[1]) * embed.side(shape[2]), 24)
    assert largest_error(embed, stem_by_hand(parameters), x, parameters, parameters) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_parity_of_the_stem_with_transformers(shape: tuple[int, int, int, float]) -> None:
    """With the constants that timm's and Hugging Face's checkpoints were made for."""
    backbone = stem(numerics="timm").backbone
    randomise(backbone)
    config = BitConfig(
        depths=[2, 1], hidden_sizes=[256, 512], layer_type="bottleneck", global_padding="SAME", embedding_dynamic_padding=True
    )
    peer = BitModel(config).double()
    mine, others = dict(backbone.named_parameters()), dict(peer.named_parameters())
    peer.load_state_dict(dict(zip(others, mine.values(), strict=True)))
    others = dict(zip(mine, others.values(), strict=True))
    assert largest_error(backbone, lambda x: peer(x).last_hidden_state, images(*shape), mine, others) < 1e-12


def test_initialisation() -> None:
    model = tiny(width=64, classes=1000)
    assert model.layer1[0].conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02) and not model.fc.bias.any()
    gains = {name: p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("weight")}
    assert all(bool(gain.any()) != name.endswith("bn3.weight") for name, gain in gains.items())
    assert all(block.bn3.weight.eq(1).all() for block in tiny(zero_init_residual=False).layer1)
    embed = stem()
    for stage in embed.backbone.stages:
        assert all(not block.norm3.weight.any() and block.norm2.weight.eq(1).all() for block in stage.blocks)


def test_batch_norm_learns_in_training_and_holds_in_evaluation() -> None:
    model, x = tiny(), images(4, 33, 33)
    randomise(model)
    first = model.train()(x)
    assert torch.equal(model(x), first)  # of the micro-batch alone
    assert not torch.allclose(model(x[:2]), first[:2])
    held = model.eval()(x)
    assert not torch.allclose(held, first)
    torch.testing.assert_close(model(x[:2]), held[:2], rtol=1e-12, atol=1e-12)
    assert model.bn1.num_batches_tracked == 3
    norm = BatchNorm(3).double()
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


def test_batch_norm_keeps_its_statistics_in_16_bits() -> None:
    """Where they are nearly right already, steps of a tenth vanish in bf16."""
    x = images(4, 33, 33) * 2 + 5
    norm, plain = BatchNorm(3).bfloat16(), torch.nn.BatchNorm2d(3).double()
    assert (norm.weight.dtype, norm.running_mean.dtype, norm.running_var.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for _ in range(60):
        y, wanted = norm(x.bfloat16()), plain(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.running_mean.double(), plain.running_mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.running_var.double(), plain.running_var, rtol=1e-3, atol=0)
    assert norm.num_batches_tracked == 60
    torch.testing.assert_close(norm.eval()(x.bfloat16()).double(), plain.eval()(x), rtol=0.03, atol=0.03)
    x = x.bfloat16().requires_grad_()
    norm.train()(x).square().sum().backward()
    assert norm.weight.grad.any() and norm.bias.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16(training: bool) -> None:
    model, x = tiny().train(training), images(4, 50, 50)
    randomise(model)
    exact = model(x)
    rounded = model.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_bfloat16_of_the_stem() -> None:
    embed, x = stem(), images(2, 50, 50)
    randomise(embed)
    exact = embed(x)
    assert 0 < (embed.bfloat16()(x.bfloat16()).double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_compiled() -> None:
    model, x = tiny(depths=(1,)), images(2, 33, 33)
    randomise(model)
    twin = tiny(depths=(1,))
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(twin)(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.bn1.running_var, model.bn1.running_var, rtol=1e-12, atol=1e-12)


def test_activations() -> None:
    model = ResNet(ResNetOptions(depths=(2, 1), classes=5, width=16, pixels=96)).to("meta")
    assert model.activations() == pytest.approx(saved_numbers(model, lambda n: model.example(n)[0]), rel=0.05)
    embed = HybridEmbed(STEM, 8, 24).to("meta")
    # Lopsided padding copies what it pads.
    assert embed.activations(224) == pytest.approx(saved_numbers(embed, lambda n: torch.zeros(n, 3, 224, 224, device="meta")), rel=0.05)


def test_adapts_to_other_classes_and_pixels() -> None:
    trained, other = tiny().eval(), tiny(classes=3).eval()
    randomise(trained)
    other.load_state_dict(other.adapt(trained.state_dict()))
    assert not other.fc.weight.any() and not other.fc.bias.any()
    x = images(2, 40, 40)
    assert torch.equal(other.features(x), trained.features(x))
    headless = tiny(classes=0).eval()
    headless.load_state_dict(headless.adapt(trained.state_dict()))
    assert torch.equal(headless(x), trained.features(x))
    same = tiny().eval()
    same.load_state_dict(same.adapt(trained.state_dict()))
    assert torch.equal(same(x), trained(x))
