"""Images as sequences of colour numbers (Generative Pretraining from Pixels, Chen et al. 2020, section 3.2).

`python -m pipeline.stream.palette DATASET OUT.npy` finds the colours by k-means. A file is a NumPy array (K, 3), float32 in
[-1, 1], as OpenAI published its clusters. Shapes: B images, H height, W width, K colours; raster order: row by row.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterable

import click
import numpy as np
import torch
from PIL import Image

from pipeline.core.command import exit_codes
from pipeline.core.errors import DataError, UserError
from pipeline.core.files import read_checked, split_file
from pipeline.core.progress import Progress
from pipeline.stream.decode import decode, evaluation_view
from pipeline.stream.reader import Dataset, open_dataset

_LARGEST = 2**15  # colours; a number fits in 16 bits
_STEPS, _BATCH, _FIRST = 500, 4096, 16384  # of k-means: steps, pixels a step, pixels of the first, which the centres start at
_CHUNK = 2**20  # pixels encoded at once
_CELL = 8  # side of the cubes of colours that share their candidates
_EIGHT = (torch.arange(8) * 32 + 15.75) / 127.5 - 1  # the middles are at 15.5; this is nearest to the same levels, and rounds to 16
_THREE_BIT = torch.cartesian_prod(_EIGHT, _EIGHT, _EIGHT)
_building = threading.Lock()


class Palette:
    """`colors` float32 (K, 3) in [-1, 1], where x is the level 127.5 (x + 1). Safe to use from several threads."""

    def __init__(self, colors: np.ndarray | torch.Tensor, file: bytes | None = None) -> None:
        """`file`: what they were read from."""
        self.colors = torch.as_tensor(colors, dtype=torch.float32).contiguous()
        np.lib.format.write_array(made := io.BytesIO(), self.colors.numpy(), version=(1, 0))
        self._file = file or made.getvalue()
        self._levels = (127.5 * (self.colors.double() + 1)).round().clamp(0, 255).to(torch.uint8)
        self._shifts = torch.equal(self.colors, _THREE_BIT)
        self._tables: dict[torch.device, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}  # 32 MiB that are sooner made than sent

    @property
    def size(self) -> int:
        """K."""
        return len(self.colors)

    @property
    def hash(self) -> str:
        """sha256 of the file it was loaded from, which is the file that `save` writes."""
        return hashlib.sha256(self._file).hexdigest()

    @staticmethod
    def three_bit() -> Palette:
        """512 colours, the three highest bits of each channel: number = 64 (r >> 5) + 8 (g >> 5) + (b >> 5)."""
        return Palette(_THREE_BIT)

    @staticmethod
    def train(pixels: Iterable[np.ndarray], colors: int = 512, seed: int = 0) -> Palette:
        """Mini-batch k-means on uint8 arrays (.., 3) of any number of pixels; the order they come in does not matter.
        Raises DataError where they hold fewer distinct colours than are asked for."""
        from sklearn.cluster import MiniBatchKMeans  # here, for it takes a second that those who only encode need not spend
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        counts = np.zeros(2**24, dtype=np.int64)  # of every colour that there is: the same memory for any number of pixels
        for part in pixels:
            found, times = np.unique(part.reshape(-1, 3).astype(np.int32) @ np.array([65536, 256, 1], np.int32), return_counts=True)
            counts[found] += times
        codes = np.flatnonzero(counts)
        if not 2 <= colors <= min(len(codes), _LARGEST):
            raise DataError(f"colors: {colors} is out of range (allowed: 2 to {_LARGEST}, and the images hold {len(codes)} different ones)")
        points = (np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1) / 127.5 - 1).astype(np.float32)
        ends, random = np.cumsum(counts[codes]), np.random.default_rng(seed)
        means = MiniBatchKMeans(colors, random_state=seed, n_init=1)
        # One thread: on cores that others use too, several wait for each other, and take ten times as long.
        with threadpool_limits(1), Progress("k-means", _STEPS, "steps") as progress:
            for step in range(_STEPS):
                drawn = random.integers(ends[-1], size=_BATCH if step else max(_FIRST, 4 * colors))
                means.partial_fit(points[np.searchsorted(ends, drawn, side="right")])  # colours as often as they occur
                progress.update()
        return Palette(np.clip(means.cluster_centers_, -1, 1))

    @staticmethod
    def load(url: str, sha256: str | None = None, endpoint: str | None = None) -> Palette:
        """The palette in the .npy file at `url`: a path, or a URL that fsspec reads, http among them.
        Raises DataError where there is no such file, its sha256 is another, or it holds no colours."""
        data = read_checked(url, sha256, endpoint)
        try:
            colors = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as e:  # of many kinds, SyntaxError among them
            raise DataError(f"{url}: is damaged, or no NumPy array of numbers (.npy, without pickled objects)") from e
        if colors.dtype.kind != "f" or colors.ndim != 2 or colors.shape[1] != 3 or not 2 <= len(colors) <= _LARGEST:
            raise DataError(f"{url}: holds {colors.dtype} {colors.shape}, a palette is float32 (K, 3) with 2 to {_LARGEST} colours K")
        if not (np.abs(colors) <= 1).all():
            raise DataError(f"{url}: holds values from {colors.min():g} to {colors.max():g}, a palette's lie between -1 and 1")
        return Palette(np.ascontiguousarray(colors, dtype=np.float32), data)

    def save(self, url: str, endpoint: str | None = None) -> None:
        directory, name = split_file(url, endpoint)
        directory.write(name, self._file)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) to the numbers of the nearest colours, int64 (B, H * W); of two as near the lower number."""
        pixels = images.reshape(-1, 3)
        tokens = torch.empty(len(pixels), dtype=torch.int64, device=images.device)
        for start in range(0, len(pixels), _CHUNK):
            red, green, blue = pixels[start : start + _CHUNK].unbind(1)
            if self._shifts:
                codes = (red >> 5).int().mul_(64).add_(green >> 5, alpha=8).add_(blue >> 5)
            else:
                codes = self._table(images.device).index_select(0, red.int().mul_(65536).add_(green, alpha=256).add_(blue))
            tokens[start : start + _CHUNK] = codes
        return tokens.view(images.shape[0], images.shape[1] * images.shape[2])

    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """int64 (B, height * width) to uint8 (B, height, width, 3)."""
        return self._levels.to(tokens.device)[tokens].view(len(tokens), height, width, 3)

    def error(self, images: torch.Tensor) -> float:
        """Root mean square difference between uint8 (B, H, W, 3) and what decoding gives back, in levels (0 to 255)."""
        difference = images.double() - self.decode(self.encode(images), images.shape[1], images.shape[2])
        return float(difference.square().mean().sqrt())

    def _table(self, device: torch.device) -> torch.Tensor:
        """int16 (2^24,): the nearest colour of each colour there is, made once, in a second or two. On one core it gives
        100,000 images of 32x32 a second and more, where comparing with each of 512 colours gives 280."""
        if device not in self._tables:
            with _building:  # by one thread
                if not self._tables:
                    self._tables[torch.device("cpu")] = torch.from_numpy(_nearest(self.colors.numpy()))
                self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]


