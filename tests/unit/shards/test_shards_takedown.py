from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards import rows, takedown
from pipeline.shards.__main__ import main
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import Manifest, ShardTable, dataset_hash, publish
from pipeline.shards.samples import Sample
from pipeline.shards.takedown import Takedown, check_lists, match_shard, read_lists, take_down
from pipeline.shards.writer import write_shard
from pipeline.stream import open_dataset

URLS = [f"https://photos.example/{n}.jpg?size=l#{n}" for n in range(30)]


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def write(directory: Storage, keys: list[str], metas: list[dict[str, object]], per_shard: int = 10) -> None:
    written = []
    for shard, first in enumerate(range(0, len(keys), per_shard)):
        samples = [
            Sample(keys[n], Checked(picture(n), "png", 4, 4), -1, None, json.dumps(metas[n]).encode())
            for n in range(first, min(first + per_shard, len(keys)))
        ]
        made = write_shard(directory, f"train-{shard:05d}.tar", "train", samples)
        assert made is not None
        written.append(made.record)
    manifest = Manifest(
        hash=dataset_hash(written), config="none", source="made", classes=["0"], splits={"train": len(keys)}, bytes=0, read=len(keys),
        written=len(keys), ignored=0, dropped={}, dropped_samples=[], smallest=(4, 4),
    )  # fmt: skip
    publish(directory, written, manifest)


def from_urls(directory: Storage) -> None:
    """As the source `urls` makes them: keys are hashes of URLs."""
    write(directory, [sample_key(url) for url in URLS], [{"source": url, "n": n} for n, url in enumerate(URLS)])


def adopted(directory: Storage) -> None:
    """As img2dataset makes them: keys are numbers."""
    write(directory, [f"{n:09d}" for n in range(30)], [{"url": url, "key": "x"} for url in URLS])


def denied(directory: Storage) -> dict[str, str]:
    table = pq.read_table(pa.BufferReader(directory.read("deny/takedown.parquet")))
    assert table.column_names == ["key", "by"] and table["key"].to_pylist() == sorted(table["key"].to_pylist())
    return {row["key"]: row["by"] for row in table.to_pylist()}


def text_list(path: Path, *entries: str) -> str:
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("make", [from_urls, adopted])
def test_keys_urls_and_hashes_in_one_list(store: Storage, tmp_path: Path, make: Callable[[Storage], None]) -> None:
    make(store)
    dataset = open_dataset(store.url, "train", store.endpoint)
    keys = [dataset[n].key for n in range(30)]
    sha = hashlib.sha256(picture(7)).hexdigest()
    entries = [keys[3], URLS[5], "", sha.upper(), "https://photos.example/none.jpg", URLS[29] + "  ", "0" * 64, "0" * 20, URLS[5]]
    url = text_list(tmp_path / "list.txt", *entries)
    assert take_down(store, [url]) == Takedown(samples=4, entries=8, unmatched=3)
    assert denied(store) == {keys[3]: "key", keys[5]: "source", keys[7]: "sha256", keys[29]: "source"}
    left = open_dataset(store.url, "train", store.endpoint, deny=[f"{store.url}/deny/takedown.parquet"])
    assert [left[n].key for n in range(len(left))] == [key for n, key in enumerate(keys) if n not in (3, 5, 7, 29)]


@pytest.mark.usefixtures("cluster")
def test_parquet_lists_and_several(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "data"))
    from_urls(directory)
    keys = [sample_key(url) for url in URLS]
    shas = [hashlib.sha256(picture(n)).hexdigest() for n in range(30)]
    one, two, three = tmp_path / "1.parquet", tmp_path / "2.parquet", tmp_path / "3.txt"
    pq.write_table(
        pa.table({"URL": [URLS[0], None, "https://gone.example"], "sha256": [None, shas[1], shas[2]], "why": ["a", "b", "c"]}), one
    )
    pq.write_table(pa.table({"key": [keys[3], "gone", None]}), two)
    done = take_down(directory, [str(one), str(two), text_list(three, keys[2], URLS[4])])
    # A row is one entry, whatever of it is found: the third is, by its sha256. An empty row is of no sample.
    assert done == Takedown(samples=5, entries=8, unmatched=2)
    assert denied(directory) == {keys[0]: "source", keys[1]: "sha256", keys[2]: "sha256", keys[3]: "key", keys[4]: "source"}


@pytest.mark.usefixtures("cluster")
def test_a_shard_that_cannot_be_read_has_all_matched_again(tmp_path: Path) -> None:
    """No record is kept of those that were, so nothing else is said."""
    directory = Storage(str(tmp_path / "data"))
    from_urls(directory)
    index = directory.read("train-00001.index.parquet")
    directory.remove("train-00001.index.parquet")
    told = (
        r"takedown: 1 piece of the work failed \(the same command begins anew\): train-00001.tar: .*train-00001.index.parquet: is missing"
    )
    with pytest.raises(DataError, match=told):
        take_down(directory, [text_list(tmp_path / "list", URLS[0], URLS[15])])
    assert not directory.names("deny")
    directory.write("train-00001.index.parquet", index)
    assert take_down(directory, [str(tmp_path / "list")]).samples == 2


