"""Micro-batches, and how threads make them ahead and in order; the batches of evaluation."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from pipeline.core.errors import DataError
from pipeline.stream.decode import evaluation_view_of
from pipeline.stream.ledger import Replacement
from pipeline.stream.mixing import Mix
from pipeline.stream.prefetch import AHEAD, Block, Prefetcher
from pipeline.stream.reader import Dataset, Sample

if TYPE_CHECKING:  # a command of its own
    from pipeline.stream.text import Tokenizer

T = TypeVar("T")
FILLER = -1  # a filler's index: it is no part of the sequence


@dataclass(frozen=True)
class MicroBatch:
    """`images` uint8 (b, P, P, 3), `labels` int64 (b,), -1 for none; `index` counts micro-batches from the run's first,
    over all ranks; `weight` is 1, or 0 for a filler, whose content means nothing.

    `tokens` int64 (b, length) where there is a tokenizer; `mix` is how images and labels are to be mixed on the device;
    `replaced` are the samples that stand in for others.
    """

    index: int
    images: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    texts: list[str]
    weight: float
    tokens: torch.Tensor | None = None
    mix: Mix | None = None
    replaced: tuple[Replacement, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """With its tensors on `device`; pinned ones are copied in the background."""
        given = {name: value for name in ("images", "labels", "tokens") if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in given.items()}
        return replace(self, **moved)


def filler(size: int, pixels: int, length: int = 0) -> MicroBatch:
    """`size` black images without a weight, with captions of `length` tokens."""
    tokens = torch.zeros(size, length, dtype=torch.int64) if length else None
    return MicroBatch(FILLER, empty_images(size, pixels).zero_(), torch.zeros(size, dtype=torch.int64), [], [], 0.0, tokens)


def empty_images(count: int, pixels: int) -> torch.Tensor:
    """Pinned where there is a GPU, so that the copy to it can overlap."""
    return torch.empty(count, pixels, pixels, 3, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def collate(index: int, samples: list[Sample], images: torch.Tensor) -> MicroBatch:
    labels = torch.tensor([s.label for s in samples], dtype=torch.int64)
    return MicroBatch(index, images, labels, [s.key for s in samples], [s.text for s in samples], 1.0)


def evaluation_batches(
    dataset: Dataset,
    pixels: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    numbers: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    text_length: int = 77,
) -> Iterator[MicroBatch]:
    """Every sample once in shard order (or those of `numbers`, in theirs), unaugmented, in batches of at most `batch`;
    rank r takes batches r, r + w, .. Raises DataError for a sample that cannot be read: a score is of all of them."""
    chosen = range(len(dataset)) if numbers is None else numbers

    def mine() -> Iterator[int]:
        return iter(range(rank, -(-len(chosen) // batch), world_size))

    def members(index: int) -> Sequence[int]:
        return chosen[index * batch : (index + 1) * batch]

    def needs(index: int) -> Iterable[Block]:
        return [(dataset, shard, block) for shard, block in dict.fromkeys(dataset.block_of(n) for n in members(index))]

    with prefetching([dataset], (needs(index) for index in mine())) as advance:

        def make(index: int) -> MicroBatch:
            advance()
            samples = [dataset[n] for n in members(index)]
            images = empty_images(len(samples), pixels)
            for sample, out in zip(samples, images, strict=True):
                try:
                    evaluation_view_of(sample.image, pixels, out)
                except ValueError as e:
                    raise DataError(f"data {dataset.directory.url}: sample {sample.key} cannot be decoded ({e})") from e
            made = collate(index, samples, images)
            return replace(made, tokens=tokenizer(made.texts, text_length)) if tokenizer else made

        yield from in_order(mine(), make, workers)


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


@contextmanager
def prefetching(datasets: Sequence[Dataset], needs: Iterator[Iterable[Block]]) -> Iterator[Callable[[], None]]:
    """Fetch ahead while inside, where a dataset is remote; gives the function that says that the next batch is being made."""
    remote = [d for d in datasets if not d.directory.is_local]
    if not remote:
        yield lambda: None
        return
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share the machine's cache
    prefetcher = Prefetcher(needs, min(AHEAD, remote[0].cache.limit // (4 * neighbours)))
    try:
        yield prefetcher.advance
    finally:
        prefetcher.close()
