"""Micro-batches in order, for one rank of any number (contracts "Batch" and "Loader state").

A global batch of B samples is cut into n = B / micro_batch micro-batches, by order alone. Rank r of w takes those at
r, r + w, r + 2w, ..; each rank makes k = ceil(n / w) of them a step, and where the batch has no more a filler of weight
zero stands in, so that collectives match. So nothing but the dealing depends on the world size.

How a sample flows: order gives its number, reader its bytes, decode its pixels, augment its view; a micro-batch is made
by one thread of the pool, some steps ahead, and handed over in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipeline.config.schema import Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.stream.augment import generator, training_view
from pipeline.stream.decode import decode, evaluation_view
from pipeline.stream.order import Order
from pipeline.stream.reader import Dataset, Sample, open_dataset

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """`images` uint8 (b, P, P, 3), `labels` int64 (b,), -1 for none; `index` counts micro-batches from the run's first,
    over all ranks; `weight` is 1, or 0 for a filler, whose content means nothing."""

    index: int
    images: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    texts: list[str]
    weight: float


class Stream:
    """This rank's micro-batches, without end, from sample `consumed` on. `consumed` then counts the samples of all
    ranks in the global batches handed out in full, never those only prefetched."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        image: Image,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        consumed: int,
    ) -> None:
        if global_batch % micro_batch or consumed % global_batch:
            raise ValueError(
                f"global_batch {global_batch} must be a multiple of micro_batch {micro_batch}, and consumed {consumed} of global_batch"
            )
        self.dataset, self.order, self.image = dataset, order, image
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.consumed = consumed

    @property
    def pieces(self) -> int:
        """n, micro-batches of a global batch."""
        return self.global_batch // self.micro_batch

    @property
    def rounds(self) -> int:
        """k, micro-batches that each rank makes of a global batch, fillers included."""
        return -(-self.pieces // self.world_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        made = in_order(self._places(), self._make, self.workers)
        while True:
            for turn in range(self.rounds):
                batch = next(made)
                if turn == self.rounds - 1:
                    self.consumed += self.global_batch
                yield batch

    def _places(self) -> Iterator[tuple[int, bool]]:
        """(micro-batch index, is it real) for this rank, without end."""
        step = self.consumed // self.global_batch
        while True:
            for turn in range(self.rounds):
                piece = turn * self.world_size + self.rank
                yield step * self.pieces + piece, piece < self.pieces
            step += 1

    def _make(self, place: tuple[int, bool]) -> MicroBatch:
        index, real = place
        size = self.image.pixels
        if not real:
            images = torch.zeros(self.micro_batch, size, size, 3, dtype=torch.uint8)
            return MicroBatch(index, images, torch.zeros(self.micro_batch, dtype=torch.int64), [], [], 0.0)
        start = index * self.micro_batch
        numbers = self.order.samples(start, self.micro_batch).tolist()
        samples, views = [], []
        for offset, number in enumerate(numbers):
            sample = self.dataset[number]
            random = generator(self.order.seed, self.order.epoch_of(start + offset), number)
            views.append(training_view(_pixels(sample, self.dataset), self.image, random))
            samples.append(sample)
        return _collate(index, samples, views)


def open_stream(
    url: str,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    seed: int = 0,
    consumed: int = 0,
    split: str = "train",
    size: int = 224,
    image: Image | None = None,
    endpoint: str | None = None,
) -> Stream:
    """Training micro-batches of the dataset at `url` for one rank; `image` says how, by default random-resized crops of `size`.

    Raises:
        DataError: no such dataset or split. ConfigError: images smaller than the model's input.
    """
    dataset = open_dataset(url, split, endpoint)
    how = image or Image(pixels=size)
    check_pixels(dataset, how)
    order = Order(len(dataset), dataset.view, seed)
    return Stream(
        dataset,
        order,
        how,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
        consumed=consumed,
    )


def check_pixels(dataset: Dataset, image: Image, where: str = "pretrain.image.pixels") -> None:
    """Raises ConfigError where images would have to be enlarged and the config does not say so."""
    least = min(dataset.manifest.smallest)
    if least < image.pixels and not image.enlarge:
        raise ConfigError(
            f"{where}: {image.pixels} is more than the smallest side in the dataset, {least} pixels; "
            f"choose {least} or less, or set enlarge: true beside it"
        )


def evaluation_batches(
    dataset: Dataset, pixels: int, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0, numbers: Sequence[int] | None = None
) -> Iterator[MicroBatch]:
    """Every sample once in shard order (or those of `numbers`, in theirs), unaugmented, in batches of at most `batch`;
    rank r takes batches r, r + w, .."""
    chosen = range(len(dataset)) if numbers is None else numbers

    def make(index: int) -> MicroBatch:
        samples = [dataset[n] for n in chosen[index * batch : (index + 1) * batch]]
        return _collate(index, samples, [evaluation_view(_pixels(s, dataset), pixels) for s in samples])

    return in_order(iter(range(rank, -(-len(chosen) // batch), world_size)), make, workers)


def in_order(places: Iterator[T], make: Callable[[T], MicroBatch], workers: int) -> Iterator[MicroBatch]:
    """`make` of each place, in order, `2 * workers` ahead on `workers` threads; in line where workers is 0.

    Threads do: decoding, resizing and reading all release the interpreter's lock.
    """
    if workers == 0:
        yield from map(make, places)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: deque[Future[MicroBatch]] = deque()
        try:
            for place in places:
                waiting.append(pool.submit(make, place))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _pixels(sample: Sample, dataset: Dataset) -> torch.Tensor:
    try:
        return decode(sample.image)
    except ValueError as e:
        raise DataError(f"data {dataset.directory.url}: sample {sample.key} cannot be decoded ({e})") from e


def _collate(index: int, samples: list[Sample], views: list[torch.Tensor]) -> MicroBatch:
    labels = torch.tensor([s.label for s in samples], dtype=torch.int64)
    return MicroBatch(index, torch.stack(views), labels, [s.key for s in samples], [s.text for s in samples], 1.0)
