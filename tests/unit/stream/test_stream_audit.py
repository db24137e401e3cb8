"""Lost 0, repeated 0, order equal: for world sizes x decoding workers x resume points, and for what hypothesis thinks of.

`pytest -s tests/unit/stream/test_stream_audit.py` prints the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream import MicroBatch, open_stream

SAMPLES, BATCH, MICRO = 97, 24, 4  # a prime number of samples: no batch ends with an epoch
PIECES = BATCH // MICRO
WORLDS, WORKERS = (1, 2, 3, 5, 7, 8), (0, 1, 2, 3, 4)
STEPS = 9  # more than two epochs
BLOCKS = (1, 4)  # as on local disks, and as on object stores but smaller


@pytest.fixture(scope="module")
def url(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("audit")
    make_dataset(Storage(str(folder)), {"train": SAMPLES}, per_shard=40)
    return str(folder)


def steps(url: str, block: int, world_size: int, workers: int, first: int, count: int, seed: int = 5) -> list[list[MicroBatch]]:
    """What all ranks of a world see in each of `count` steps from step `first` on; real micro-batches by index."""
    ranks = []
    for rank in range(world_size):
        stream = open_stream(
            url, global_batch=BATCH, micro_batch=MICRO, rank=rank, world_size=world_size, workers=workers, seed=seed,
            consumed=first * BATCH, size=8, block=block,
        )  # fmt: skip
        batches = list(islice(iter(stream), count * stream.rounds))
        assert len(batches) == count * -(-PIECES // world_size) and stream.consumed == (first + count) * BATCH
        ranks.append([batches[i * stream.rounds : (i + 1) * stream.rounds] for i in range(count)])
    return [sorted((b for rank in ranks for b in rank[i] if b.weight), key=lambda b: b.index) for i in range(count)]


@pytest.fixture(scope="module")
def alone(url: str) -> dict[int, list[list[MicroBatch]]]:
    """An unbroken run of one rank that decodes in line."""
    return {block: steps(url, block, 1, 0, 0, STEPS) for block in BLOCKS}


def audit(alone: list[list[MicroBatch]], made: list[list[MicroBatch]], first: int) -> tuple[int, int, bool]:
    """(samples lost, samples repeated, are the batches those of the unbroken run, to the pixel)."""
    expected = [b for step in alone[first : first + len(made)] for b in step]
    found = [b for step in made for b in step]
    want, got = (Counter(k for b in batches for k in b.keys) for batches in (expected, found))
    equal = [(b.index, b.keys, b.texts) for b in expected] == [(b.index, b.keys, b.texts) for b in found]
    equal = equal and all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(expected, found, strict=True))
    return sum((want - got).values()), sum((got - want).values()), equal


@pytest.mark.parametrize("block", BLOCKS)
def test_every_sample_once_an_epoch(alone: dict[int, list[list[MicroBatch]]], block: int) -> None:
    keys = [k for step in alone[block] for b in step for k in b.keys]
    epochs = [keys[:SAMPLES], keys[SAMPLES : 2 * SAMPLES]]
    assert all(len(set(epoch)) == SAMPLES for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", WORLDS)
def test_audit(url: str, alone: dict[int, list[list[MicroBatch]]], world_size: int) -> None:
    for workers in WORKERS:
        for first in (0, 4, 7):
            block = BLOCKS[(workers + first) % 2]
            lost, repeated, equal = audit(alone[block], steps(url, block, world_size, workers, first, 2), first)
            print(
                f"{world_size} ranks, {workers} workers, block {block}, from sample {first * BATCH}: lost {lost}, repeated {repeated}, order equal {equal}"
            )
            assert (lost, repeated, equal) == (0, 0, True)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_that_is_cut_and_resumed_anywhere_is_the_unbroken_run(
    url: str, alone: dict[int, list[list[MicroBatch]]], data: st.DataObject
) -> None:
    """Any number of interruptions, each going on at another world size with other workers."""
    block, step, made = data.draw(st.sampled_from(BLOCKS)), 0, []
    while step < STEPS:
        count = data.draw(st.integers(1, STEPS - step))
        made += steps(url, block, data.draw(st.sampled_from(WORLDS)), data.draw(st.sampled_from(WORKERS)), step, count)
        step += count
    assert audit(alone[block], made, 0) == (0, 0, True)
