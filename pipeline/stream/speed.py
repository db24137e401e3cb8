"""How fast the training loader reads a dataset on this machine, and how fast it could at best."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pipeline.config.data import Data
from pipeline.config.inputs import Cache, Image
from pipeline.core.progress import Progress
from pipeline.stream.augment import training_view
from pipeline.stream.collection import open_collection
from pipeline.stream.decode import decode
from pipeline.stream.ledger import BadSample
from pipeline.stream.loader import open_stream
from pipeline.stream.random import Random
from pipeline.stream.reader import Dataset

_MICRO = 64  # samples that one thread of the loader makes, where the batch is a multiple of it
_BARE, _BARE_S = 256, 1.5  # images in memory, and seconds, for the bound


def measure(url: str, split: str, endpoint: str | None, *, workers: int, batches: int, size: int, batch: int, seed: int) -> dict[str, Any]:
    """Images/s of the training loader on `workers` threads, and of cropping and resizing images in memory on as many."""
    how, piece = Image(pixels=size, enlarge=True), _MICRO if batch % _MICRO == 0 else batch
    # What this machine fetched before would make a store look fast.
    with tempfile.TemporaryDirectory(prefix="tessera-speed-") as folder, _one_thread_an_operation():
        began = time.perf_counter()
        data = open_collection([Data(url=url)], split, endpoint, cache=Cache(path=folder))
        stream = open_stream(data, global_batch=batch, micro_batch=piece, workers=workers, seed=seed, image=how, bad=1.0)
        made = iter(stream)
        next(made)
        first = time.perf_counter() - began
        for _ in range(workers):
            next(made)
        began = time.perf_counter()
        with Progress("speed", batches * piece, "images") as shown:
            for _ in range(batches):
                next(made)
                shown.update(piece)
        rate = batches * piece / (time.perf_counter() - began)
        made.close()
        bare = _bare_rate(list(_images(data.datasets[0], stream.mixture.at(0, _BARE).number.tolist())), how, workers)
    return {
        "split": split, "images_per_s": rate, "mb_per_s": rate * data.reading.sample_bytes / 1e6, "first_batch_s": first,
        "bare_images_per_s": bare, "workers": workers, "images": batches * piece, "pixels": size, "samples": data.samples,
    }  # fmt: skip


def _images(dataset: Dataset, numbers: Sequence[int]) -> Iterator[bytes]:
    """Of the samples that training could use."""
    for number in numbers:
        with suppress(BadSample, ValueError):
            image = dataset.read(number).image
            decode(image)
            yield image


def _bare_rate(images: Sequence[bytes], how: Image, workers: int) -> float:
    """Of the same work without reading, checking or collating."""

    def view(n: int) -> None:
        training_view(images[n % len(images)], how, Random(n), torch.empty(how.pixels, how.pixels, 3, dtype=torch.uint8))

    done, began = 0, time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        while (elapsed := time.perf_counter() - began) < _BARE_S:
            list(pool.map(view, range(done, done + len(images))))
            done += len(images)
    return done / elapsed


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """As in training (`augment.training_view`)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