def _nearest(colors: np.ndarray) -> np.ndarray:
    """(K, 3) to int16 (2^24,): argmin over k of the squared distance in float64, for every r * 65536 + g * 256 + b.

    Exact, though a cube of 8 x 8 x 8 colours looks at few of the K. How much farther one of them is than another is linear
    along each channel, so least at an end: whoever is farther even there than the one nearest to the cube's middle is out.
    """
    levels = (np.arange(256) / 127.5 - 1).reshape(-1, 1, _CELL)
    cells = (levels - colors.T.astype(np.float64)[:, None, :, None]) ** 2  # (channel, cell, K, level in it)
    middle, ends = cells[..., _CELL // 2], cells[..., [0, -1]]
    table = np.empty((256, 256, 256), dtype=np.int16)
    for r, g in np.ndindex(256 // _CELL, 256 // _CELL):
        best = (middle[0, r] + middle[1, g] + middle[2]).argmin(axis=1)  # (cell of blue,)
        farther = sum((e - e[best, None]).min(axis=2) for e in (ends[0, r], ends[1, g]))  # (cell of blue, K)
        farther = farther + (ends[2] - np.take_along_axis(ends[2], best[:, None, None], axis=1)).min(axis=2)
        for b, chosen in enumerate(farther < 1e-9):  # far above what rounding does to distances of at most 12
            k = np.flatnonzero(chosen)
            red, green, blue = cells[0, r, k], cells[1, g, k], cells[2, b, k]  # (candidate, level)
            distances = (red[:, :, None, None] + green[:, None, :, None]) + blue[:, None, None, :]  # (candidate, r, g, b)
            here = tuple(slice(cell * _CELL, (cell + 1) * _CELL) for cell in (r, g, b))
            table[here] = k[distances.argmin(axis=0)]
    return table.reshape(-1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataset")
@click.argument("out", metavar="OUT.npy")
@click.option("--colors", type=click.IntRange(2, _LARGEST), default=512, show_default=True)
@click.option("--pixels", type=click.IntRange(min=1), default=32, show_default=True, help="Side of the images, as the model gets them.")
@click.option("--samples", type=click.IntRange(min=1), default=10_000, show_default=True, help="Images to learn from, at most.")
@click.option("--split", default="train", show_default=True)
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of the S3-compatible store that the URLs are of.")
def main(dataset: str, out: str, colors: int, pixels: int, samples: int, split: str, endpoint: str | None) -> None:
    """Find the COLORS that fit the images of DATASET best, and write them to OUT.npy; a picture beside it shows what is lost."""
    with exit_codes():
        directory, name = split_file(out, endpoint)
        directory.check_writable()
        opened = open_dataset(dataset, split, endpoint)
        if (least := min(opened.manifest.smallest)) < pixels:
            raise UserError(f"--pixels: {pixels} is more than the smallest side in the dataset, {least} pixels; choose {least} or less")
        images = views(opened, pixels, samples)
        palette = Palette.train(images.numpy(), colors)
        palette.save(out, endpoint)
        picture = name.removesuffix(".npy") + ".png"
        directory.write(picture, _compare(images[:8], palette))
    error, plain = (p.error(images[:1000]) for p in (palette, Palette.three_bit()))
    click.echo(f"error    {error:.2f} of 255 levels, root mean square; {plain:.2f} with three_bit")
    click.echo(f"sha256   {palette.hash}\npicture  {directory.url}/{picture}")


def views(dataset: Dataset, pixels: int, samples: int) -> torch.Tensor:
    """uint8 (B, P, P, 3): `samples` images drawn at random, or all where there are fewer. Raises DataError for one that is damaged."""
    numbers = np.random.default_rng(0).choice(len(dataset), min(samples, len(dataset)), replace=False)
    images = torch.empty(len(numbers), pixels, pixels, 3, dtype=torch.uint8)
    with Progress("images", len(numbers), "images") as progress:
        for place in np.argsort(numbers):  # in the order they lie on disk, but kept as drawn: the first are then like the rest
            sample = dataset[int(numbers[place])]
            try:
                images[place] = evaluation_view(decode(sample.image), pixels)
            except ValueError as e:
                raise DataError(f"data {dataset.directory.url}: sample {sample.key} cannot be decoded ({e})") from e
            progress.update()
    return images


def _compare(images: torch.Tensor, palette: Palette) -> bytes:
    """A PNG: uint8 (B, P, P, 3) in a row, and below each what encoding and decoding makes of it."""
    again = palette.decode(palette.encode(images), images.shape[1], images.shape[2])
    grid = Image.fromarray(torch.cat([torch.cat(list(row), dim=1) for row in (images, again)]).numpy())
    times = max(1, 128 // images.shape[1])
    grid.resize((grid.width * times, grid.height * times), Image.Resampling.NEAREST).save(png := io.BytesIO(), "PNG")
    return png.getvalue()


if __name__ == "__main__":
    main()