@pytest.mark.usefixtures("cluster")
def test_a_longer_list_replaces_the_shorter(tmp_path: Path) -> None:
    directory, path = Storage(str(tmp_path / "data")), tmp_path / "data" / "deny" / "takedown.parquet"
    from_urls(directory)
    first = text_list(tmp_path / "list", URLS[0])
    assert take_down(directory, [first], 1).samples == 1
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    assert take_down(directory, [first], 2) == Takedown(1, 1, 0)
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before  # the same list is not matched again
    text_list(tmp_path / "list", *URLS[:20])
    assert take_down(directory, [first], 2) == Takedown(20, 20, 0)
    assert len(denied(directory)) == 20
    path.unlink()
    longer = Storage(str(tmp_path / "again"))
    from_urls(longer)
    take_down(longer, [first], 1)
    take_down(directory, [first], 2)
    assert path.read_bytes() == longer.read("deny/takedown.parquet")  # whatever the workers, and what was there before
    text_list(tmp_path / "list", "nothing-of-ours")
    assert take_down(directory, [first]) == Takedown(0, 1, 1) and denied(directory) == {}


@pytest.mark.usefixtures("cluster")
def test_paths_of_a_folder(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "data"))
    paths = [f"dogs/größe {n}.jpg" for n in range(12)]
    write(directory, [sample_key(path) for path in paths], [{"source": path, "url": URLS[n]} for n, path in enumerate(paths)])
    found = take_down(directory, [text_list(tmp_path / "list", paths[2], URLS[9], "dogs/none.jpg")])
    assert found == Takedown(2, 3, 1)
    assert denied(directory) == {sample_key(paths[2]): "source", sample_key(paths[9]): "source"}


def test_samples_made_from_urls_are_matched_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = rows._read_members
    monkeypatch.setattr(rows, "_read_members", lambda d, n, index, needs: (asked.append(len(index)), read(d, n, index, needs))[1])
    for make, expected in ((from_urls, [1]), (adopted, [1, 10])):
        directory = Storage(str(tmp_path / make.__name__))
        make(directory)
        listed = read_lists([text_list(tmp_path / "list", URLS[3], URLS[12])], None)
        found, entries = match_shard(ShardTable(directory)[0], directory, listed)
        assert (len(found), entries.tolist(), asked) == (1, [0], expected)
        asked.clear()
    keys = read_lists([text_list(tmp_path / "list", "0" * 20, "f" * 64)], None)
    match_shard(ShardTable(directory)[0], directory, keys)
    assert asked == []  # no URL, no path: no json is read


def test_lists_as_they_are_matched(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two \nhttps://ü.example/a b\n".encode())
    listed = read_lists([str(path)], None)
    assert listed.count == 3 and len(listed.digests) == 8 and (np.sort(listed.digests) == listed.digests).all()
    wanted = takedown._digest(takedown._SOURCE, "https://ü.example/a b")
    [place] = np.flatnonzero(listed.digests == wanted)
    assert (listed.entries[place], listed.kinds[place]) == (2, takedown._SOURCE)
    # The same value as another thing is another digest.
    assert len({takedown._digest(kind, "a") for kind in (0, 1, 2)}) == 3
    assert not read_lists([text_list(tmp_path / "b", "a" * 64)], None).has_sources


def test_lists_that_are_none(tmp_path: Path) -> None:
    parquet = tmp_path / "other.parquet"
    pq.write_table(pa.table({"uid": ["a"]}), parquet)
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfd\n")
    (tmp_path / "broken").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").write_text("\n\n")
    for name, kind, told in [
        ("none", DataError, r"shard.takedown.0: there is no file .*none"),
        ("other.parquet", ConfigError, r"shard.takedown.0: .*other.parquet has no column key, url, sha256 \(there: uid\)"),
        ("latin", DataError, r"shard.takedown.0: .*latin is neither Parquet nor UTF-8 text"),
        ("broken", DataError, r"shard.takedown.0: .*broken cannot be read"),
        ("empty", DataError, r"shard.takedown: .*empty: there is no entry in any of them"),
    ]:
        with pytest.raises(kind, match=told):
            read_lists([str(tmp_path / name)], None)
    with pytest.raises(DataError, match=r"shard.takedown.1: there is no file"):
        check_lists([str(parquet), str(tmp_path / "none")], None)


@pytest.mark.usefixtures("cluster")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.__main__.connect_ray", lambda local: None)  # the tests' own is there
    directory = Storage(str(tmp_path / "data"))
    from_urls(directory)
    url = text_list(tmp_path / "list", URLS[1], "gone")
    done = CliRunner().invoke(main, ["takedown", directory.url, url])
    assert done.exit_code == 0 and "takedown     1 samples denied; of 2 entries 1 are of no sample" in done.output
    assert denied(directory) == {sample_key(URLS[1]): "source"}
    missing = CliRunner().invoke(main, ["takedown", directory.url, str(tmp_path / "none")])
    assert missing.exit_code == 3 and "takedown.0: there is no file" in missing.output
    nothing = CliRunner().invoke(main, ["takedown", str(tmp_path), url])
    assert nothing.exit_code == 3 and "there is no dataset here" in nothing.output
