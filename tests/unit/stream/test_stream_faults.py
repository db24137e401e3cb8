"""Damage and stutters: bad samples give way to the same others everywhere, and a ledger says so; stutters change nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from photographs import encoded, photograph

from pipeline.core import retry, storage
from pipeline.core.errors import ConfigError, DataError, InfrastructureError
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.shards.images import Checked
from pipeline.shards.manifest import Manifest, dataset_hash, publish
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard
from pipeline.stream import MicroBatch, Stream, open_dataset, open_stream
from pipeline.stream.ledger import Ledger, Replacement
from tests.conftest import _picture
from tests.faults import FaultyStore, faulty_store

Maker = Callable[..., Manifest]
SAMPLES, BATCH, MICRO, STEPS = 60, 20, 4, 6  # two epochs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pipeline.stream.reader.SMALL", 0)  # or else a shard comes in one request


@pytest.fixture(params=["file", "s3"])
def directory(request: pytest.FixtureRequest, make_dataset: Maker, tmp_path: Path) -> Storage:
    if request.param == "file":
        where = Storage(str(tmp_path / "data"))
    else:
        endpoint, make_bucket = request.getfixturevalue("s3")
        where = Storage(make_bucket(), endpoint)
    make_dataset(where, {"train": SAMPLES}, per_shard=20)
    return where


def stream(directory: Storage, rank: int = 0, world_size: int = 1, **more: object) -> Stream:
    options = {"global_batch": BATCH, "micro_batch": MICRO, "size": 8, "block": 4, "seed": 3, "bad": 1.0, **more}
    return open_stream(directory.url, endpoint=directory.endpoint, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]


def take(made: Stream, steps: int = STEPS) -> list[MicroBatch]:
    return list(islice(iter(made), steps * made.rounds))


def same(one: list[MicroBatch], two: list[MicroBatch]) -> bool:
    return [(b.index, b.keys) for b in one] == [(b.index, b.keys) for b in two] and all(
        torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True)
    )


def flip(directory: Storage, shard: str, at: int = 700) -> None:
    data = bytearray(directory.read(shard))
    data[at] ^= 1
    directory.write(shard, bytes(data))


def cut_between_members(directory: Storage, shard: str, samples: int) -> None:
    """As webdataset cannot see: the archive just ends, after some whole samples, with a proper end mark."""
    data = directory.read(shard)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        keys = list(dict.fromkeys(m.name.split(".")[0] for m in tar.getmembers()))
        end = next(m.offset for m in tar.getmembers() if m.name.startswith(keys[samples]))
    directory.write(shard, data[:end] + bytes(10240))


DAMAGE: dict[str, tuple[Callable[[Storage], None], str, int]] = {
    "a flipped bit": (lambda d: flip(d, "train-00001.tar"), "checksum", 1),
    "cut between members": (lambda d: cut_between_members(d, "train-00001.tar", 15), "truncated", 5),
    "a shard that is gone": (lambda d: d.remove("train-00001.tar"), "missing", 20),
    "an index that is gone": (lambda d: d.remove("train-00001.index.parquet"), "missing", 20),
    "an index that is damaged": (lambda d: d.write("train-00001.index.parquet", b"PAR1 no more"), "index", 20),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_samples_are_replaced_and_told(directory: Storage, name: str) -> None:
    damage, reason, count = DAMAGE[name]
    sound = take(stream(directory))
    damage(directory)
    (Path(storage.tempfile.gettempdir()) / "fresh").mkdir()
    storage.tempfile.tempdir += "/fresh"  # as on another machine, which has fetched nothing yet
    made = stream(directory, workers=2)
    batches = take(made)
    ledger = list(made.ledger)
    truncated_tail = {"truncated", "checksum"} if reason == "truncated" else {reason}  # its first bytes may be those of the end mark
    assert len(ledger) == 2 * count and {e.reason for e in ledger} <= truncated_tail  # once an epoch
    assert all(e.shard == "train-00001.tar" and e.detail for e in ledger)
    assert [e.position for e in ledger] == sorted(e.position for e in ledger)
    # Every other position holds what it held; these hold the sample that the ledger names.
    data = open_dataset(directory.url, endpoint=directory.endpoint)
    old, new = ([k for b in made for k in b.keys] for made in (sound, batches))
    changed = {e.position: e for e in ledger}
    for position, (before, after) in enumerate(zip(old, new, strict=True)):
        if position in changed:
            assert after == data.key_of(changed[position].by) != before
            assert changed[position].key in (before, f"in row {changed[position].number - 20}")
        else:
            assert after == before


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_agree(directory: Storage, world_size: int) -> None:
    """Whoever meets a bad sample puts the same one in its place, and the merged ledger is that of one rank alone."""
    DAMAGE["cut between members"][0](directory)
    alone = stream(directory)
    expected = take(alone)
    ranks = [stream(directory, rank, world_size, workers=rank) for rank in range(world_size)]
    made = [b for r in ranks for b in take(r) if b.weight]
    assert same(sorted(made, key=lambda b: b.index), expected)
    united = Ledger()
    assert united.merge([r.ledger.unmerged() for r in ranks], STEPS * BATCH) == list(alone.ledger)
    assert list(united) == list(alone.ledger) and len(united) > 0


def test_the_ledger_is_replayed(directory: Storage) -> None:
    """The damage has healed meanwhile, and yet a resumed run goes on as the broken one would have; only later faults are new."""
    whole = directory.read("train-00001.tar")
    DAMAGE["cut between members"][0](directory)
    broken = stream(directory)
    expected = take(broken)
    assert broken.agree(World()) == list(broken.ledger)
    state = broken.state()
    directory.write("train-00001.tar", whole)
    replayed = stream(directory, workers=2)
    replayed.resume({**state, "consumed": BATCH})
    assert same(take(replayed, STEPS - 1), expected[BATCH // MICRO :])
    assert replayed.state() == state
    healed = stream(directory, consumed=BATCH)
    assert not same(take(healed, STEPS - 1), expected[BATCH // MICRO :]) and not len(healed.ledger)


def test_a_state_of_another_sequence_is_refused(directory: Storage) -> None:
    state = {**stream(directory).state(), "consumed": BATCH}
    for other, message in (({"seed": 4}, "seed: 4 differs from the checkpoint's 3"), ({"global_batch": 40}, "pretrain.batch: 40 differs")):
        with pytest.raises(ConfigError, match=message):
            stream(directory, **other).resume(state)


def test_prefetched_faults_do_not_count(directory: Storage) -> None:
    DAMAGE["a shard that is gone"][0](directory)
    made = stream(directory, workers=4, block=1)
    batches = take(made, 1)
    assert 0 < len(made.ledger) == sum(len(b.replaced) for b in batches) < 20


def test_a_replacement_that_is_bad_too(directory: Storage) -> None:
    """Two of three shards are gone: what stands in must come from the third."""
    directory.remove("train-00000.tar")
    directory.remove("train-00002.tar")
    made = stream(directory)
    keys = {k for b in take(made, 3) for k in b.keys}
    data = open_dataset(directory.url, endpoint=directory.endpoint)
    assert keys == {data.key_of(n) for n in range(20, 40)} and len(made.ledger) == 40


def test_nothing_left_to_read(directory: Storage) -> None:
    for n in range(3):
        directory.remove(f"train-0000{n}.tar")
    with pytest.raises(DataError, match=r"none of the samples tried in place of .* can be read"):
        take(stream(directory), 1)


def test_too_many(directory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stream.ledger._GRACE", 1000)
    DAMAGE["a shard that is gone"][0](directory)
    with pytest.raises(
        DataError,
        match=r"pretrain.loader.bad: 1\d of \d+ samples could not be read, more than the allowed fraction 0.01; the last is sample "
        r"[0-9a-f]{20} in train-00001.tar: the shard or its index is gone",
    ):
        take(stream(directory, bad=0.01))
    with pytest.raises(DataError, match=r"pretrain.loader.bad: \d+ of \d+ samples could not be read, more than the allowed fraction 0;"):
        take(stream(directory, bad=0.0))


def test_the_limit_is_of_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stream.ledger._GRACE", 1000)
    entry = Replacement(7, 0, 1, 2, "a.tar", "k", "checksum", "its crc32 differs")
    ledger = Ledger(limit=0.001)
    assert ledger.merge([[entry], []], 5000) == [entry]
    more = [replace(entry, position=n) for n in range(20, 25)]
    with pytest.raises(DataError, match="6 of 5000 samples"):
        ledger.merge([more[:2], more[2:]], 5000)


def test_an_undecodable_image(tmp_path: Path) -> None:
    """Its header is fine and its bytes are as indexed, so only decoding can tell."""
    where = Storage(str(tmp_path / "data"))
    samples = [
        Sample(f"{n:020x}", Checked(_picture(n, 8, 8, 0, 1)[: 100 if n == 3 else None], "png", 8, 8), 0, None, b"{}") for n in range(8)
    ]
    written = write_shard(where, "train-00000.tar", "train", samples)
    assert written is not None
    publish(
        where,
        [written.record],
        Manifest(
            hash=dataset_hash([written.record]), config="none", source="made", classes=["a"], splits={"train": 8}, bytes=1, read=8, written=8,
            ignored=0, dropped={}, dropped_samples=[], smallest=(8, 8),
        ),
    )  # fmt: skip
    made = open_stream(str(tmp_path / "data"), global_batch=8, micro_batch=8, size=8)
    batch = next(iter(made))
    [entry] = batch.replaced
    assert (entry.reason, entry.key, entry.shard) == ("undecodable", f"{3:020x}", "train-00000.tar")
    assert f"{3:020x}" not in batch.keys and len(batch.keys) == 8


# A store that stutters


@pytest.fixture
def stuttering(s3: tuple[str, Callable[[], str]], make_dataset: Maker) -> Iterator[tuple[Storage, FaultyStore]]:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    make_dataset(Storage(bucket, endpoint), {"train": SAMPLES}, per_shard=20)
    with faulty_store(endpoint) as (proxy, store):
        yield Storage(bucket, proxy), store


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_and_resets_change_nothing(
    stuttering: tuple[Storage, FaultyStore], tmp_path: Path, make_dataset: Maker, workers: int
) -> None:
    directory, store = stuttering
    make_dataset(Storage(str(tmp_path / "local")), {"train": SAMPLES}, per_shard=20)
    expected = take(stream(Storage(str(tmp_path / "local"))))
    made = stream(directory, workers=workers)
    store.randomly(0.3, "error reset cut")
    assert same(take(made), expected) and not len(made.ledger)
    assert store.seen["error"] > 0 and store.seen["reset"] > 0 and store.seen["cut"] > 0


def test_a_stall_is_given_up_and_tried_again(stuttering: tuple[Storage, FaultyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request hangs; those for other blocks go on beside it."""
    directory, store = stuttering
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 1)
    fs_class = type(directory.fs)
    fs_class.clear_instance_cache()
    made, waiting = stream(Storage(directory.url, directory.endpoint)), iter(["stall"])
    store.plan = lambda method, path: next(waiting, None) if path.endswith(".tar") else None
    store.stall = 5.0
    batches = iter(made)
    assert len([next(batches) for _ in range(15)]) == 15 and not len(made.ledger)
    assert store.seen["stall"] == 1
    fs_class.clear_instance_cache()


