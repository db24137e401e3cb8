"""Duplicates of a dataset, found on Ray: what is denied, who stays, and that nothing but the images decides over it."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.config.shard import Duplicates, Shard
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards import __main__ as command
from pipeline.shards.duplicates import find
from pipeline.shards.duplicates.dataset import ordered_splits, shard_parts
from pipeline.shards.duplicates.find import Sizes, find_duplicates
from pipeline.shards.duplicates.hashes import ensure_hashes
from pipeline.shards.duplicates.stage import treat_copies
from pipeline.shards.manifest import Manifest, ShardRecord, publish, read_manifest
from pipeline.stream import open_dataset
from tests.unit.shards.copies import CHANGES, denied, key_of, views, write_hashes, write_pictures
from tests.unit.stream.photographs import encoded

pytestmark = pytest.mark.usefixtures("cluster")
SMALL = Sizes(part=300, range=64 * 120, piece=8)  # several of everything


def collection(random: np.random.Generator, count: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Keys, sha256, perceptual hashes, and who has one: with equal files, equal hashes, and families that are a few bits apart."""
    keys = [key_of(str(n)) for n in range(count)]
    shas, hashes = random.integers(0, 256, (count, 32), dtype=np.uint8), random.integers(0, 2**64 - 1, count, dtype=np.uint64)
    for _ in range(count // 4):
        a, b = random.integers(0, count, 2)
        hashes[a] = hashes[b] ^ np.uint64(sum(1 << int(bit) for bit in random.choice(64, random.integers(0, 4), replace=False)))
    for a, b in random.integers(0, count, (count // 8, 2)):
        shas[a], hashes[a] = shas[b], hashes[b]
    return keys, shas, hashes, shas[:, 0] > 20


def one_by_one(
    keys: list[str], shas: np.ndarray, hashes: np.ndarray, has: np.ndarray, near: int | None
) -> dict[str, tuple[str, int, bool]]:
    """Of each that goes, the first before it that stays and is equal or near, the distance, and whether the files are equal."""
    files, values, stay, gone = [bytes(s) for s in shas], hashes.tolist(), list[int](), {}
    for n in range(len(keys)):
        for before in stay:
            distance = (values[n] ^ values[before]).bit_count()
            if files[n] == files[before]:
                gone[keys[n]] = keys[before], 0, True
                break
            if near is not None and has[n] and has[before] and distance <= near:
                gone[keys[n]] = keys[before], distance, False
                break
        else:
            stay.append(n)
    return gone


@pytest.mark.parametrize("near", [None, 0, 3])
def test_it_is_what_going_through_one_by_one_gives(tmp_path: Path, near: int | None) -> None:
    """Whatever the number of workers, and however the work is cut: the same bytes."""
    made, lists = collection(np.random.default_rng(near or 7), 1000), []
    for number, (workers, sizes) in enumerate([(1, Sizes()), (2, SMALL)]):
        directory = Storage(str(tmp_path / str(number)))
        write_hashes(directory, {"test": 150, "train": 850}, *made, per_shard=70)
        found = find_duplicates(directory, Duplicates(near=near), workers, sizes)
        lists.append((directory.read("deny/duplicates.parquet"), directory.read("duplicates.json")))
    assert lists[0] == lists[1]
    rows = denied(directory, "duplicates")
    want = one_by_one(*made, near)
    assert {row["key"]: (row["of"], row["distance"], row["exact"]) for row in rows} == want and len(rows) == len(want)
    assert [row["key"] for row in rows] == sorted(want)
    place = {key: n for n, key in enumerate(made[0])}
    for row in rows:
        n = place[str(row["key"])]
        split, shard = ("test", n // 70) if n < 150 else ("train", (n - 150) // 70)
        assert (row["split"], row["shard"]) == (split, f"{split}-{shard:05d}.tar")
    for split in ("test", "train"):
        of = [row["exact"] for row in rows if row["split"] == split]
        assert found["denied"][split] == {"exact": sum(map(bool, of)), "near": len(of) - sum(map(bool, of))}


def pictures() -> dict[str, list[tuple[str, bytes]]]:
    """A test of two pictures; for training, copies of these and of others, some changed."""
    whole = [encoded(picture, "JPEG", quality=95) for picture in views()]
    train = [(f"train/{n}", whole[n]) for n in range(1, 12)]  # 1 is in the test
    train += [("copy of 3", whole[3]), ("copy of 0", whole[0])]
    train += [(f"{name} of {4 + n}", change(views()[4 + n])) for n, (name, change) in enumerate(CHANGES.items())]
    flat = [encoded(Image.new("RGB", (90 + n, 80), color), "PNG") for n, color in enumerate(("red", "white"))]
    train += [("red", flat[0]), ("white", flat[1]), ("red again", flat[0])]
    return {"train": train, "test": [("test/0", whole[0]), ("test/1", whole[1])]}


def test_copies_of_photographs(tmp_path: Path) -> None:
    """Encoded anew, resized, brighter. The test keeps its own; flat pictures are copies of equal files alone."""
    directory = Storage(str(tmp_path))
    write_pictures(directory, pictures())
    found = find_duplicates(directory, Duplicates(near=4), 2)
    exact = {"train/1": "test/1", "copy of 3": "train/3", "copy of 0": "test/0", "red again": "red"}
    near = {f"{name} of {4 + n}": f"train/{4 + n}" for n, name in enumerate(CHANGES)}
    rows = denied(directory, "duplicates")
    for which, names in ((True, exact), (False, near)):
        assert {row["key"]: row["of"] for row in rows if row["exact"] is which} == {key_of(a): key_of(b) for a, b in names.items()}
    assert found["denied"] == {"test": {"exact": 0, "near": 0}, "train": {"exact": 4, "near": len(CHANGES)}}
    assert len(open_dataset(directory.url)) == 22 - 4 - len(CHANGES) and len(open_dataset(directory.url, "test")) == 2
    assert len(open_dataset(directory.url, own_deny=False)) == 22
    find_duplicates(directory, Duplicates(), 2)  # another question: the list is made anew
    assert {row["key"] for row in denied(directory, "duplicates")} == {key_of(name) for name in exact}


def test_what_was_found_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Storage(str(tmp_path))
    write_pictures(directory, pictures())
    found = find_duplicates(directory, Duplicates(near=4), 2)
    monkeypatch.setattr(find, "_Search", lambda *args: pytest.fail("looked for again"))
    assert find_duplicates(directory, Duplicates(near=4), 2) == found
    monkeypatch.undo()
    listed = directory.read("deny/duplicates.parquet")
    directory.remove("deny")
    assert find_duplicates(directory, Duplicates(near=4), 2) == found and directory.read("deny/duplicates.parquet") == listed
    directory.write("duplicates.json", b"{")
    with pytest.raises(DataError, match=r"duplicates.json: this is not JSON"):
        find_duplicates(directory, Duplicates(near=4), 2)


def test_a_dataset_without_hashes_gets_them(tmp_path: Path) -> None:
    """The same as if it had been written with them; its shards and its manifest stay."""
    written, adopted = Storage(str(tmp_path / "written")), Storage(str(tmp_path / "adopted"))
    write_pictures(written, pictures())
    write_pictures(adopted, pictures(), hashed=False)
    with pytest.raises(DataError, match=r"t\w+-00000.index.parquet: there is no column 'phash'"):
        find_duplicates(adopted, Duplicates(near=4), 2)
    before = {name: adopted.read(name) for name in adopted.names() if name.endswith((".tar", "manifest.json", "shards.parquet"))}
    ensure_hashes(adopted, 2)
    ensure_hashes(written, 2)
    assert before == {name: adopted.read(name) for name in before}
    for name in (n for n in written.names() if n.endswith(".index.parquet")):
        ours, theirs = (pq.read_table(io.BytesIO(d.read(name)))["phash"].to_pylist() for d in (written, adopted))
        assert (ours == theirs and None in ours) or "train-00003" not in name
    for directory in (written, adopted):
        find_duplicates(directory, Duplicates(near=4), 2)
    assert written.read("deny/duplicates.parquet") == adopted.read("deny/duplicates.parquet")


def test_an_index_that_is_gone(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    write_pictures(directory, pictures())
    (tmp_path / "train-00001.index.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00001.index.parquet: is missing"):
        find_duplicates(directory, Duplicates(), 2)
    assert not (tmp_path / "deny").exists() and not (tmp_path / "duplicates.json").exists()


def test_too_many_that_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = collection(np.random.default_rng(0), 300)
    made[2][:] = [sum(1 << int(b) for b in np.random.default_rng(n).choice(64, 2, replace=False)) for n in range(300)]
    directory = Storage(str(tmp_path))
    write_hashes(directory, {"train": 300}, *made, per_shard=100)
    with pytest.raises(
        ConfigError, match=r"shard.duplicates.near: 4 bits are too many for this dataset, in which .* hashes have more than 10"
    ):
        find_duplicates(directory, Duplicates(near=4), 2, Sizes(pairs=10))


def test_splits_for_evaluation_come_first() -> None:
    assert ordered_splits(["train", "val", "train-extra", "test"]) == ["test", "val", "train", "train-extra"]


def test_shards_come_by_number(tmp_path: Path) -> None:
    """So that what a later version appends loses against what was there, beyond 100,000 shards too."""
    directory, names = Storage(str(tmp_path)), [f"train-{n:05d}.tar" for n in (2, 99_999, 100_000, 10_001)]
    records = [ShardRecord(name, "train", 1, 512, "0" * 64) for name in names]
    publish(directory, records, Manifest("", "", "", [], {"train": 4}, 2048, 4, 4, 0, {}, []))
    assert [p.name for p in shard_parts(directory)] == [f"train-{n:05d}.tar" for n in (2, 10_001, 99_999, 100_000)]


def test_a_later_version_has_a_list_of_its_own(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    write_pictures(directory, pictures())
    find_duplicates(directory, Duplicates(), 2)
    manifest = json.loads(directory.read("manifest.json"))
    directory.write("manifest.json", json.dumps(manifest | {"version": 2, "hash": "another"}).encode())
    first = directory.read("deny/duplicates.parquet")
    find_duplicates(directory, Duplicates(near=4), 2)
    assert directory.read("deny/duplicates.parquet") == first and len(denied(directory, "duplicates-v2")) == 4 + len(CHANGES)
    assert len(open_dataset(directory.url)) == 22 - 4 - len(CHANGES)
    directory.write("manifest.json", json.dumps(manifest).encode())
    assert len(open_dataset(directory.url)) == 22 - 4


def test_the_stage(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    write_pictures(directory, pictures())
    shard = Shard.model_validate({"source": {"url": "x"}, "images": {"hash": True}, "duplicates": {"near": 4}, "workers": 2})
    want = {"shard/duplicates/exact": 4, "shard/duplicates/near": len(CHANGES)}
    assert treat_copies(directory, shard) == treat_copies(directory, shard) == want
    assert treat_copies(directory, shard.model_copy(update={"duplicates": None})) == {}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(Storage(str(tmp_path)), pictures(), hashed=False)
    monkeypatch.setattr(command, "connect_ray", lambda local: None)  # it is
    with warnings.catch_warnings():
        done = CliRunner().invoke(command.main, ["duplicates", str(tmp_path), "--near", "4", "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert "24 images" in done.output and f"denied of train: 4 equal files, {len(CHANGES)} near" in done.output
    assert read_manifest(Storage(str(tmp_path))).version == 1
    none = CliRunner().invoke(command.main, ["duplicates", str(tmp_path / "none")])
    assert none.exit_code == 3 and "there is no dataset here" in none.output
