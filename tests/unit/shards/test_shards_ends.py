from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.config.shard import ShardImages
from pipeline.shards import ends
from pipeline.shards.images import Checked, Dropped, check_image

Photo = Callable[..., Image.Image]
Encoded = Callable[..., bytes]
ENDS = ShardImages(check="ends")


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 60, 3), np.uint8))


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_damage_inside_stays_and_a_cut_is_found(encoded: Encoded, kind: str, extension: str) -> None:
    data = encoded(noise(), kind)
    damaged = bytearray(data)
    damaged[len(data) * 3 // 4 : len(data) * 3 // 4 + 40] = b"\xff\xd9" * 20
    assert check_image(bytes(damaged), ENDS) == Checked(bytes(damaged), extension, 60, 64)  # it is not looked at
    if kind != "WEBP":  # lossy WebP has no means to tell
        assert isinstance(check_image(bytes(damaged), ShardImages()), Dropped)
    for share in (0.3, 0.9):
        cut = check_image(data[: int(len(data) * share)], ENDS)
        assert isinstance(cut, Dropped) and cut.reason == "corrupt"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *((kind, mode) for kind in ("PNG", "WEBP", "GIF", "TIFF") for mode in ("RGB", "L", "LA", "RGBA", "P", "1")),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("resize", [None, {"pixels": 20}, {"pixels": 99}])
def test_sound_images_come_out_as_with_decode(encoded: Encoded, kind: str, mode: str, orientation: int, resize: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise().convert(mode), kind, **({} if kind == "GIF" else {"exif": exif}))
    made = [check_image(data, ShardImages.model_validate({"resize": resize, "check": check})) for check in ("ends", "decode")]
    assert made[0] == made[1] and isinstance(made[0], Checked)


def test_what_lies_behind_the_pixels_of_a_png_is_heeded(encoded: Encoded) -> None:
    plain = encoded(noise(), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = PngImagePlugin.putchunk
    behind = bytearray()

    class Sink:
        def write(self, data: bytes) -> None:
            behind.extend(data)

    chunk(Sink(), b"eXIf", exif.tobytes()[6:])  # type: ignore[arg-type]
    turned = check_image(plain[:-12] + bytes(behind) + plain[-12:], ENDS)
    assert isinstance(turned, Checked) and (turned.width, turned.height) == (64, 60)


def test_a_jpeg_with_something_behind_its_end_is_decoded(encoded: Encoded) -> None:
    data = encoded(noise(), "JPEG")
    assert check_image(data + b"\0" * 100, ENDS) == Checked(data + b"\0" * 100, "jpg", 60, 64)
    cut = check_image(data[:-200] + b"\0" * 100, ENDS)
    assert isinstance(cut, Dropped) and cut.reason == "corrupt"


def test_sizes_of_webps(photo: Photo, encoded: Encoded) -> None:
    frames = [photo(37, 23, n) for n in range(2)]
    alpha = photo(37, 23)
    alpha.putalpha(100)
    for data in (
        encoded(frames[0], "WEBP"),
        encoded(frames[0], "WEBP", lossless=True),
        encoded(alpha, "WEBP"),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        encoded(frames[0], "WEBP", exif=Image.Exif()),
    ):
        assert ends.webp_size(data) == (37, 23)
        assert ends.webp_ends(data) and not ends.webp_ends(data[:-2])
    assert ends.webp_size(encoded(frames[0], "PNG")) is None
    assert ends.webp_size(encoded(frames[0], "WEBP")[:20]) is None
