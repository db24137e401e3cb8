"""Several datasets as one sequence: by weight, without replacement inside each, exact anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import Data
from pipeline.config.inputs import Image
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream import MicroBatch, Stream, open_collection, open_stream
from pipeline.stream.mixture import PARTS, Mixture, whole_shares
from pipeline.stream.order import Order

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def mixture(sizes: list[int], weights: list[float], repeats: int = 1) -> Mixture:
    return Mixture([Order(np.array([n]), f"d{i}", 1) for i, n in enumerate(sizes)], weights, repeats)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, data=st.data())
def test_shares_and_epochs(weights: list[float], data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 60)) for _ in weights]
    mix = mixture(sizes, weights)
    places = mix.at(0, 2000)
    for d, size in enumerate(sizes):
        mine = places.dataset == d
        share = np.arange(1, 2001) * weights[d] / sum(weights)
        assert np.abs(np.cumsum(mine) - share).max() <= len(weights) + 2000 * len(weights) / PARTS
        numbers, epochs = places.number[mine], places.epoch[mine]
        assert (epochs == np.arange(len(numbers)) // size).all()
        for epoch in range(len(numbers) // size):
            assert (np.sort(numbers[epoch * size : (epoch + 1) * size]) == np.arange(size)).all()


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 3000), count=st.integers(1, 200), repeats=st.integers(1, 3))
def test_any_stretch_is_the_same_alone(weights: list[float], start: int, count: int, repeats: int) -> None:
    sizes = [7 * (i + 2) for i in range(len(weights))]
    whole, part = mixture(sizes, weights, repeats).at(0, 3200), mixture(sizes, weights, repeats).at(start, count)
    for name in ("dataset", "number", "epoch"):
        assert (getattr(part, name) == getattr(whole, name)[start : start + count]).all()


def test_far_positions() -> None:
    """Beyond any run: 10^12 samples."""
    places = mixture([5000, 3], [0.999, 0.001]).at(10**12, 10_000)
    assert (places.dataset == 1).sum() in (9, 10, 11) and (places.number >= 0).all() and places.epoch.max() > 10**8


def test_repeats() -> None:
    """Views of one sample follow each other; an epoch is as many times as long."""
    mix = mixture([10], [1.0], repeats=3)
    places = mix.at(0, 60)
    assert (places.number.reshape(-1, 3) == places.number[::3, None]).all() and mix.copies(4, 5).tolist() == [1, 2, 0, 1, 2]
    assert [Counter(places.number[i : i + 30].tolist()) for i in (0, 30)] == [Counter(list(range(10)) * 3)] * 2


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_whole_shares(weights: list[float]) -> None:
    shares = whole_shares(weights)
    assert sum(shares) == PARTS and min(shares) >= 1


@pytest.fixture(scope="module")
def urls(make_dataset: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("mixed")
    for name, count, classes in (("a", 40, 3), ("b", 25, 3), ("c", 10, 2)):
        make_dataset(Storage(str(root / name)), {name: count}, classes=classes)
        # The same split name in each.
        for split in (name,):
            _rename(root / name, split, "train")
    return [str(root / name) for name in "abc"]


def _rename(folder: Path, old: str, new: str) -> None:
    manifest = (folder / "manifest.json").read_text().replace(f'"{old}":', f'"{new}":')
    (folder / "manifest.json").write_text(manifest)
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "shards.parquet").to_pydict()
    table["split"] = [new] * len(table["split"])
    import pyarrow as pa

    pq.write_table(pa.table(table), folder / "shards.parquet")


def stream(urls: list[str], weights: list[float | None], rank: int = 0, world_size: int = 1, **more: object) -> Stream:
    collection = open_collection([Data(url=u, weight=w) for u, w in zip(urls, weights, strict=True)], block=4)
    options = {"global_batch": 20, "micro_batch": 4, "size": 8, "seed": 2, **more}
    return open_stream(collection, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]


def take(made: Stream, steps: int) -> list[MicroBatch]:
    return list(islice(iter(made), steps * made.rounds))


def test_a_stream_of_three(urls: list[str]) -> None:
    alone = take(stream(urls, [2.0, 1.0, 1.0]), 10)
    texts = [t for b in alone for t in b.texts]
    assert [sum(t.startswith(name) for t in texts) for name in "abc"] == pytest.approx([100, 50, 50], abs=1)
    assert len({t for t in texts[:80] if t.startswith("a")}) == 40  # each of its samples, once
    for world_size, workers in ((2, 0), (3, 2)):
        ranks = [stream(urls, [2.0, 1.0, 1.0], rank, world_size, workers=workers, consumed=60) for rank in range(world_size)]
        made = sorted((b for r in ranks for b in take(r, 3) if b.weight), key=lambda b: b.index)
        assert [(b.index, b.keys) for b in made] == [(b.index, b.keys) for b in alone[15:30]]


def test_without_weights_all_samples_come_once(urls: list[str]) -> None:
    texts = [t for b in take(stream(urls, [None] * 3), 4) for t in b.texts][:75]
    assert len(set(texts)) >= 73  # the shares are those of the sizes, to a sample


def test_views_and_classes(urls: list[str]) -> None:
    views = [stream(urls[:2], w).view for w in ([1.0, 1.0], [2.0, 2.0], [2.0, 1.0])]
    assert views[0] == views[1] != views[2] and stream(urls[:1], [None]).view not in views
    both = open_collection([Data(url=u) for u in urls[:2]])
    assert both.classes == ["0", "1", "2"] and both.samples == 65 and both.weights == [40, 25]
    with pytest.raises(ConfigError, match=r"data: .*/c has other classes than .*/a, so their labels cannot be mixed"):
        _ = open_collection([Data(url=u) for u in urls]).classes


def test_repeated_augmentation(urls: list[str]) -> None:
    """arXiv 1901.09335: other views of a sample, one beside the other."""
    made = take(stream(urls[:1], [None], image=Image(pixels=8, repeats=2, enlarge=True, scale=(0.3, 0.9))), 4)
    keys = [k for b in made for k in b.keys]
    assert keys[::2] == keys[1::2] and len(set(keys[:80])) == 40
    assert sum((b.images[0::2] != b.images[1::2]).any().item() for b in made) > len(made) / 2
