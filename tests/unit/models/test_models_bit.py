from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from residual import SHAPES, Function, images, largest_error, randomise, saved_numbers
from transformers import BitConfig, BitForImageClassification

from pipeline.models import create
from pipeline.models.bit import NUMERICS, BiT, BiTOptions
from pipeline.models.convnet import plan_blocks
from pipeline.models.hybrid import HybridEmbed, Numerics, StdConv, same_padding

GOOGLE = Numerics(1e-10, True, 1e-5)


def tiny(depths: tuple[int, ...] = (2, 1), classes: int = 5, **options: object) -> BiT:
    torch.manual_seed(0)
    return BiT(BiTOptions(depths=depths, classes=classes, pixels=33, **options)).double()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bit_r50x1", 25_549_352),
        ("bit_r50x3", 217_319_080),
        ("bit_r101x1", 44_541_480),
        ("bit_r101x3", 387_934_888),
        ("bit_r152x2", 236_335_208),
        ("bit_r152x4", 936_533_224),
    ],
)
def test_parameters(name: str, count: int) -> None:
    model = create(name, device="meta")
    assert model.parameter_count == count


def test_shapes() -> None:
    model = create("bit_r50x3", device="meta")
    assert model.features(*model.example(2)).shape == (2, 6144)
    assert model(*model.example(2)).shape == (2, 1000)
    headless = create("bit_r50x3", device="meta", classes=0)
    assert headless.parameter_count == 217_319_080 - 1000 * 6145
    assert headless(*headless.example(2)).shape == (2, 6144)


