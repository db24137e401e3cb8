from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from pipeline.config.shard import Resize, ShardImages
from pipeline.shards import pixels
from pipeline.shards.images import Checked, check_image
from pipeline.shards.pixels import Change
from tests.unit.stream.photographs import encoded, photographs


def size_of(given: tuple[int, int], **resize: object) -> tuple[int, int]:
    change = Change.of(given, Resize.model_validate(resize))
    return change.scaled if change.square is None else (change.square, change.square)


def test_sizes() -> None:
    assert size_of((400, 300), pixels=150) == (200, 150)
    assert size_of((400, 300), pixels=200, side="longer") == (200, 150)
    assert size_of((400, 300), pixels=150, side="crop") == (150, 150)
    assert size_of((300, 400), pixels=150, side="crop") == (150, 150)
    assert size_of((1000, 3), pixels=10, side="longer") == (10, 1)
    assert Change.of((400, 300), None).is_none


@pytest.mark.parametrize(
    ("side", "small", "large"), [("shorter", (30, 20), (60, 40)), ("longer", (30, 20), (40, 27)), ("crop", (20, 20), (40, 40))]
)
def test_nothing_is_enlarged_unasked(side: str, small: tuple[int, int], large: tuple[int, int]) -> None:
    assert size_of((30, 20), pixels=40, side=side) == small
    assert size_of((30, 20), pixels=40, side=side, enlarge=True) == large


@pytest.mark.parametrize("enlarged", [1, 3])
@pytest.mark.parametrize("pixels_", [24, 40, 64, 100, 150, 224, 300])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_resized_jpeg_is_pillows(enlarged: int, pixels_: int, subsampling: str) -> None:
    """Scaled decode included: on photographs the mean absolute difference to Pillow's bicubic is under 1/255."""
    for whole in photographs():
        picture = whole.resize((whole.width * enlarged // 2, whole.height * enlarged // 2), Image.Resampling.LANCZOS)
        data = encoded(picture, "JPEG", quality=90, subsampling=subsampling)
        change = Change.of(picture.size, Resize(pixels=pixels_))
        decoded = pixels.decode_jpeg(data, picture.size, change.scaled)
        assert decoded is not None
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.resize(change.scaled, Image.Resampling.BICUBIC)).astype(int)
        assert abs(change.apply(decoded) - expected).mean() < (0.1 if decoded.shape[1] == picture.width else 0.95)


def test_large_jpegs_are_decoded_at_a_fraction_of_their_size() -> None:
    size = (1281, 855)
    data = encoded(photographs()[0].resize(size), "JPEG")

    def decoded(width: int, height: int) -> tuple[int, ...]:
        found = pixels.decode_jpeg(data, size, (width, height))
        assert found is not None
        return found.shape

    assert decoded(400, 267) == (855, 1281, 3)
    assert decoded(300, 200) == (428, 641, 3)
    assert decoded(100, 67) == (214, 321, 3)
    assert decoded(50, 33) == (107, 161, 3)


def test_threads_of_torch_change_nothing() -> None:
    data = encoded(photographs()[1], "JPEG")
    images = ShardImages.model_validate({"resize": {"pixels": 200}})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(check_image(data, images))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("side", ["shorter", "longer", "crop"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_image_is_resized_as_an_upright_one(side: str, orientation: int) -> None:
    picture = photographs()[2].resize((301, 402))  # so that the crop cannot lie exactly in the middle
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that lay an upright image down
    exif = Image.Exif()
    exif[0x0112] = orientation
    images = ShardImages.model_validate({"resize": {"side": side, "pixels": 100}})
    turned = check_image(encoded(picture.transpose(Image.Transpose(undo[orientation])), "PNG", exif=exif), images)
    upright = check_image(encoded(picture, "PNG"), images)
    assert isinstance(turned, Checked) and isinstance(upright, Checked)
    assert (turned.width, turned.height) == (upright.width, upright.height)
    first, second = (np.asarray(Image.open(io.BytesIO(c.data))).astype(int) for c in (turned, upright))
    assert abs(first - second).mean() < 0.5  # rows are filtered before columns, so they are not quite the same; a pixel off would be 5


def test_a_crop_is_the_middle() -> None:
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = 200
    for picture in (wide, wide.swapaxes(0, 1)):
        change = Change.of((picture.shape[1], picture.shape[0]), Resize(side="crop", pixels=50))
        assert (change.apply(np.ascontiguousarray(picture)) == 200).all()


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_quality_and_subsampling_are_the_configs(subsampling: str) -> None:
    data = encoded(photographs()[0], "JPEG")
    sizes = []
    for quality in (50, 95):
        images = ShardImages.model_validate({"resize": {"pixels": 200}, "quality": quality, "subsampling": subsampling})
        checked = check_image(data, images)
        assert isinstance(checked, Checked)
        assert simplejpeg.decode_jpeg_header(checked.data) == (200, 300, "YCbCr", subsampling)
        sizes.append(len(checked.data))
    assert sizes[0] < sizes[1] / 2


def test_the_verdict_on_damage_needs_no_full_decode() -> None:
    """`is_whole_jpeg` decodes at 1/8: what libjpeg then says of damaged files is what it says at full size."""
    random, verdicts = np.random.default_rng(0), set()
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 4}, {"subsampling": "4:4:4"}):
        data = encoded(photographs()[2].resize((96, 112)), "JPEG", quality=85, **options)
        for _ in range(200):
            damaged = bytearray(data)
            for place in random.integers(600, len(data), random.integers(1, 5)):
                damaged[place] = random.integers(0, 256)
            said = []
            for least in ({}, {"min_width": 12, "min_height": 14}):
                try:
                    simplejpeg.decode_jpeg(bytes(damaged), **least)
                    said.append("")
                except ValueError as e:
                    said.append(str(e))
            assert said[0] == said[1]
            verdicts.add(pixels.is_damage(ValueError(said[0])))
    assert verdicts == {True, False}
