"""Micro-batches in order, for one rank of any number (contracts "Batch" and "Loader state").

A global batch of B samples is cut into n = B / micro_batch micro-batches, by order alone. Rank r of w takes those from
floor(r n / w) up to floor((r + 1) n / w), neighbours, so that it reads the same blocks step after step; each rank makes
k = ceil(n / w) of them a step, and where it has no more a filler of weight zero stands in, so that collectives match.
So nothing but the dealing depends on the world size.

How a sample flows: the mixture gives its dataset and number, reader its bytes, augment its view; a micro-batch is made by
one thread of the pool, some steps ahead, and handed over in order. A sample that cannot be read is replaced (`ledger.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config import fingerprint
from pipeline.config.data import Bound, Data
from pipeline.config.inputs import Cache, Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.world import World
from pipeline.stream.augment import training_view
from pipeline.stream.batches import FILLER, MicroBatch, collate, empty_images, filler, in_order, prefetching
from pipeline.stream.collection import Collection, open_collection
from pipeline.stream.ledger import BadSample, Ledger, Replacement, substitutes
from pipeline.stream.mixing import draw_mix
from pipeline.stream.mixture import Mixture, Places
from pipeline.stream.prefetch import Block
from pipeline.stream.random import Random
from pipeline.stream.reader import Dataset, Sample

if TYPE_CHECKING:  # a command of its own
    from pipeline.stream.text import Tokenizer


class Stream:
    """This rank's micro-batches, without end, from sample `consumed` on. `consumed` then counts the samples of all
    ranks in the global batches handed out in full, never those only prefetched, and those passed over; so does the ledger."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        mixture: Mixture,
        image: Image,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        consumed: int = 0,
        tokenizer: Tokenizer | None = None,
        text_length: int = 77,
        ledger: Ledger | None = None,
    ) -> None:
        if global_batch % micro_batch or consumed % global_batch:
            raise ValueError(
                f"global_batch {global_batch} must be a multiple of micro_batch {micro_batch}, and consumed {consumed} of global_batch"
            )
        self.datasets, self.mixture, self.image, self.seed = list(datasets), mixture, image, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.tokenizer, self.text_length = tokenizer, text_length
        self.consumed = consumed
        self.ledger = Ledger() if ledger is None else ledger  # an empty one is false

    @property
    def pieces(self) -> int:
        """n, micro-batches of a global batch."""
        return self.global_batch // self.micro_batch

    @property
    def rounds(self) -> int:
        """k, micro-batches that each rank makes of a global batch, fillers included."""
        return -(-self.pieces // self.world_size)

    @property
    def shares(self) -> list[int]:
        """How many samples of a global batch each rank has."""
        return [len(self._dealt(rank)) * self.micro_batch for rank in range(self.world_size)]

    @property
    def has_samples(self) -> bool:
        """Whether this rank gets more than fillers."""
        return self.shares[self.rank] > 0

    @property
    def view(self) -> str:
        """Names the whole sequence of samples: where two streams agree in it and in the seed, positions mean the same."""
        orders = [(order.view, order.block, str(order.row) if order.block > 1 else "") for order in self.mixture.orders]
        return fingerprint({"orders": orders, "shares": self.mixture.shares, "repeats": self.mixture.repeats})

    def state(self) -> dict[str, Any]:
        """What a resume needs (contract "Loader state"), as plain values; the same on all ranks after `agree`."""
        return {
            "consumed": self.consumed, "view": self.view, "seed": self.seed, "batch": self.global_batch,
            "replaced": self.ledger.as_values(), "skipped": self.ledger.skips_as_values(),
        }  # fmt: skip

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of the same view, taken at any world size. To be called before iterating, or to iterate anew.

        Raises:
            ConfigError: it was taken with another seed or global batch, with which its positions mean other samples.
        """
        for name, path, ours in (("seed", "seed", self.seed), ("batch", "pretrain.batch", self.global_batch)):
            if state[name] != ours:
                raise ConfigError(f"{path}: {ours} differs from the checkpoint's {state[name]}, with which its samples were drawn")
        self.consumed = state["consumed"]
        self.ledger = Ledger.from_values(state["replaced"], self.ledger.limit, state.get("skipped", ()))  # the first versions skipped none

    @property
    def trained(self) -> int:
        """Samples of all ranks that steps have had: those consumed, less those passed over."""
        return self.consumed - self.ledger.passed(self.consumed)

    def agree(self, world: World) -> list[Replacement]:
        """Unite the ledgers of all ranks, which call this together; gives what is new since the last time."""
        return self.ledger.merge(world.gather(self.ledger.unmerged()), self.consumed)

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        with prefetching(self.datasets, (self._needs(index) for index in self._places() if index != FILLER)) as advance:
            made = in_order(self._places(), lambda index: self._make(index, advance), self.workers)
            while True:
                for turn in range(self.rounds):
                    batch = next(made)
                    self.ledger.add(batch.replaced, self.consumed + self.global_batch)
                    if turn == self.rounds - 1:
                        self.consumed += self.global_batch
                    yield batch

    def _dealt(self, rank: int) -> range:
        """The micro-batches of `rank` among those of a global batch."""
        return range(rank * self.pieces // self.world_size, (rank + 1) * self.pieces // self.world_size)

    @property
    def mine(self) -> range:
        """This rank's micro-batches among those of a global batch."""
        return self._dealt(self.rank)

    def _places(self) -> Iterator[int]:
        """This rank's micro-batches by index, fillers too, without end."""
        step = self.consumed // self.global_batch
        mine = self.mine
        while True:
            for turn in range(self.rounds):
                yield step * self.pieces + mine[turn] if turn < len(mine) else FILLER
            step += 1

    def _needs(self, index: int) -> Iterable[Block]:
        return _blocks(self.datasets, self.mixture.at(index * self.micro_batch, self.micro_batch))

    def _make(self, index: int, advance: Callable[[], None]) -> MicroBatch:
        if index == FILLER:
            return filler(self.micro_batch, self.image.pixels, self.text_length if self.tokenizer else 0)
        advance()
        images = empty_images(self.micro_batch, self.image.pixels)
        start = index * self.micro_batch
        places, copies = self.mixture.at(start, self.micro_batch), self.mixture.copies(start, self.micro_batch).tolist()
        samples, replaced = [], []
        for i, place in enumerate(zip(places.dataset.tolist(), places.number.tolist(), places.epoch.tolist(), copies, strict=True)):
            sample, replacement = self._fill(start + i, *place, images[i])
            samples.append(sample)
            if replacement:
                replaced.append(replacement)
        batch = collate(index, samples, images)
        return replace(
            batch,
            tokens=self.tokenizer(batch.texts, self.text_length) if self.tokenizer else None,
            mix=draw_mix(self.image, self.seed, int(places.epoch[0]), index),
            replaced=tuple(replaced),
        )

    def _fill(
        self, position: int, dataset: int, number: int, epoch: int, copy: int, out: torch.Tensor
    ) -> tuple[Sample, Replacement | None]:
        """Write the view of the sample at `position` to `out`, or that of the first readable one in its place."""
        source, known = self.datasets[dataset], self.ledger.at(position)
        if known and (known.dataset, known.number) != (dataset, number):
            raise DataError(f"data {source.directory.url}: the ledger tells of another sample at position {position} than stands there")
        why: Replacement | None = known
        for candidate in chain([known.by if known else number], substitutes(self.seed, epoch, number, len(source))):
            try:
                sample = source.read(candidate)
            except BadSample as e:
                why = why or Replacement(position, dataset, number, number, e.shard, e.key, e.reason, e.detail)
                continue
            if source.classes and sample.label >= len(source.classes):
                raise DataError(
                    f"data {source.directory.url}: the label of sample {sample.key} is {sample.label}, and its manifest has "
                    f"{len(source.classes)} classes (allowed: 0 to {len(source.classes) - 1}, -1 for none)"
                )
            try:
                random = Random(self.seed, dataset, epoch, candidate, copy)
                training_view(sample.image, self.image, random, out, source.manifest.decoded)
            except ValueError as e:
                shard = source.shards[source.locate(candidate)[0]].name
                why = why or Replacement(position, dataset, number, number, shard, sample.key, "undecodable", str(e)[:200])
            else:
                return sample, replace(why, by=candidate) if why else None
        raise DataError(f"data {source.directory.url}: none of the samples tried in place of {number} can be read, the last is {candidate}")


def open_stream(
    url: str | Collection,
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
    deny: Sequence[str] = (),
    where: Mapping[str, Bound] | None = None,
    block: int | None = None,
    cache: Cache | None = None,
    bad: float = 0.01,
    replaced: Iterable[Mapping[str, Any]] = (),
    tokenizer: Tokenizer | None = None,
    text_length: int = 77,
) -> Stream:
    """Training micro-batches for one rank, of the dataset at `url` less what `deny` and `where` leave out, or of a collection
    that is open already.

    `image` says how to view an image, by default in random-resized crops of `size`; `replaced` is the ledger of the
    checkpoint that `consumed` comes from, and `bad` the largest fraction of samples that may be replaced.

    Raises:
        DataError: no such dataset or split. ConfigError: images smaller than the model's input.
    """
    how = image or Image(pixels=size)
    if isinstance(url, Collection):
        collection = url
    else:
        collection = open_collection([Data(url=url, deny=list(deny), where=dict(where or {}))], split, endpoint, block=block, cache=cache)
    collection.check_pixels(how)
    return Stream(
        collection.datasets,
        collection.mixture(seed, global_batch, how.repeats),
        how,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
        consumed=consumed,
        tokenizer=tokenizer,
        text_length=text_length,
        ledger=Ledger.from_values(replaced, bad),
    )


def _blocks(datasets: Sequence[Dataset], places: Places) -> Iterable[Block]:
    found: dict[Block, None] = {}
    for d, number in zip(places.dataset.tolist(), places.number.tolist(), strict=True):
        if not datasets[d].directory.is_local:
            found[datasets[d], *datasets[d].block_of(number)] = None
    return found
