from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.core.errors import DataError, UserError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream.palette import Palette, main


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """266 pieces of two photographs, uint8 (B, 32, 32, 3)."""
    return torch.from_numpy(
        np.stack([i[y : y + 32, x : x + 32] for i in load_sample_images().images for y in range(0, 395, 32) for x in range(0, 608, 60)])
    )


@pytest.fixture(scope="module")
def palette(images: torch.Tensor) -> Palette:
    return Palette.train(iter(images.numpy()), 256)


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def nearest(colors: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Compared with every colour in float64, channel after channel; argmin takes the first of equals."""
    pixels, colors = images.reshape(-1, 1, 3).numpy() / 127.5 - 1, colors.double().numpy()
    parts = [np.square(part - colors).transpose(2, 0, 1) for part in np.array_split(pixels, 20)]
    return torch.from_numpy(np.concatenate([((r + g) + b).argmin(axis=1) for r, g, b in parts])).view(len(images), -1)


# Encoding and decoding


def test_nearest(palette: Palette, images: torch.Tensor, noise: torch.Tensor) -> None:
    some = torch.cat([images[::40], noise])
    tokens = palette.encode(some)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(some), 32 * 32)
    assert torch.equal(tokens, nearest(palette.colors, some))


def test_nearest_among_crowded_and_equal_colours(noise: torch.Tensor) -> None:
    """Half of them in one corner, all of them twice, and midway between others: the lower number is taken."""
    random = np.random.default_rng(0)
    levels = np.concatenate(
        [random.integers(0, 20, (40, 3)), random.integers(0, 256, (20, 3)), [[0, 0, 0], [255, 255, 255], [128, 0, 0], [130, 0, 0]]]
    )
    palette = Palette(np.concatenate([levels, levels]) / 127.5 - 1)
    some = torch.cat([noise, noise // 12, torch.from_numpy(levels.astype(np.uint8))[:, None, None].expand(-1, 32, 32, 3)])
    some[0, 0, :3] = torch.tensor([[129, 0, 0], [128, 0, 0], [130, 0, 0]])  # the first lies between the other two
    tokens = palette.encode(some)
    assert torch.equal(tokens, nearest(palette.colors, some))
    assert int(tokens.max()) < len(levels)


def test_raster_order(palette: Palette) -> None:
    black, white = palette.encode(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)).flatten().tolist()
    image = torch.zeros(2, 3, 5, 3, dtype=torch.uint8)
    image[1, 2, 1] = 255
    tokens = palette.encode(image)
    assert tokens.tolist() == [[black] * 15, [black] * 11 + [white] + [black] * 3]
    again = palette.decode(tokens, 3, 5)
    assert again.dtype == torch.uint8 and again.shape == image.shape and int(again[1, 2, 1].min()) > 200 > int(again[1, 1].max())


def test_any_layout_and_size(palette: Palette, images: torch.Tensor) -> None:
    """Channels first in memory, and more pixels than are encoded at once."""
    whole = images[:200].permute(1, 0, 2, 3).reshape(1, 32 * 200, 32, 3)
    turned = whole.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    tall = torch.cat([turned] * 6, dim=1)
    assert tall.shape[1] * tall.shape[2] > 2**20 and not turned.is_contiguous()
    wanted = palette.encode(images[:200]).view(200, 32, 32).transpose(0, 1).reshape(1, -1)
    assert torch.equal(palette.encode(tall), wanted.repeat(1, 6))
    assert palette.encode(images[:0]).shape == (0, 1024)


def test_colours_of_the_palette_come_back(palette: Palette, images: torch.Tensor) -> None:
    tokens = palette.encode(images)
    once = palette.decode(tokens, 32, 32)
    assert torch.equal(palette.decode(palette.encode(once), 32, 32), once)
    levels = (127.5 * (palette.colors.double().numpy() + 1)).round()
    assert np.array_equal(palette.decode(torch.arange(256)[None], 16, 16).view(256, 3).numpy(), levels)
    assert len(tokens.unique()) > 240


def test_three_bit(images: torch.Tensor, noise: torch.Tensor) -> None:
    simple = Palette.three_bit()
    some = torch.cat([images[::40], noise])
    r, g, b = (some.long() // 32).unbind(-1)
    assert torch.equal(simple.encode(some), (64 * r + 8 * g + b).flatten(1))
    assert torch.equal(simple.encode(some), nearest(simple.colors, some))
    assert torch.equal(simple.decode(simple.encode(some), 32, 32), some // 32 * 32 + 16)
    assert simple.size == 512 and torch.equal(simple.encode(simple.decode(torch.arange(512)[None], 16, 32)), torch.arange(512)[None])


def test_several_threads(palette: Palette, images: torch.Tensor) -> None:
    """The table is made by the first of them; it is not sent along."""
    wanted = palette.encode(images)
    copy = pickle.loads(pickle.dumps(palette))  # noqa: S301
    assert len(pickle.dumps(palette)) < 100_000
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(copy.encode, images.split(20)))
    assert torch.equal(torch.cat(parts), wanted) and copy.hash == palette.hash


# Training


def test_a_trained_palette_loses_less(palette: Palette, images: torch.Tensor) -> None:
    assert palette.colors.dtype == torch.float32 and palette.colors.shape == (256, 3) and float(palette.colors.abs().max()) <= 1
    plain = Palette.three_bit().error(images)
    assert palette.error(images) < plain / 2
    again = palette.decode(palette.encode(images), 32, 32).numpy().astype(float)
    assert palette.error(images) == pytest.approx(np.sqrt(np.mean((again - images.numpy()) ** 2)))
    assert 8 < plain < 11  # evenly spread levels would lose 32 / sqrt(12) = 9.2


def test_training_is_the_same_each_time_and_in_any_order(images: torch.Tensor) -> None:
    one = Palette.train(iter(images[::4].numpy()), 8)
    otherwise = np.array_split(images[::4].flip(0).reshape(-1, 3).numpy(), 11)
    assert Palette.train(iter(otherwise), 8).hash == one.hash
    assert Palette.train(iter(otherwise), 8, seed=1).hash != one.hash


def test_common_colours_matter_more() -> None:
    """9 in 10 pixels are a hundred greens, the others are spread over all colours."""
    random = np.random.default_rng(0)
    greens = np.stack([np.zeros(100), np.arange(100) + 100, np.zeros(100)], axis=1)
    pixels = np.concatenate([greens.repeat(180, axis=0), random.integers(0, 256, (2000, 3))]).astype(np.uint8)
    green = Palette.train(iter([pixels]), 24).colors
    assert int(((green[:, 0] < -0.9) & (green[:, 2] < -0.9)).sum()) > 3  # were each colour drawn as often, 1 or 2
    few = Palette.train(iter([greens.astype(np.uint8)]), 100)  # as many as there are: these
    levels = few.decode(torch.arange(100)[None], 10, 10).view(100, 3)
    assert np.array_equal(levels[levels[:, 1].argsort()], greens)


def test_too_few_colours() -> None:
    grey = np.arange(17, dtype=np.uint8)[:, None].repeat(3, axis=1)
    with pytest.raises(DataError, match=r"colors: 18 is out of range \(allowed: 2 to 32768, and the images hold 17 different ones\)"):
        Palette.train(iter([grey, grey]), 18)
    with pytest.raises(DataError, match="colors: 1 is out of range"):
        Palette.train(iter([grey]), 1)


# Files


def test_files(palette: Palette, images: torch.Tensor, store: Storage) -> None:
    palette.save(f"{store.url}/some/palette.npy", store.endpoint)
    data = store.read("some/palette.npy")
    again = Palette.load(f"{store.url}/some/palette.npy", palette.hash, store.endpoint)
    assert hashlib.sha256(data).hexdigest() == palette.hash == again.hash
    assert torch.equal(again.colors, palette.colors) and np.array_equal(np.load(io.BytesIO(data)), palette.colors.numpy())
    with pytest.raises(
        DataError, match=f"^{store.url}/some/palette.npy: this is another file, its sha256 is {palette.hash} and 0+ was expected$"
    ):
        Palette.load(f"{store.url}/some/palette.npy", "0" * 64, store.endpoint)


def as_file(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def test_a_file_of_others(tmp_path: Path) -> None:
    """OpenAI's kmeans_centers.npy is such an array; the order in memory and of bytes is the writer's business."""
    colors = np.random.default_rng(0).uniform(-1, 1, (30, 3))
    (tmp_path / "a.npy").write_bytes(as_file(np.asfortranarray(colors.astype(">f8"))))
    palette = Palette.load(str(tmp_path / "a.npy"))
    assert torch.equal(palette.colors, torch.from_numpy(colors).float())
    assert palette.hash == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()


GOOD = as_file(np.zeros((4, 3), np.float32))
NO_ARRAY = r"is damaged, or no NumPy array of numbers \(.npy, without pickled objects\)"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", NO_ARRAY),
        (b"a text", NO_ARRAY),
        (GOOD[:-1], NO_ARRAY),
        (GOOD[:30] + b"((" + GOOD[32:], NO_ARRAY),
        (pickle.dumps(np.zeros((4, 3), np.float32)), NO_ARRAY),
        (as_file(np.array([[1, 2, "x"]], dtype=object)), NO_ARRAY),
        (as_file(np.zeros((4, 4), np.float32)), r"holds float32 \(4, 4\), a palette is float32 \(K, 3\) with 2 to 32768 colours K"),
        (as_file(np.zeros((1, 3), np.float32)), r"holds float32 \(1, 3\), a palette"),
        (as_file(np.zeros((4, 3), np.uint8)), r"holds uint8 \(4, 3\), a palette"),
        (as_file(np.float32(1)), r"holds float32 \(\), a palette"),
        (as_file(np.full((4, 3), 255, np.float32)), "holds values from 255 to 255, a palette's lie between -1 and 1"),
        (as_file(np.full((4, 3), np.nan, np.float32)), "holds values from nan to nan"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "p.npy").write_bytes(data)
    with pytest.raises(DataError, match=f"^{tmp_path}/p.npy: {why}"):
        Palette.load(str(tmp_path / "p.npy"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}/none: there is no such file$"):
        Palette.load(f"{tmp_path}/none")
    with pytest.raises(UserError, match="names a directory, a file is wanted"):
        Palette.load(f"{tmp_path}/")


# The command


def test_command(make_dataset: Callable[..., Manifest], tmp_path: Path) -> None:
    make_dataset(Storage(str(tmp_path / "data")), {"train": 60}, width=10, height=8)
    data, out = str(tmp_path / "data"), tmp_path / "new/palette.npy"
    result = CliRunner().invoke(main, [data, str(out), "--pixels", "8", "--colors", "32", "--samples", "40"])
    assert result.exit_code == 0, result.output
    palette = Palette.load(str(out))
    assert palette.size == 32 and f"sha256   {palette.hash}" in result.output
    picture = Image.open(tmp_path / "new/palette.png")
    assert picture.size == (8 * 8 * 16, 2 * 8 * 16)
    pixels = torch.from_numpy(np.array(picture))[::16, ::16]  # eight images above what is left of them
    above, below = (row.reshape(8, 8, 8, 3).transpose(0, 1) for row in pixels.split(8))
    assert torch.equal(palette.decode(palette.encode(above), 8, 8), below) and not torch.equal(above, below)

    failed = CliRunner().invoke(main, [data, str(out), "--pixels", "9"])
    assert (
        failed.exit_code == 3
        and "error: --pixels: 9 is more than the smallest side in the dataset, 8 pixels; choose 8 or less" in failed.output
    )
    failed = CliRunner().invoke(main, [str(tmp_path), str(out)])
    assert failed.exit_code == 3 and failed.output.startswith("error: ") and "there is no dataset here" in failed.output
