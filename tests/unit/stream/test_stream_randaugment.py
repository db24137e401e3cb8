from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import pytest
from photographs import photograph
from PIL import Image, ImageEnhance, ImageOps

from pipeline.config.inputs import RandAugment
from pipeline.stream.randaugment import OPERATIONS, color_jitter, rand_augment
from pipeline.stream.random import Random

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
PICTURE = photograph(40, 32)
BICUBIC = Image.Resampling.BICUBIC


def affine(*matrix: float) -> Image.Image:
    return PICTURE.transform(PICTURE.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


def both(make: Callable[[float], Image.Image], value: float) -> list[Image.Image]:
    return [make(value), make(-value)]


def table(m: float) -> dict[str, list[Image.Image]]:
    """What each operation may give at magnitude `m`, as timm 1.0.31 has it with `inc1` (compared bit by bit)."""
    x = m / 10
    enhance = {
        f"{name}Increasing": both(lambda v, kind=kind: kind(PICTURE).enhance(max(0.1, 1 + v)), 0.9 * x)  # type: ignore[misc]
        for name, kind in (
            ("Color", ImageEnhance.Color),
            ("Contrast", ImageEnhance.Contrast),
            ("Brightness", ImageEnhance.Brightness),
            ("Sharpness", ImageEnhance.Sharpness),
        )
    }
    return enhance | {
        "AutoContrast": [ImageOps.autocontrast(PICTURE)],
        "Equalize": [ImageOps.equalize(PICTURE)],
        "Invert": [ImageOps.invert(PICTURE)],
        "Rotate": both(lambda v: PICTURE.rotate(v, BICUBIC, fillcolor=FILL), 30 * x),
        "PosterizeIncreasing": [ImageOps.posterize(PICTURE, max(1, 4 - int(4 * x)))],
        "SolarizeIncreasing": [ImageOps.solarize(PICTURE, 256 - int(256 * x))],
        "SolarizeAdd": [PICTURE.point(lambda v: min(255, v + int(110 * x)) if v < 128 else v)],
        "ShearX": both(lambda v: affine(1, v, 0, 0, 1, 0), 0.3 * x),
        "ShearY": both(lambda v: affine(1, 0, 0, v, 1, 0), 0.3 * x),
        "TranslateXRel": both(lambda v: affine(1, 0, v * 40, 0, 1, 0), 0.45 * x),
        "TranslateYRel": both(lambda v: affine(1, 0, 0, 0, 1, v * 32), 0.45 * x),
    }


@pytest.mark.parametrize("magnitude", [0, 4.3, 9, 10])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operation(name: str, magnitude: float) -> None:
    expected = {p.tobytes() for p in table(magnitude)[name]}
    got = {OPERATIONS[name](PICTURE, magnitude / 10, Random(n), FILL).tobytes() for n in range(12)}
    assert got == expected


def test_operations_are_drawn_evenly_and_happen_half_the_time() -> None:
    names = collections.defaultdict(list)
    for name, pictures in table(9).items():
        for picture in pictures:
            names[picture.tobytes()].append((name, len(pictures)))
    assert all(len(n) == 1 for n in names.values())
    how, count, counts = RandAugment(ops=1, magnitude=9, deviation=0), 3000, collections.Counter()
    for n in range(count):
        picture = rand_augment(PICTURE, how, MEAN, Random(0, n))
        counts["nothing" if picture is PICTURE else names[picture.tobytes()][0]] += 1
    assert counts.pop("nothing") == pytest.approx(count / 2, abs=90)
    assert len(counts) == 15 and {name for name, _ in counts} == set(OPERATIONS)
    assert all(60 < c < 140 for c in counts.values()), counts


def test_as_many_operations_as_asked_for() -> None:
    same = [sum(rand_augment(PICTURE, RandAugment(ops=ops), MEAN, Random(1, n)) is PICTURE for n in range(1000)) for ops in (1, 2, 4)]
    assert same == pytest.approx([500, 250, 62], abs=50)


def level(grey: int, how: RandAugment, n: int) -> int:
    """What becomes of the middle of a grey picture; its mean is its own grey, so that moving it changes nothing."""
    picture = rand_augment(Image.new("RGB", (8, 8), (grey,) * 3), how, (grey / 255,) * 3, Random(2, n))
    pixel = picture.getpixel((4, 4))
    assert isinstance(pixel, tuple) and len(set(pixel)) == 1
    return int(pixel[0])


@pytest.mark.parametrize(("magnitude", "deviation"), [(5, 0.5), (9, 0.5), (5, 0)])
def test_magnitudes_are_normal(magnitude: float, deviation: float) -> None:
    """Of a grey of 130, only a lower brightness makes anything below 120: 130 (1 - 0.9 magnitude / 10)."""
    levels = [level(130, RandAugment(ops=1, magnitude=magnitude, deviation=deviation), n) for n in range(5000)]
    drawn = np.array([(1 - (v + 0.5) / 130) / 0.09 for v in levels if v < 120])
    assert 50 < len(drawn) < 130  # 5000 / 2 / 15 / 2 expected
    assert drawn.mean() == pytest.approx(magnitude, abs=0.2)
    assert drawn.std() == pytest.approx(deviation, abs=0.1)


def test_magnitudes_end_at_0_and_10() -> None:
    """However wide: brightness ends at a tenth, and what SolarizeAdd adds at 110."""
    dark = [level(130, RandAugment(ops=1, magnitude=5, deviation=50), n) for n in range(2000)]
    assert min(dark) == 13 and dark.count(13) > 10
    bright = [level(20, RandAugment(ops=1, magnitude=5, deviation=50), n) for n in range(2000)]
    assert {b for b in bright if 40 < b < 230} == {130, *(b for b in bright if 40 < b < 130)} and bright.count(130) > 10


def test_color_jitter() -> None:
    """Of one colour: brightness times u, chroma over brightness times v w; each uniform in [0.8, 1.2], so these spread as they do."""
    most, colour = 0.2, (180, 110, 60)
    solid = Image.new("RGB", (4, 4), colour)
    got = np.array([color_jitter(solid, most, Random(3, n)).getpixel((1, 1)) for n in range(3000)], dtype=float)
    luma = np.array([0.299, 0.587, 0.114])
    brightness = got @ luma / (np.array(colour) @ luma)
    assert 0.78 < brightness.min() < 0.82 and 1.18 < brightness.max() < 1.22 and brightness.mean() == pytest.approx(0.99, abs=0.01)
    assert brightness.std() == pytest.approx(0.2 / 3**0.5, abs=0.005)
    chroma = np.ptp(got, axis=1) / np.ptp(colour) / brightness
    assert chroma.mean() == pytest.approx(1, abs=0.015)
    assert chroma.std() == pytest.approx(((1 + 0.04 / 3) ** 2 - 1) ** 0.5, abs=0.01)  # one factor alone would give 0.115
    assert chroma.min() < 0.72 and chroma.max() > 1.35


def test_saturation_leaves_grey_alone() -> None:
    """So two greys end as far apart as brightness times contrast, one factor each, has them."""
    picture = Image.fromarray(np.array([[[90] * 3, [150] * 3]], dtype=np.uint8))
    got = np.array([[color_jitter(picture, 0.2, Random(5, n)).getpixel((x, 0)) for x in range(2)] for n in range(2000)], dtype=float)
    assert (got == got[..., :1]).all()
    contrast = (got[:, 1, 0] - got[:, 0, 0]) / 60 / (got[..., 0].mean(axis=1) / 120)
    assert contrast.mean() == pytest.approx(1, abs=0.015) and contrast.std() == pytest.approx(0.2 / 3**0.5, abs=0.008)


def test_the_order_of_color_jitter_is_random() -> None:
    """Half black, half white: what brightness and contrast clip depends on which comes first. The two levels add up to 255 in
    0.43 of all cases; in 0.56 were brightness always the first, in 0.27 were contrast."""
    picture = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8), 2, axis=0))
    sums = [sum(int(color_jitter(picture, 0.5, Random(4, n)).getpixel((x, 0))[0]) for x in range(2)) for n in range(1500)]  # type: ignore[index]
    assert np.mean([abs(s - 255) <= 2 for s in sums]) == pytest.approx(0.43, abs=0.05)


def test_no_jitter_changes_nothing() -> None:
    assert color_jitter(PICTURE, 0, Random(0)).tobytes() == PICTURE.tobytes()
