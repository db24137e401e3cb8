from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from pipeline.config.schema import Image
from pipeline.stream.augment import _resized_crop, generator, training_view
from pipeline.stream.decode import decode, evaluation_view, normalize, resize


def photo(width: int, height: int, seed: int = 0) -> Picture.Image:
    """Structure at every scale: noise, enlarged noise, a gradient."""
    random = np.random.default_rng(seed)
    coarse = Picture.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Picture.Resampling.BICUBIC)
    fine = random.integers(-40, 40, (height, width, 3))
    return Picture.fromarray((np.asarray(coarse).astype(int) + fine).clip(0, 255).astype(np.uint8))


def encoded(picture: Picture.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_view(picture: Picture.Image, pixels: int) -> np.ndarray:
    width, height = picture.size
    factor = pixels / min(width, height)
    size = (max(pixels, round(width * factor)), max(pixels, round(height * factor)))
    left, top = (size[0] - pixels) // 2, (size[1] - pixels) // 2
    return np.asarray(picture.resize(size, Picture.Resampling.BICUBIC).crop((left, top, left + pixels, top + pixels)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode(kind: str, mode: str) -> None:
    data = encoded(photo(40, 30).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode(data)
    assert pixels.dtype == torch.uint8 and pixels.shape == (30, 40, 3)
    expected = np.asarray(Picture.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(pixels.numpy().astype(int) - expected).mean() <= (0.5 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\xff\xd8 cut", encoded(photo(40, 30), "PNG")[:200], encoded(photo(40, 30), "JPEG")[:300]]
)
def test_what_cannot_be_decoded(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)


@pytest.mark.parametrize(
    ("width", "height", "pixels"), [(300, 200, 224), (200, 300, 64), (640, 480, 224), (97, 103, 32), (8, 8, 16), (65, 33, 32)]
)
def test_evaluation_view_is_that_of_pillow(width: int, height: int, pixels: int) -> None:
    """Bicubic with antialiasing, then the centre: on average less than half a level of 255 apart, never more than two."""
    picture = photo(width, height)
    view = evaluation_view(torch.from_numpy(np.array(picture)), pixels)
    assert view.shape == (pixels, pixels, 3) and view.dtype == torch.uint8
    apart = np.abs(view.numpy().astype(int) - pillow_view(picture, pixels))
    assert apart.mean() < 0.5 and apart.max() <= 2


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = torch.from_numpy(np.array(photo(20, 10)))
    assert resize(image, 10, 20) is image
    assert torch.equal(evaluation_view(torch.from_numpy(np.array(photo(16, 16))), 16), torch.from_numpy(np.array(photo(16, 16))))


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
    out = normalize(images, mean, std)
    assert out.shape == (2, 3, 4, 5) and out.dtype == torch.float32
    expected = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(out.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_random_resized_crop_statistics() -> None:
    how = Image(pixels=16, scale=(0.2, 0.8), ratio=(0.5, 2.0))
    height, width = 200, 300
    boxes = np.array([_resized_crop(height, width, how, generator(0, 0, n)) for n in range(3000)])
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
    assert _resized_crop(100, 2, Image(scale=(0.9, 1.0)), generator(0, 0, 0)) == (48, 0, 3, 2)
    assert _resized_crop(2, 100, Image(scale=(0.9, 1.0)), generator(0, 0, 0)) == (0, 48, 2, 3)


@pytest.mark.parametrize("crop", ["random-resized", "random-square", "none"])
def test_a_view_depends_on_its_key_alone(crop: str) -> None:
    image, how = torch.from_numpy(np.array(photo(60, 40))), Image(pixels=16, crop=crop)  # type: ignore[arg-type]
    view = training_view(image, how, generator(1, 2, 3))
    generator(9, 9, 9).random()
    assert view.shape == (16, 16, 3) and torch.equal(view, training_view(image, how, generator(1, 2, 3)))
    others = [training_view(image, how, generator(*key)) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))]
    assert crop == "none" or not all(torch.equal(view, other) for other in others)


def test_flips() -> None:
    image, how = torch.from_numpy(np.array(photo(16, 16))), Image(pixels=16, crop="none")
    views = [training_view(image, how, generator(0, 0, n)) for n in range(400)]
    flipped = sum(torch.equal(v, image.flip(1)) for v in views)
    assert flipped + sum(torch.equal(v, image) for v in views) == 400 and 150 < flipped < 250
    still = Image(pixels=16, crop="none", flip=False)
    assert all(torch.equal(training_view(image, still, generator(0, 0, n)), image) for n in range(20))


def test_random_square_keeps_the_shorter_side() -> None:
    image = torch.zeros(20, 50, 3, dtype=torch.uint8)
    image[:, :, 0] = torch.arange(50, dtype=torch.uint8)  # every column says where it was
    lefts = {int(training_view(image, Image(pixels=20, crop="random-square", flip=False), generator(0, 0, n))[0, 0, 0]) for n in range(300)}
    assert lefts == set(range(31))
