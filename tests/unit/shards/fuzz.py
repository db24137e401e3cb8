"""Damaged JPEG, PNG, WebP, GIF and TIFF files through everything that stage 1 does with an image.

`python -m tests.unit.shards.fuzz --seed 0 --mutations 100000`: each mutation follows from seed and number alone. A crash,
more than --seconds for one file, or more memory than --memory allows ends the process; the last line tells the numbers
that it was at, and --start goes there.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.shard import ShardImages
from pipeline.shards.images import Dropped, check_image
from pipeline.shards.index import image_size
from pipeline.shards.resample import resize_into  # so that torch lies in memory before that is limited
from pipeline.stream.decode import decode
from tests.unit.stream.photographs import photograph

_LIMIT = 1 << 22  # pixels: what the config of this run allows an image to have
_WAYS = [
    ShardImages(max_pixels=_LIMIT),
    ShardImages(max_pixels=_LIMIT, check="ends"),
    ShardImages.model_validate({"max_pixels": _LIMIT, "resize": {"side": "crop", "pixels": 16, "enlarge": True}}),
]
Bytes = bytearray
Random = np.random.Generator


def seeds() -> list[bytes]:
    """Sound files of all kinds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, frames = photograph(61, 44), [photograph(30, 22, n) for n in range(3)]
    alpha = plain.copy()
    alpha.putalpha(plain.convert("L"))
    grey16 = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    several = {"save_all": True, "append_images": frames[1:]}
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((plain, "JPEG", options) for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"exif": exif})),
        *((plain.convert(mode), "JPEG", {}) for mode in ("L", "CMYK")),
        *((plain, "PNG", {}), (plain.quantize(16), "PNG", {"transparency": 3}), (grey16, "PNG", {}), (alpha, "PNG", {"exif": exif})),
        *((frames[0], "PNG", several), (plain, "WEBP", {}), (plain, "WEBP", {"lossless": True}), (alpha, "WEBP", {"exif": exif})),
        *((frames[0], "WEBP", several), (frames[0], "GIF", several), (plain, "TIFF", {"compression": "tiff_lzw"}), (plain, "BMP", {})),
    ]
    files = []
    for image, kind, options in made:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def _flip(data: Bytes, random: Random, end: int) -> None:
    for place in random.integers(0, end, random.integers(1, 6)):
        data[place] = random.integers(0, 256)


def _numbers(data: Bytes, random: Random, end: int) -> None:
    """Sizes, lengths and offsets are of two or four bytes: small, large and negative ones in their place."""
    form = random.choice(["<H", ">H", "<I", ">I"])
    most = 2 ** (8 * struct.calcsize(form)) - 1
    value = int(random.choice([0, 1, most, most // 2, most // 2 + 1, most >> 8, int(random.integers(0, most))]))
    struct.pack_into(form, data, int(random.integers(0, max(1, end - 4))), value)


def _cut(data: Bytes, random: Random, end: int) -> None:
    del data[random.integers(1, len(data)) :]


def _remove(data: Bytes, random: Random, end: int) -> None:
    start = int(random.integers(0, end))
    del data[start : start + int(random.integers(1, 64))]


def _repeat(data: Bytes, random: Random, end: int) -> None:
    start, length = int(random.integers(0, end)), int(random.integers(1, 200))
    data[start:start] = data[start : start + length] * int(random.choice([1, 2, 50]))


def _noise(data: Bytes, random: Random, end: int) -> None:
    start = int(random.integers(0, end))
    data[start:start] = random.bytes(int(random.integers(1, 64)))


_MUTATIONS: list[Callable[[Bytes, Random, int], None]] = [_flip, _flip, _numbers, _numbers, _cut, _remove, _repeat, _noise]


def mutate(files: list[bytes], seed: int, number: int) -> bytes:
    """One file with one to three things wrong, half of the time in its first 100 bytes; those of PNGs mostly with right checksums."""
    random = np.random.default_rng([seed, number])
    data = Bytes(files[number % len(files)])
    if random.random() < 0.05:  # the head of one, the body of another
        other = files[random.integers(0, len(files))]
        data[random.integers(1, len(data)) :] = other[random.integers(0, len(other)) :]
    for _ in range(random.integers(1, 4)):
        if len(data) > 8:
            end = min(len(data), 100) if random.random() < 0.5 else len(data)
            _MUTATIONS[random.integers(0, len(_MUTATIONS))](data, random, end)
    return _with_checksums(data) if data.startswith(b"\x89PNG") and random.random() < 0.7 else bytes(data)


def _with_checksums(data: Bytes) -> bytes:
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


def judge(data: bytes) -> str:
    """The verdict on a file as `_WAYS[0]` has it; what came through is read back, as a loader would."""
    verdicts = []
    for images in _WAYS:
        made = check_image(data, images)
        if isinstance(made, Dropped):
            verdicts.append(made.reason)
            continue
        verdicts.append("kept" if made.data is data else "made")
        if images.check == "decode" and image_size(made.data) != (made.width, made.height):
            raise AssertionError(f"the index reads {image_size(made.data)}, not {made.width}x{made.height}")
        if images.check == "decode" and decode(made.data).shape != (made.height, made.width, 3):
            raise AssertionError("the loader cannot read what was written")
        if check_image(data, images) != made:
            raise AssertionError("not the same twice")
    return verdicts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seconds", type=int, default=60, help="for one file")
    parser.add_argument("--memory", type=int, default=512, help="MiB beyond what the process has at its beginning")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    files, verdicts = seeds(), Counter[str]()
    assert resize_into and all(judge(data) in ("kept", "made") for data in files), "sound files come through"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (options.memory << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(options.start, options.start + options.mutations):
        if number % 50 == 0:
            print(f"at {number}", flush=True)
        signal.alarm(options.seconds)  # ends the process, wherever it is
        try:
            verdicts[judge(mutate(files, options.seed, number))] += 1
        except BaseException:
            print(f"mutation {number} of seed {options.seed}", file=sys.stderr, flush=True)
            raise
    signal.alarm(0)
    print(json.dumps(dict(sorted(verdicts.items()))))


if __name__ == "__main__":
    main()