def test_a_store_that_stays_away(stuttering: tuple[Storage, FaultyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is bad: the machine may be restarted and go on."""
    directory, store = stuttering
    monkeypatch.setattr(retry, "_PAUSE", 0.001)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    monkeypatch.setattr(type(directory.fs), "retries", 1)  # the client's own, which take seconds
    made = stream(directory)
    store.plan = lambda method, path: "error" if path.endswith(".tar") else None
    with pytest.raises(InfrastructureError, match=r"^data s3://.*\.tar: could not be read in 3 attempts"):
        take(made, 1)


def test_damage_inside_a_foreign_image(tmp_path: Path) -> None:
    """Adopted shards were never decoded: a JPEG that is damaged at its end is found by any crop, and stray bytes are none."""
    where, sound = Storage(str(tmp_path / "data")), encoded(photograph(96, 64), "JPEG", quality=90)
    broken = bytearray(sound)
    for at in range(len(sound) - 300, len(sound) - 100):
        broken[at] = 0xAA if broken[at] != 0xFF and broken[at - 1] != 0xFF else broken[at]
    stray = sound[:-2] + b"\x00\x01\x02" + sound[-2:]
    images = [sound, bytes(broken), stray, sound]
    samples = [Sample(f"{n:020x}", Checked(data, "jpg", 96, 64), 0, None, b"{}") for n, data in enumerate(images)]
    written = write_shard(where, "train-00000.tar", "train", samples)
    assert written is not None
    manifest = Manifest(
        hash=dataset_hash([written.record]), config="none", source="made", classes=["a"], splits={"train": 4}, bytes=1, read=4, written=4,
        ignored=0, dropped={}, dropped_samples=[], smallest=(64, 64),
    )  # fmt: skip
    publish(where, [written.record], manifest)
    batch = next(iter(open_stream(where.url, global_batch=4, micro_batch=4, size=32)))
    assert [(r.key, r.reason) for r in batch.replaced] == [(f"{1:020x}", "undecodable")]
    assert f"{2:020x}" in batch.keys
