"""Reading ahead of need: around a slow request, not too far, each block once; and opening what is as large as it gets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream import Stream, open_dataset, open_stream, prefetch
from pipeline.stream.batches import evaluation_batches
from tests.faults import FaultyStore, faulty_store

SAMPLES, SHARD = 480, 160


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pipeline.stream.reader.SMALL", 0)  # or else a shard comes in one request


@pytest.fixture
def store(s3: tuple[str, Callable[[], str]], make_dataset: Callable[..., Manifest]) -> Iterator[tuple[Storage, FaultyStore]]:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    make_dataset(Storage(bucket, endpoint), {"train": SAMPLES}, per_shard=SHARD)
    with faulty_store(endpoint) as (proxy, faulty):
        yield Storage(bucket, proxy), faulty


def stream(directory: Storage, **more: object) -> Stream:
    options = {"global_batch": 32, "micro_batch": 8, "size": 8, "endpoint": directory.endpoint, "block": 8, **more}
    return open_stream(directory.url, **options)  # type: ignore[arg-type]


def tar_requests(faulty: FaultyStore) -> int:
    return sum(n for path, n in faulty.requests.items() if path.endswith(".tar"))


def test_each_block_once(store: tuple[Storage, FaultyStore]) -> None:
    """Two epochs: 60 blocks of 8 and three indices are fetched, and no byte of a shard twice."""
    directory, faulty = store
    made = stream(directory, workers=2)
    keys = [k for b in islice(iter(made), 2 * SAMPLES // 8) for k in b.keys]
    assert len(set(keys)) == SAMPLES and tar_requests(faulty) == SAMPLES // 8
    assert sum(n for path, n in faulty.requests.items() if path.endswith(".index.parquet")) == 3
    size = sum(len(directory.read(f"train-{n:05d}.tar")) for n in range(3))
    assert sum(p.stat().st_size for p in (Path(made.datasets[0].cache.path)).iterdir() if "-index" not in p.name) <= size


def test_a_small_dataset_comes_in_large_parts(store: tuple[Storage, FaultyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stream.reader.SMALL", 1 << 29)
    directory, faulty = store
    assert len({k for b in islice(iter(stream(directory, workers=2)), SAMPLES // 8) for k in b.keys}) == SAMPLES
    assert tar_requests(faulty) == 3


def test_it_runs_ahead_and_not_too_far(store: tuple[Storage, FaultyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, faulty = store
    monkeypatch.setattr("pipeline.stream.batches.AHEAD", 10 * 8 * 3584)  # ten blocks of eight samples of 3.5 kB
    batches = iter(stream(directory))
    next(batches)
    time.sleep(1.5)
    few = tar_requests(faulty)
    time.sleep(0.5)
    assert 4 <= few == tar_requests(faulty) <= 30
    for _ in range(20):
        next(batches)
    time.sleep(1.0)
    assert tar_requests(faulty) > few
    batches.close()  # type: ignore[attr-defined]


def test_it_does_not_plan_for_ever(store: tuple[Storage, FaultyStore]) -> None:
    """Where all blocks are here already, nothing but the number of batches holds it back."""
    planned = []

    def needs() -> Iterator[list[prefetch.Block]]:
        while True:
            planned.append(1)
            yield []

    prefetcher = prefetch.Prefetcher(needs(), 1 << 30)
    time.sleep(0.5)
    first = len(planned)
    for _ in range(100):
        prefetcher.advance()
    time.sleep(0.5)
    prefetcher.close()
    assert first <= prefetch.BATCHES + 1 and first < len(planned) <= first + 101


def test_around_slow_requests(store: tuple[Storage, FaultyStore]) -> None:
    """Each takes 0.3 s, one of them 3 s: one after the other that were 21 s."""
    directory, faulty = store
    slow = iter([3.0])

    def plan(method: str, path: str) -> None:
        time.sleep((next(slow, 0.0) or 0.3) if path.endswith(".tar") else 0)

    faulty.plan = plan
    batches = iter(stream(directory))
    began = time.monotonic()
    for _ in range(SAMPLES // 8):
        next(batches)
    seconds = time.monotonic() - began
    print(f"60 batches of 60 blocks in {seconds:.2f} s")
    assert tar_requests(faulty) == SAMPLES // 8 and seconds < 6


def test_evaluation_reads_ahead_too(store: tuple[Storage, FaultyStore]) -> None:
    directory, faulty = store
    dataset = open_dataset(directory.url, endpoint=directory.endpoint, block=8)
    made = list(evaluation_batches(dataset, 8, 20, workers=1))
    assert [k for b in made for k in b.keys] == [dataset.key_of(n) for n in range(SAMPLES)]
    assert tar_requests(faulty) == SAMPLES // 8


def test_threads_end_with_the_stream(store: tuple[Storage, FaultyStore]) -> None:
    import threading

    before = set(threading.enumerate())  # of other tests, some of which stay as long as the process
    batches = iter(stream(store[0], workers=2))
    next(batches)
    assert any(t.name == "prefetch" for t in set(threading.enumerate()) - before)
    batches.close()  # type: ignore[attr-defined]
    patience = time.monotonic() + 10  # a request under way ends by itself; closing does not wait for it
    while (
        left := [t.name for t in set(threading.enumerate()) - before if t.name.startswith(("prefetch", "fetch", "decode"))]
    ) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left


def test_a_window_must_fit_the_cache(store: tuple[Storage, FaultyStore]) -> None:
    from pipeline.config.data import Data
    from pipeline.config.inputs import Cache
    from pipeline.core.errors import ConfigError
    from pipeline.stream import open_collection

    data = open_collection([Data(url=store[0].url)], endpoint=store[0].endpoint, block=8)
    data.check_cache(Cache())
    with pytest.raises(
        ConfigError, match=r"pretrain.loader.cache.size: 1.0 MiB is too small for the samples that are mixed at a time, which need 1"
    ):
        data.check_cache(Cache(size=1 << 20))


def test_prefetching_gives_up_quietly_and_reading_tells(store: tuple[Storage, FaultyStore]) -> None:
    """A shard that is gone: the thread that fetches ahead goes on, and the ledger has it."""
    directory, _ = store
    directory.remove("train-00001.tar")
    made = stream(directory, workers=2, bad=1.0)
    keys = [k for b in islice(iter(made), SAMPLES // 8) for k in b.keys]
    assert len(keys) == SAMPLES and len(made.ledger) == SHARD and prefetch.CONNECTIONS > 1


# At scale

HUGE = """
import json, sys, time
from pipeline.stream import open_stream
def mib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
before = mib("VmRSS")
began = time.monotonic()
stream = open_stream(sys.argv[1], global_batch=32768, micro_batch=256, rank=5, world_size=64, consumed=int(sys.argv[2]) // 32768 * 32768, size=8)
places = stream.mixture.at(next(stream._places()) * 256, 256)
opened = time.monotonic() - began
numbers = places.number
assert len(set(numbers.tolist())) == 256 and 0 <= numbers.min() and numbers.max() < 5_000_000_000
print(json.dumps({"seconds": opened, "mib": mib("VmHWM") - before, "samples": len(stream.datasets[0])}))
"""


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest and table of 1,000,000 shards of 5,000 samples."""
    import numpy as np
    import pyarrow as pa

    from pipeline.shards.table import ROW_GROUP, SHARDS_SCHEMA

    count, folder = 1_000_000, tmp_path_factory.mktemp("million")
    import pyarrow.parquet as pq

    names = [f"train-{n:07d}.tar" for n in range(count)]
    digests = [f"{n:064x}" for n in np.random.default_rng(0).integers(0, 2**62, count).tolist()]
    table = pa.table([names, ["train"] * count, np.full(count, 5000), np.full(count, 200_000_000), digests], schema=SHARDS_SCHEMA)
    by_name = pq.SortingColumn.from_ordering(SHARDS_SCHEMA, [("name", "ascending")])
    pq.write_table(table, folder / "shards.parquet", row_group_size=ROW_GROUP, compression="zstd", sorting_columns=by_name)
    manifest = {
        "hash": "h", "config": "none", "source": "made", "classes": [], "splits": {"train": 5000 * count}, "bytes": 0, "read": 0, "written": 0,
        "ignored": 0, "dropped": {}, "dropped_samples": [], "smallest": [256, 256], "version": 1, "format": 1,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize("consumed", [0, 3_456_789_012, 123_456_789_012])
def test_a_million_shards_open_anywhere(million: str, consumed: int) -> None:
    """5 billion samples: at the beginning, in the first epoch, in the 25th."""
    out = json.loads(
        subprocess.run([sys.executable, "-c", HUGE, million, str(consumed)], capture_output=True, text=True, check=True).stdout
    )
    print(f"at sample {consumed:,}: {out['seconds']:.2f} s, {out['mib']:.0f} MiB")
    assert out["samples"] == 5_000_000_000 and out["seconds"] < 2 and out["mib"] < 300
