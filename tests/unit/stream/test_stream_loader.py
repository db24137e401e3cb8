from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.inputs import Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream import MicroBatch, Stream, open_dataset, open_stream
from pipeline.stream.batches import FILLER, evaluation_batches, in_order
from pipeline.stream.collection import check_pixels
from pipeline.stream.text import Tokenizer

Maker = Callable[..., Manifest]
BATCH, MICRO = 20, 4  # five micro-batches: no world size but 1 and 5 divides them
PIECES = BATCH // MICRO
STEPS = 6


@pytest.fixture(scope="module")
def url(make_dataset: Maker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 samples for training in three shards, 12 for testing."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(Storage(str(folder)), {"train": 50, "test": 12}, width=12, height=10)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests fetched of the same bytes would hide damage."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def stream(url: str, rank: int = 0, world_size: int = 1, workers: int = 0, **more: object) -> Stream:
    options = {"global_batch": BATCH, "micro_batch": MICRO, "size": 8, **more}
    return open_stream(url, rank=rank, world_size=world_size, workers=workers, **options)  # type: ignore[arg-type]


def take(made: Stream, steps: int) -> list[MicroBatch]:
    return list(islice(iter(made), steps * made.rounds))


def same(one: MicroBatch, two: MicroBatch) -> bool:
    return (one.index, one.keys, one.texts, one.weight) == (two.index, two.keys, two.texts, two.weight) and all(
        torch.equal(a, b) for a, b in ((one.images, two.images), (one.labels, two.labels))
    )


@pytest.fixture(scope="module")
def alone(url: str) -> list[MicroBatch]:
    return take(stream(url), STEPS)


def test_what_a_micro_batch_holds(url: str, alone: list[MicroBatch]) -> None:
    batch = alone[0]
    assert (batch.index, batch.weight, len(batch.keys)) == (0, 1.0, MICRO)
    assert batch.images.shape == (MICRO, 8, 8, 3) and batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
    by_key = {s.key: s for s in (open_dataset(url)[n] for n in range(50))}
    for key, label, text in zip(batch.keys, batch.labels.tolist(), batch.texts, strict=True):
        assert (by_key[key].label, by_key[key].text) == (label, text)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_world_size_changes_nothing(url: str, alone: list[MicroBatch], world_size: int, workers: int) -> None:
    ranks = [take(stream(url, rank, world_size, workers), STEPS) for rank in range(world_size)]
    assert {len(r) for r in ranks} == {STEPS * -(-PIECES // world_size)}  # collectives match
    real = sorted((b for r in ranks for b in r if b.weight), key=lambda b: b.index)
    assert len(real) == len(alone) == STEPS * PIECES
    assert all(same(a, b) for a, b in zip(real, alone, strict=True))
    for rank in ranks:
        for filler in (b for b in rank if not b.weight):
            assert filler.weight == 0.0 and filler.images.shape == (MICRO, 8, 8, 3) and len(filler.labels) == MICRO
        steps = [{b.index // PIECES for b in rank[i : i + len(rank) // STEPS] if b.weight} for i in range(0, len(rank), len(rank) // STEPS)]
        assert all(s <= {n} for n, s in enumerate(steps))  # every rank is in the same step


def test_more_ranks_than_micro_batches(url: str, alone: list[MicroBatch]) -> None:
    ranks = [take(stream(url, rank, 7), 2) for rank in range(7)]
    assert [len(r) for r in ranks] == [2] * 7 and sorted(sum(b.weight for b in r) for r in ranks) == [0] * 2 + [2] * 5
    assert sorted(b.index for r in ranks for b in r if b.weight) == list(range(10))
    assert {b.index for r in ranks for b in r if not b.weight} == {FILLER}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 1)])
def test_resuming_goes_on_exactly(url: str, alone: list[MicroBatch], world_size: int, workers: int) -> None:
    """From any step, and at any other world size."""
    for consumed in (BATCH, 3 * BATCH):
        ranks = [take(stream(url, r, world_size, workers, consumed=consumed), 2) for r in range(world_size)]
        real = sorted((b for r in ranks for b in r if b.weight), key=lambda b: b.index)
        rest = alone[consumed // MICRO :][: 2 * PIECES]
        assert len(real) == len(rest) and all(same(a, b) for a, b in zip(real, rest, strict=True))


def test_every_sample_once_an_epoch(url: str) -> None:
    """50 is no multiple of the batch, 20: batches run on over the epoch's end, and nothing is lost or doubled."""
    keys = [k for b in take(stream(url), 10) for k in b.keys]
    epochs = [keys[n : n + 50] for n in range(0, 200, 50)]
    assert all(len(set(epoch)) == 50 for epoch in epochs) and epochs[0] != epochs[1]


def test_views_differ_by_epoch_and_seed(url: str, alone: list[MicroBatch]) -> None:
    by_key: dict[str, list[torch.Tensor]] = {}
    for batch in alone:
        for key, image in zip(batch.keys, batch.images, strict=True):
            by_key.setdefault(key, []).append(image)
    twice = [images for images in by_key.values() if len(images) > 1]
    assert len(twice) == 50 and sum(torch.equal(a, b) for a, b, *_ in twice) < 5
    assert take(stream(url, seed=1), 1)[0].keys != alone[0].keys


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_consumed_counts_what_was_handed_out(url: str, world_size: int, workers: int) -> None:
    """Never what is only prefetched, and a step only when its last micro-batch is out."""
    made = stream(url, 0, world_size, workers)
    batches, seen = iter(made), []
    for _ in range(2 * made.rounds):
        next(batches)
        seen.append(made.consumed)
    assert seen == [0] * (made.rounds - 1) + [BATCH] * made.rounds + [2 * BATCH]


def test_positions_inside_a_batch_are_refused(url: str) -> None:
    for options in ({"consumed": 7}, {"micro_batch": 3}):
        with pytest.raises(ValueError, match="must be a multiple of micro_batch"):
            stream(url, **options)


def test_in_order_runs_ahead_but_hands_over_in_order() -> None:
    started: list[int] = []

    def make(n: int) -> MicroBatch:
        started.append(n)
        time.sleep(0.02 if n % 2 == 0 else 0)  # the even ones are late
        return MicroBatch(n, torch.empty(0), torch.empty(0), [], [], 1.0)

    made = in_order(iter(range(1000)), make, 3)
    assert [next(made).index for _ in range(20)] == list(range(20))
    assert len(started) <= 20 + 2 * 3 + 1
    made.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_an_error_of_a_thread_arrives() -> None:
    def make(n: int) -> MicroBatch:
        raise DataError("sample 3 is damaged")

    with pytest.raises(DataError, match="sample 3 is damaged"):
        next(in_order(iter(range(10)), make, 2))


def test_captions_become_tokens(url: str) -> None:
    tokenizer = Tokenizer.train(["train one two three", "train two three four"] * 5, 600)
    batch = take(stream(url, tokenizer=tokenizer, text_length=12, workers=2), 1)[0]
    assert batch.tokens is not None and torch.equal(batch.tokens, tokenizer(batch.texts, 12)) and batch.tokens.shape == (MICRO, 12)
    assert (batch.tokens[:, 0] == tokenizer.sot).all() and (batch.tokens.max(dim=1).values == tokenizer.eot).all()
    assert take(stream(url), 1)[0].tokens is None


def test_mixing_is_drawn_by_micro_batch(url: str) -> None:
    """The same at any world size; none without mixup and CutMix."""
    how = Image(pixels=8, mixup=0.8, cutmix=1.0)
    alone = take(stream(url, image=how), 3)
    ranks = [take(stream(url, r, 3, image=how), 3) for r in range(3)]
    made = sorted((b for r in ranks for b in r if b.weight), key=lambda b: b.index)
    assert [b.mix for b in made] == [b.mix for b in alone] and len({b.mix for b in alone}) == 3 * PIECES
    assert all(b.mix is None for b in take(stream(url), 1))


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once(url: str, world_size: int, workers: int) -> None:
    dataset = open_dataset(url, "test")
    made = [b for rank in range(world_size) for b in evaluation_batches(dataset, 8, 5, rank, world_size, workers)]
    made.sort(key=lambda b: b.index)
    assert [len(b.keys) for b in made] == [5, 5, 2]
    assert [k for b in made for k in b.keys] == [dataset[n].key for n in range(12)]
    assert torch.equal(torch.cat([b.labels for b in made]), torch.from_numpy(dataset.labels()))


def test_evaluation_of_some(url: str) -> None:
    dataset = open_dataset(url, "test")
    made = list(evaluation_batches(dataset, 8, 2, numbers=[7, 1, 4]))
    assert [k for b in made for k in b.keys] == [dataset[n].key for n in (7, 1, 4)]


# The dataset


def test_dataset(url: str) -> None:
    train, test = open_dataset(url), open_dataset(f"{url}@1", "test")
    assert (len(train), len(test), train.classes) == (50, 12, ["0", "1", "2"])
    assert [train[n].text for n in (0, 19, 20, 49)] == ["train 0", "train 19", "train 20", "train 49"]
    assert train[41].meta == {"n": 41} and train[41].label == 41 % 3
    assert (train.labels() == np.arange(50) % 3).all()
    assert train.view != test.view and train.view == open_dataset(url).view


@pytest.mark.parametrize(
    ("suffix", "split", "message"),
    [
        ("", "val", r"there is no split 'val' \(allowed: test, train\)"),
        ("@2", "train", r"there is no version 2 \(allowed: 1\)"),
        ("/none", "train", r"data .*/none: there is no dataset here \(no manifest.json\)"),
    ],
)
def test_what_is_not_there(url: str, suffix: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(url + suffix, split)


def test_small_images_are_refused(url: str) -> None:
    dataset = open_dataset(url)
    check_pixels(dataset, Image(pixels=10))
    check_pixels(dataset, Image(pixels=11, enlarge=True))
    with pytest.raises(
        ConfigError,
        match=r"pretrain.image.pixels: 11 is more than the smallest side in the dataset, 10 pixels; choose 10 or less, or set enlarge: true",
    ):
        check_pixels(dataset, Image(pixels=11))
    with pytest.raises(ConfigError, match="is more than the smallest side"):
        stream(url, size=11)


@pytest.fixture(params=["file", "s3"])
def damageable(request: pytest.FixtureRequest, make_dataset: Maker, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "file":
        directory = Storage(str(tmp_path))
    else:
        endpoint, make_bucket = request.getfixturevalue("s3")
        directory = Storage(make_bucket(), endpoint)
    make_dataset(directory, {"train": 8}, width=12, height=10)
    yield directory


def everything(directory: Storage, workers: int = 0) -> list[MicroBatch]:
    return list(evaluation_batches(open_dataset(directory.url, endpoint=directory.endpoint), 8, 4, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_flipped_bit_is_noticed(damageable: Storage, workers: int) -> None:
    shard = bytearray(damageable.read("train-00000.tar"))
    shard[700] ^= 1
    damageable.write("train-00000.tar", bytes(shard))
    with pytest.raises(DataError, match=r"data .*/train-00000.tar: sample [0-9a-f]{20}: the bytes are not those the index names"):
        everything(damageable, workers)


def test_a_cut_shard_is_noticed(damageable: Storage) -> None:
    damageable.write("train-00000.tar", damageable.read("train-00000.tar")[:3000])
    with pytest.raises(
        DataError, match=r"train-00000.tar: sample [0-9a-f]{20}: the shard ends before the sample does \(\d+ of \d+ bytes\)"
    ):
        everything(damageable)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("train-00000.tar", r"train-00000.tar: sample [0-9a-f]{20}: the shard or its index is gone \(the shard is not there\)"),
        ("train-00000.index.parquet", r"the shard or its index is gone \(train-00000.index.parquet is not there\)"),
        ("shards.parquet", "shards.parquet: is missing"),
    ],
)
def test_a_lost_file_is_one_sentence(damageable: Storage, lost: str, message: str) -> None:
    damageable.remove(lost)
    with pytest.raises(DataError, match=message):
        everything(damageable)


def test_files_are_closed_again(make_dataset: Maker, tmp_path: Path) -> None:
    """More shards than are kept open at once."""
    make_dataset(Storage(str(tmp_path)), {"train": 320}, per_shard=1)
    dataset = open_dataset(str(tmp_path), "train")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(320):
        assert dataset[number].image
    assert 200 < len(os.listdir("/proc/self/fd")) - before <= 256


def test_from_an_object_store(s3: tuple[str, Callable[[], str]], make_dataset: Maker, url: str, alone: list[MicroBatch]) -> None:
    directory = Storage(s3[1]() + "/data", s3[0])
    make_dataset(directory, {"train": 50, "test": 12}, width=12, height=10)
    made = take(stream(directory.url, workers=2, endpoint=directory.endpoint), 2)
    local = take(stream(url, block=64), 2)
    assert all(same(a, b) for a, b in zip(made, local, strict=True))
    made = take(stream(directory.url, workers=2, endpoint=directory.endpoint, block=1), 2)
    assert all(same(a, b) for a, b in zip(made, alone, strict=False))


def test_a_label_out_of_range_is_one_sentence(make_dataset: Maker, tmp_path: Path) -> None:
    """Adopting and sharding leave none behind; a manifest that somebody changed may."""
    make_dataset(Storage(str(tmp_path)), {"train": 20})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["0", "1"]}))
    with pytest.raises(DataError, match=r"the label of sample \w+ is 2, and its manifest has 2 classes \(allowed: 0 to 1, -1 for none\)"):
        next(iter(open_stream(str(tmp_path), global_batch=20, micro_batch=20, size=8)))