def test_names_are_those_of_timm() -> None:
    blocks = {
        f"stages.{block}.{name}"
        for block, channels in (("0.blocks.0", True), ("0.blocks.1", False), ("1.blocks.0", True))
        for name in [*(f"norm{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")), *(f"conv{i}.weight" for i in (1, 2, 3))]
        + ["downsample.conv.weight"] * channels
    }
    assert set(tiny().state_dict()) == blocks | {"stem.conv.weight", "norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert tiny().head.fc.weight.shape == (5, 512, 1, 1)


def standardise(w: torch.Tensor) -> torch.Tensor:
    """Weight standardisation (arXiv 1903.10520, section 3), with BiT's constant."""
    n = w[0].numel()
    mean = w.sum((1, 2, 3), keepdim=True) / n
    variance = ((w - mean) ** 2).sum((1, 2, 3), keepdim=True) / n
    return (w - mean) / (variance + 1e-10).sqrt()


def activate(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Group norm (arXiv 1803.08494, equation 7), and ReLU."""
    b, c, h, w = x.shape
    groups = x.reshape(b, 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    y = (centred / (centred.pow(2).mean(2, keepdim=True) + 1e-5).sqrt()).reshape(b, c, h, w)
    return torch.clamp(y * gain[:, None, None] + bias[:, None, None], min=0)


def reference(p: dict[str, torch.Tensor], depths: tuple[int, ...]) -> Function:
    """Section 2.1 of arXiv 1912.11370 with the blocks of arXiv 1603.05027, figure 4e; padded as the authors' PyTorch code does."""

    def convolve(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        w = standardise(p[f"{name}.weight"])
        half = w.shape[2] // 2
        return F.conv2d(F.pad(x, (half,) * 4), w, stride=stride)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return activate(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.pad(convolve(x, "stem.conv", 2), (1, 1, 1, 1)), 3, 2)
        for s, depth in enumerate(depths):
            for b in range(depth):
                name, stride = f"stages.{s}.blocks.{b}", 2 if s > 0 and b == 0 else 1
                y = norm(x, f"{name}.norm1")
                x = convolve(y, f"{name}.downsample.conv", stride) if b == 0 else x
                y = convolve(norm(convolve(y, f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2", stride)
                x = x + convolve(norm(y, f"{name}.norm3"), f"{name}.conv3")
        pooled = norm(x, "norm").mean((2, 3))
        return pooled @ p["head.fc.weight"][:, :, 0, 0].T + p["head.fc.bias"]

    return forward


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_by_hand(shape: tuple[int, int, int, float]) -> None:
    model = tiny()
    randomise(model)
    parameters = dict(model.named_parameters())
    assert largest_error(model, reference(parameters, (2, 1)), images(*shape), parameters, parameters) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_transformers(shape: tuple[int, int, int, float]) -> None:
    model = tiny(numerics="timm")
    randomise(model)
    peer = BitForImageClassification(BitConfig(depths=[2, 1], hidden_sizes=[256, 512], num_labels=5)).double()
    mine, others = dict(model.named_parameters()), dict(peer.named_parameters())
    assert len(mine) == len(others)
    peer.load_state_dict({name: value.reshape(others[name].shape) for name, value in zip(others, mine.values(), strict=True)})
    # Both in the same order; the head is a 1x1 convolution here, and linear there.
    order = dict(zip(mine, others.values(), strict=True))
    del mine["head.fc.weight"], order["head.fc.weight"]
    assert largest_error(model, lambda x: peer(x).logits, images(*shape), mine, order) < 1e-12


def test_first_loss_is_ln_of_the_classes() -> None:
    logits = tiny(classes=7)(images(3, 33, 33))
    assert torch.equal(logits, torch.zeros(3, 7, dtype=torch.float64))
    assert F.cross_entropy(logits, torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7), abs=1e-12)


@pytest.mark.parametrize("numerics", [GOOGLE, NUMERICS["timm"], Numerics(1e-5, False, 1e-6)])
def test_standardised_filters(numerics: Numerics) -> None:
    conv = StdConv(8, 16, 3, 1, numerics, same=False).double()
    filters = conv.standardised()
    torch.testing.assert_close(filters.mean((1, 2, 3)), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)
    variance = conv.weight.var((1, 2, 3), correction=0)
    wanted = variance / (variance + numerics.conv) if numerics.on_variance else variance / (variance.sqrt() + numerics.conv) ** 2
    torch.testing.assert_close(filters.var((1, 2, 3), correction=0), wanted, rtol=1e-12, atol=0)
    with torch.no_grad():
        conv.weight.mul_(torch.linspace(2, 9, 16)[:, None, None, None]).add_(torch.linspace(-1, 1, 16)[:, None, None, None])
    torch.testing.assert_close(conv.standardised(), filters, rtol=0, atol=1e-3 if not numerics.on_variance else 1e-5)
    assert not torch.equal(conv.standardised(), filters)  # the constant is there


def test_scale_and_shift_of_a_filter_change_nothing() -> None:
    model, x = tiny(), images(2, 33, 33)
    randomise(model)
    before = model(x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StdConv):
                module.weight.mul_(3).add_(0.5)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model.stages[0].blocks[0].conv2.weight[0, 0, 0, 0] += 1
    assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("size", range(1, 19))
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_same_padding(size: int, kernel: int, stride: int) -> None:
    """TensorFlow's documented rule, and sums over windows by index."""
    total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
    assert same_padding(size, kernel, stride) == (total // 2, total - total // 2)
    conv = StdConv(3, 1, kernel, stride, GOOGLE, same=True).double().requires_grad_(False)
    image = images(1, size, 5)
    out, filters = conv(image), conv.standardised()[0]
    left = max(kernel - (5 % stride or stride), 0) // 2
    assert out.shape == (1, 1, math.ceil(size / stride), math.ceil(5 / stride))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            places = [(i, j, row * stride + i - total // 2, column * stride + j - left) for i in range(kernel) for j in range(kernel)]
            by_index = sum(filters[:, i, j] @ image[0, :, y, x] for i, j, y, x in places if 0 <= y < size and 0 <= x < 5)
            assert out[0, 0, row, column].item() == pytest.approx(by_index.item(), abs=1e-12)


def test_plan_of_the_blocks() -> None:
    assert plan_blocks((2, 1), 64) == [[(64, 64, 1), (256, 64, 1)], [(256, 128, 2)]]


def test_bfloat16() -> None:
    model = tiny()
    randomise(model)
    x = images(2, 50, 50)
    exact = model(x)
    rounded = model.bfloat16()(x.bfloat16()).double()
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_compiled() -> None:
    model = tiny(depths=(1,))
    randomise(model)
    x = images(2, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pixels", [64, 96])
def test_activations(pixels: int) -> None:
    model = BiT(BiTOptions(depths=(2, 1), classes=5, pixels=pixels))
    model = model.to("meta")
    assert model.activations() == pytest.approx(saved_numbers(model, lambda n: model.example(n)[0]), rel=0.05)


def test_adapts_to_other_classes_and_pixels() -> None:
    trained, other = tiny(), tiny(classes=3)
    randomise(trained)
    state = other.adapt(trained.state_dict())
    assert other.load_state_dict(state)
    assert not other.head.fc.weight.any() and not other.head.fc.bias.any()
    x = images(2, 40, 40)
    assert torch.equal(other.features(x), trained.features(x))
    same = tiny()
    same.load_state_dict(same.adapt(trained.state_dict()))
    assert torch.equal(same(x), trained(x))
    headless = tiny(classes=0)
    headless.load_state_dict(headless.adapt(trained.state_dict()))
    assert torch.equal(headless(x), trained.features(x))
    back = tiny(classes=4)
    back.load_state_dict(back.adapt(headless.state_dict()))
    assert torch.equal(back.features(x), headless(x)) and not back(x).any()


def test_filters_begin_as_lecun() -> None:
    weight = HybridEmbed((1,), 4, 96).backbone.stages[0].blocks[0].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.02)
    assert weight.abs().max() < 2.3 * math.sqrt(1 / (64 * 9))
