from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from pipeline.config.inputs import Image
from pipeline.stream.mixing import Mix, _beta, draw_mix, mixed
from pipeline.stream.random import Random

BOTH = Image(pixels=64, mixup=0.8, cutmix=1.0)


def test_nothing_to_mix() -> None:
    assert draw_mix(Image(), 0, 0, 0) is None
    images = torch.rand(2, 3, 4, 4)
    assert mixed(images, None) is images


def test_a_mix_depends_on_its_key_alone() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    mixes = [draw_mix(BOTH, *key) for key in keys]
    torch.rand(3)
    assert [draw_mix(BOTH, *key) for key in keys[::-1]] == mixes[::-1]
    assert len({m.lam for m in mixes if m}) == len(keys)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 1.5, 4.0])
def test_mixup_draws_from_beta(alpha: float) -> None:
    mixes = [draw_mix(Image(mixup=alpha), 7, 0, n) for n in range(4000)]
    assert all(m is not None and m.box is None for m in mixes)
    lam = np.array([m.lam for m in mixes if m])
    assert lam.min() >= 0 and lam.max() <= 1 and lam.mean() == pytest.approx(0.5, abs=0.03)
    assert scipy.stats.kstest(lam, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1e3])
def test_extreme_distributions(alpha: float) -> None:
    lam = np.array([_beta(alpha, Random(n)) for n in range(500)])
    assert np.isfinite(lam).all() and lam.min() >= 0 and lam.max() <= 1
    assert lam.mean() == pytest.approx(0.5, abs=0.08) and lam.var() == pytest.approx(0.25 / (2 * alpha + 1), abs=0.02)


@pytest.mark.parametrize("pixels", [224, 31, 1])
def test_cutmix_boxes(pixels: int) -> None:
    """Inside the picture, of the area that `lam` says; as often and as large as an independent simulation has them."""
    mixes = [m for n in range(4000) if (m := draw_mix(Image(pixels=pixels, cutmix=1.0), 3, 0, n))]
    boxes = np.array([m.box for m in mixes])
    top, left, h, w = boxes.T
    assert len(mixes) == 4000 and (boxes >= 0).all() and (top + h <= pixels).all() and (left + w <= pixels).all()
    assert all(m.lam == pytest.approx(1 - b[2] * b[3] / pixels**2, abs=1e-12) for m, b in zip(mixes, boxes.tolist(), strict=True))
    random = np.random.default_rng(0)
    side = (pixels * np.sqrt(random.uniform(size=(100_000, 1)))).astype(int)
    start = random.integers(pixels, size=(100_000, 2)) - side // 2
    cut = np.minimum(pixels, start + side) - np.maximum(0, start)
    expected = 1 - cut.prod(axis=1) / pixels**2
    lam = np.array([m.lam for m in mixes])
    assert lam.mean() == pytest.approx(expected.mean(), abs=0.02) and lam.std() == pytest.approx(expected.std(), abs=0.02)
    if pixels > 1:
        assert ((top == 0) | (top + h == pixels)).mean() == pytest.approx(
            ((start[:, 0] <= 0) | (start + side >= pixels)[:, 0]).mean(), abs=0.03
        )
        assert (h != w).any()  # the border cut it


def test_both_is_the_toss_of_a_coin() -> None:
    mixes = [draw_mix(BOTH, 0, 0, n) for n in range(2000)]
    boxes = sum(m is not None and m.box is not None for m in mixes)
    assert 900 < boxes < 1100
    assert scipy.stats.kstest([m.lam for m in mixes if m and m.box is None], scipy.stats.beta(0.8, 0.8).cdf).pvalue > 0.01


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize(
    "mix", [Mix(0.3), Mix(1.0), Mix(0.0), Mix(1 - 6 / 64, (1, 5, 2, 3)), Mix(1.0, (3, 3, 0, 0)), Mix(0.0, (0, 0, 8, 8))]
)
def test_mixed(mix: Mix, count: int) -> None:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    got = mixed(images, mix)
    assert torch.equal(images, before) and got.dtype == images.dtype and got.shape == images.shape
    for i in range(count):
        own, partner = images[i].double(), images[count - 1 - i].double()
        if mix.box is None:
            expected = mix.lam * own + (1 - mix.lam) * partner
        else:
            top, left, height, width = mix.box
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[top : top + height, left : left + width] = True
            expected = torch.where(inside, partner, own)
            assert inside.double().mean().item() == pytest.approx(1 - mix.lam)
        torch.testing.assert_close(got[i].double(), expected, rtol=0, atol=1e-6 if mix.box is None else 0)


def test_a_mix_of_solid_pictures_has_the_shares_it_names() -> None:
    """Drawn and applied: black and white mixed have `lam` as their mean."""
    images = torch.stack([torch.ones(3, 64, 64), torch.zeros(3, 64, 64)])
    kinds = set()
    for n in range(40):
        mix = draw_mix(BOTH, 0, 0, n)
        assert mix is not None
        kinds.add(mix.box is None)
        means = mixed(images, mix).mean(dim=(1, 2, 3)).tolist()
        assert means == pytest.approx([mix.lam, 1 - mix.lam], abs=1e-4)
    assert kinds == {True, False}


def test_mixed_keeps_half_precision() -> None:
    images = torch.randn(4, 3, 8, 8).bfloat16()
    got = mixed(images, Mix(0.7))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), 0.7 * images.float() + 0.3 * images.float().flip(0), rtol=0.01, atol=0.02)
