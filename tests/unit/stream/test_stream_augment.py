from __future__ import annotations

import io
import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap

import numpy as np
import pytest
import torch
from photographs import encoded, photograph, photographs
from PIL import Image as Picture

from pipeline.config.inputs import Image, RandAugment
from pipeline.stream.augment import _flipped, _resized_crop, training_view
from pipeline.stream.decode import decode, evaluation_view
from pipeline.stream.random import Random

DEIT = {"color_jitter": 0.3, "rand_augment": RandAugment(), "erase": 0.25, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def view(data: bytes, how: Image, *key: int) -> torch.Tensor:
    out = torch.empty(how.pixels, how.pixels, 3, dtype=torch.uint8)
    training_view(data, how, Random(*key), out)
    return out


def solid(level: int, size: int = 64) -> bytes:
    return encoded(Picture.new("RGB", (size, size), (level,) * 3), "PNG")


def test_random_resized_crop_statistics() -> None:
    how = Image(pixels=16, scale=(0.2, 0.8), ratio=(0.5, 2.0))
    height, width = 200, 300
    boxes = np.array([_resized_crop(height, width, how, Random(0, 0, n)) for n in range(3000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    assert 0.195 < area.min() < 0.22 and area.max() < 0.81
    assert 0.48 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.05
    fits = area < 0.3  # large crops that do not fit are drawn again, which bends the statistics; small ones always fit
    assert abs(np.log(ratio[fits]).mean()) < 0.06  # as many tall as wide ones
    assert len({tuple(b) for b in boxes}) > 2900
    free = (top[fits] / np.maximum(1, height - h[fits])).mean(), (left[fits] / np.maximum(1, width - w[fits])).mean()
    assert free == pytest.approx((0.5, 0.5), abs=0.05)


def test_a_crop_that_never_fits() -> None:
    """A strip of 100 x 1 holds no crop of these ratios: its centre is taken, as large as they allow."""
    assert _resized_crop(100, 2, Image(scale=(0.9, 1.0)), Random(0)) == (48, 0, 3, 2)
    assert _resized_crop(2, 100, Image(scale=(0.9, 1.0)), Random(0)) == (0, 48, 2, 3)


@pytest.mark.parametrize(("kind", "pixels"), [("PNG", 100), ("JPEG", 224), ("JPEG", 100), ("JPEG", 40)])
def test_the_crop_is_that_of_pillow(kind: str, pixels: int) -> None:
    """Against Pillow at full size, the box from the same draws. A JPEG may be decoded at 1/2, 1/4 or 1/8, where the view is no
    larger: then the decoder's filter makes a difference."""
    how = Image(pixels=pixels, flip=False)
    apart: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    for which, picture in enumerate(photographs()):
        data = encoded(picture, kind, **({"quality": 95} if kind == "JPEG" else {}))
        picture = Picture.open(io.BytesIO(data))
        for n in range(10):
            top, left, h, w = _resized_crop(picture.height, picture.width, how, Random(which, n))
            f = next(f for f in (8, 4, 2, 1) if f == 1 or (kind == "JPEG" and min(h, w) >= f * pixels))
            assert top % f == left % f == 0
            expected = picture.resize((pixels, pixels), Picture.Resampling.BICUBIC, (left, top, left + w, top + h))
            apart[f].append(np.abs(view(data, how, which, n).numpy().astype(int) - np.asarray(expected)).mean())
    for factor, found in apart.items():
        most, mean = (0.5, 0.4) if factor == 1 else (7, 3)
        assert not found or (max(found) < most and np.mean(found) < mean), (factor, found)
    factors = {factor for factor, found in apart.items() if found}
    assert factors == {("PNG", 100): {1}, ("JPEG", 224): {1, 2}, ("JPEG", 100): {1, 2, 4}, ("JPEG", 40): {2, 4, 8}}[kind, pixels]


@pytest.mark.parametrize("crop", ["random-resized", "random-square", "none"])
@pytest.mark.parametrize("extra", [{}, DEIT])
def test_a_view_depends_on_its_key_alone(crop: str, extra: dict) -> None:
    data, how = encoded(photograph(60, 40), "JPEG"), Image(pixels=16, crop=crop, **extra)  # type: ignore[arg-type]
    keys = [(1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1), (3, 2, 1, 0)]
    views = [view(data, how, *key) for key in keys]
    np.random.default_rng(0).random()
    torch.rand(3)
    assert all(torch.equal(view(data, how, *key), first) for key, first in zip(keys[::-1], views[::-1], strict=True))
    different = len({v.numpy().tobytes() for v in views})
    assert different == len(keys) if crop == "random-resized" or extra else different > 1


def test_threads_make_the_same_views() -> None:
    datas = [encoded(p, kind) for p in photographs() for kind in ("JPEG", "PNG")]
    how = Image(pixels=64, **DEIT)
    jobs = [(datas[n % len(datas)], how, 0, n) for n in range(48)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: view(*job), jobs))
    assert all(map(torch.equal, together, starmap(view, jobs)))


def test_only_the_given_rows_are_written() -> None:
    batch = torch.full((3, 32, 32, 3), 7, dtype=torch.uint8)
    for n in range(10):
        training_view(encoded(photograph(60, 40), "JPEG"), Image(pixels=32, **DEIT), Random(n), batch[1])
    assert (batch[0] == 7).all() and (batch[2] == 7).all() and not (batch[1] == 7).all()


def test_flips() -> None:
    data, how = encoded(photograph(16, 16), "PNG"), Image(pixels=16, crop="none")
    image = decode(data)
    views = [view(data, how, n) for n in range(400)]
    flipped = sum(torch.equal(v, image.flip(1)) for v in views)
    assert flipped + sum(torch.equal(v, image) for v in views) == 400 and 150 < flipped < 250
    assert all(torch.equal(view(data, Image(pixels=16, crop="none", flip=False), n), image) for n in range(20))


@pytest.mark.parametrize("threads", [1, 2])
def test_flips_start_no_threads(threads: int) -> None:
    """Whatever torch may do: the processor's time is this thread's, once those of earlier tests have gone to sleep."""
    image = np.random.default_rng(0).integers(0, 256, (301, 311, 3), dtype=np.uint8)[:, 5:306]  # a view, as a crop is
    ratios, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(9):
            process, own = time.process_time(), time.thread_time()
            for _ in range(100):
                out = _flipped(image)
            ratios.append((time.process_time() - process) / (time.thread_time() - own))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(out, image[:, ::-1]) and out.is_contiguous()
    assert np.median(ratios) < 1.1, ratios


def test_no_crop_is_the_view_of_evaluation() -> None:
    data = encoded(photographs()[0], "JPEG")
    assert torch.equal(view(data, Image(pixels=50, crop="none", flip=False), 0), evaluation_view(decode(data), 50))


def test_random_square_keeps_the_shorter_side() -> None:
    image = np.zeros((20, 50, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(50)  # every column says where it was
    data, how = encoded(Picture.fromarray(image), "PNG"), Image(pixels=20, crop="random-square", flip=False)
    assert {int(view(data, how, n)[0, 0, 0]) for n in range(300)} == set(range(31))


def erased(n: int, size: int, **options: object) -> tuple[int, int, int, int] | None:
    """The box of noise in a view: with this mean and deviation noise is 0."""
    how = Image(pixels=size, crop="none", flip=False, mean=(0, 0, 0), std=(1e-6,) * 3, **options)  # type: ignore[arg-type]
    zero = (view(solid(200, size), how, n) == 0).all(dim=2).numpy()
    if not zero.any():
        return None
    rows, columns = np.flatnonzero(zero.any(axis=1)), np.flatnonzero(zero.any(axis=0))
    top, left, h, w = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    assert zero[top : top + h, left : left + w].all()
    return int(top), int(left), int(h), int(w)


def test_random_erasing() -> None:
    size = 100
    boxes = [erased(n, size, erase=0.25) for n in range(1200)]
    found = np.array([b for b in boxes if b is not None])
    assert 240 < len(found) < 360
    top, left, h, w = found.T
    area, ratio = h * w / size**2, h / w
    assert 0.018 < area.min() < 0.03 and 0.3 < area.max() < 0.34 and area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert 0.27 < ratio.min() < 0.4 and 2.5 < ratio.max() < 3.7 and abs(np.log(ratio).mean()) < 0.1
    assert (top / (size - h)).mean() == pytest.approx(0.5, abs=0.06) and (left / (size - w)).mean() == pytest.approx(0.5, abs=0.06)


def test_erasing_comes_last() -> None:
    """Else the noise would be inverted, made brighter or moved: it is a full box of zeros in every view."""
    for n in range(60):
        box = erased(n, 48, erase=1, color_jitter=0.5)
        assert box is not None and box[2] * box[3] > 0.01 * 48**2
    operations = {"rand_augment": RandAugment(ops=3), "mean": (0, 0, 0), "std": (1e-6,) * 3}
    how = Image(pixels=48, crop="none", flip=False, erase=1, **operations)
    assert all((view(solid(200, 48), how, n) == 0).all(dim=2).float().mean() > 0.015 for n in range(60))


def test_noise_is_normal_a_pixel_and_a_channel() -> None:
    mean, std = (0.2, 0.5, 0.7), (0.1, 0.5, 0.2)
    how = Image(pixels=200, crop="none", flip=False, erase=1, mean=mean, std=std)
    noise = []
    for n in range(8):
        image = view(solid(131, 200), how, n).numpy()
        noise.append(image[(image != 131).any(axis=2)])
    values = np.concatenate(noise).astype(float)
    assert len(values) > 15_000
    for channel in range(3):
        levels, z = values[:, channel], np.random.default_rng(0).standard_normal(400_000)
        expected = np.clip(np.rint(255 * (mean[channel] + std[channel] * z)), 0, 255)
        assert levels.mean() == pytest.approx(expected.mean(), abs=1.5) and levels.std() == pytest.approx(expected.std(), abs=1.5)
        quantiles = [0.03, 0.2, 0.5, 0.8, 0.97]
        assert np.abs(np.quantile(levels, quantiles) - np.quantile(expected, quantiles)).max() < 4
        assert (levels == 0).mean() == pytest.approx((expected == 0).mean(), abs=0.01)
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.03


def test_jitter_and_rand_augment_both_happen() -> None:
    """What the config says, no less: here the brightness moves in every view, and some are inverted."""
    how = Image(pixels=16, crop="none", flip=False, color_jitter=0.2, rand_augment=RandAugment())
    means = [view(solid(60, 16), how, n).float().mean().item() for n in range(200)]
    jitter = [m for m in means if 48 <= m <= 72]
    assert len(set(jitter)) > 15 and len(jitter) > 60
    assert any(m > 130 for m in means) and math.isclose(float(np.mean(jitter)), 60, abs_tol=2)
