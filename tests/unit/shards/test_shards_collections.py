"""Whole datasets out of each kind of source, of any number of ranges; and their versions."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from pipeline.config import Config, parse_config
from pipeline.config.schema import StorageSection
from pipeline.core.errors import DataError, InfrastructureError, StorageError
from pipeline.core.storage import Storage
from pipeline.shards import job, plan, tasks
from pipeline.shards.deny import DenyListWriter, find_about
from pipeline.shards.fill import fill_shard
from pipeline.shards.forecast import forecast
from pipeline.shards.job import make_dataset
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import Manifest, find_manifest, read_manifest
from pipeline.shards.sources import check_source
from pipeline.shards.table import ShardTable
from pipeline.stream.reader import open_dataset
from tests.hostile import Hostile, hostile_server

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def image(encoded: Callable[..., bytes], photo: Callable[..., Image.Image]) -> bytes:
    return encoded(photo(64, 48), "JPEG")


@pytest.fixture(scope="module")
def web(image: bytes) -> Iterator[Hostile]:
    with hostile_server(image) as server:
        yield server


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 25 rows, written in chunks of 16."""
    monkeypatch.setattr(plan, "GROUP_ROWS", 25)
    monkeypatch.setattr(plan, "CHUNK", 16)


def config(source: dict[str, Any], **shard: Any) -> Config:
    fetch = {"allow": ["127.0.0.1"], "robots": False, "retries": 0, "timeout": "5 seconds", **shard.pop("fetch", {})}
    section = {"source": source, "splits": {"train": 0.8, "test": 0.2}, "samples": 20, "fetch": fetch, **shard}
    return parse_config({"name": "t", "storage": "runs", "shard": section})


def urls(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def contents(directory: Storage) -> dict[str, bytes]:
    return {name: directory.read(name) for name in directory.names() if name != ".plan"}


def samples(directory: Storage, version: int | None = None) -> list[dict[str, Any]]:
    """As the plain webdataset library reads them."""
    names = [r.name for r in ShardTable(directory, version=version)]
    return [{**s, "shard": name} for name in names for s in wds.WebDataset(f"{directory.path}/{name}", shardshuffle=False)]


def test_urls(web: Hostile, image: bytes, tmp_path: Path, small_ranges: None) -> None:
    """Several part files and ranges; what cannot be had is counted by reason, and the ledger balances."""
    rows = [{"URL": web.url(f"good/{n}"), "TEXT": f"caption {n}", "similarity": n / 100, "label": n % 3} for n in range(90)]
    rows += [{"URL": web.url(f"status/404/{n}"), "TEXT": "", "similarity": 0.5, "label": 0} for n in range(4)]
    rows += [{"URL": web.url("page/1")}, {"URL": None}, {"URL": "ftp://x/y"}, rows[7], rows[8]]
    for n in range(5):
        urls(tmp_path / "in" / f"{n}.parquet", rows[n::5])
    made = []
    for workers in (1, 2):
        directory = Storage(str(tmp_path / f"out-{workers}"))
        manifest, metrics = make_dataset(config({"format": "urls", "url": str(tmp_path / "in")}, workers=workers), directory)
        made.append(contents(directory))
    assert made[0] == made[1]
    assert (manifest.read, manifest.written) == (99, 90) and manifest.read == manifest.written + sum(manifest.dropped.values())
    assert {**manifest.dropped}.items() >= {"http-404": 4, "no-url": 1, "duplicate-key": 2}.items()
    assert {d["file"] for d in manifest.dropped_samples if d["reason"] == "duplicate-key"} == {rows[7]["URL"], rows[8]["URL"]}
    read = {json.loads(s["json"])["source"]: s for s in samples(directory)}
    assert len(read) == 90 and metrics["shard/written"] == 90
    for row in rows[:90]:
        sample = read[row["URL"]]
        assert (sample["jpg"], sample["txt"].decode(), int(sample["cls"])) == (image, row["TEXT"], row["label"])
        assert json.loads(sample["json"])["similarity"] == row["similarity"]
    assert len({s["shard"] for s in samples(directory)}) >= 5


def test_a_network_that_is_away_drops_nothing(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead links are dropped, but where nobody at all answers, nothing is decided: the same command asks them again."""
    monkeypatch.setattr(tasks, "_ATTEMPTS", 1)
    source = {
        "format": "urls",
        "url": str(urls(tmp_path / "in.parquet", [{"url": f"http://127.0.0.2:{free_port}/{n}"} for n in range(120)])),
    }
    directory = Storage(str(tmp_path / "out"))
    with pytest.raises(InfrastructureError, match=r"train-00000.tar: none of its 120 URLs was answered \(120 refused\)"):
        make_dataset(config(source, samples=1000, splits={"train": 1.0}, fetch={"allow": ["127.0.0.2"]}), directory)
    assert find_manifest(directory) is None and not (directory / ".plan/v1/fill").names()


def test_shards_of_urls_get_their_size_by_a_probe(web: Hostile, image: bytes, tmp_path: Path) -> None:
    urls(tmp_path / "in.parquet", [{"url": web.url(f"{'status/404' if n % 4 == 0 else 'good'}/p{n}")} for n in range(600)])
    directory = Storage(str(tmp_path / "out"))
    size = 60 * (len(image) + 2600)
    manifest, _ = make_dataset(
        config({"format": "urls", "url": str(tmp_path / "in.parquet")}, samples=None, size=size, splits={"train": 1}), directory
    )
    assert (manifest.read, manifest.written) == (600, 450)
    sizes = [r.bytes for r in ShardTable(directory)]
    assert 6 <= len(sizes) <= 12 and max(sizes) < 1.5 * size and sum(sizes) / len(sizes) > 0.6 * size


def test_a_list_that_began_small_gets_whole_shards_later(
    web: Hostile, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PROBED", 3)
    directory, size = Storage(str(tmp_path / "out")), 20 * (len(image) + 2600)
    section = config({"format": "urls", "url": str(tmp_path / "in")}, samples=None, size=size, splits={"train": 1})
    for version, rows in enumerate((range(3), range(3, 63), range(63, 65)), 1):
        urls(tmp_path / "in" / f"{version}.parquet", [{"url": web.url(f"good/p{n}")} for n in rows])
        make_dataset(section, directory)
    counts = ShardTable(directory).samples.tolist()
    assert sum(counts) == 65 and len(counts) <= 6 and max(counts) > 12


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_table_with_images(
    tmp_path: Path, encoded: Callable[..., bytes], photo: Callable[..., Image.Image], shuffle: bool, small_ranges: None
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("image", kind), ("label", pa.int64()), ("caption", pa.string())], metadata={"huggingface": json.dumps(about)})
    pictures = [encoded(photo(40 + n, 32, n), "JPEG") for n in range(90)]
    for part in range(3):
        rows = [
            {"image": {"bytes": pictures[n], "path": f"{n}.jpg"}, "label": n % 3, "caption": f"n{n}"}
            for n in range(30 * part, 30 * part + 30)
        ]
        rows[0]["image"] = None
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "in" / f"{part}.parquet", row_group_size=7)
    directory = Storage(str(tmp_path / "out"))
    manifest, _ = make_dataset(config({"format": "table", "url": str(tmp_path / "in")}, shuffle=shuffle, splits={"train": 1}), directory)
    assert (manifest.read, manifest.written, manifest.dropped) == (90, 87, {"no-image": 3})
    assert manifest.classes == ["cat", "dog", "eel"] and manifest.source == str(tmp_path / "in")
    numbers = []
    for sample in samples(directory):
        number = int(sample["txt"].decode()[1:])
        assert (sample["jpg"], int(sample["cls"])) == (pictures[number], number % 3)
        numbers.append(number)
    expected = [n for n in range(90) if n % 30]
    assert (sorted(numbers), numbers == expected) == (expected, not shuffle)


def test_tars_written_anew(tmp_path: Path, make_dataset: Callable[..., Manifest], small_ranges: None) -> None:
    make_dataset(Storage(str(tmp_path / "in")), {"train": 60, "val": 10}, width=20, height=10, per_shard=25)
    directory = Storage(str(tmp_path / "out"))
    manifest, _ = job.make_dataset(config({"format": "tars", "url": str(tmp_path / "in")}, images={"resize": {"pixels": 5}}), directory)
    assert (manifest.read, manifest.written, manifest.smallest) == (70, 70, (10, 5))
    assert sorted(s["txt"].decode() for s in samples(directory)) == sorted(
        [f"train {n}" for n in range(60)] + [f"val {n}" for n in range(10)]
    )
    originals = {s["txt"]: s for s in samples(Storage(str(tmp_path / "in")))}
    assert all(
        originals[s["txt"]]["cls"] == s["cls"] and json.loads(s["json"])["n"] == json.loads(originals[s["txt"]]["json"])["n"]
        for s in samples(directory)
    )


def deny(directory: Storage, name: str, numbers: list[int]) -> None:
    """Samples of a dataset that `make_dataset` of the tests has made."""
    with DenyListWriter(directory, name, {}) as out:
        out.add(pa.table({"key": [sample_key(f"train/{n}") for n in numbers]}))
        out.publish({"numbers": numbers})


def captions(url: str) -> list[str]:
    """Of what readers see."""
    dataset = open_dataset(url)
    return sorted(str(dataset[n].text) for n in range(len(dataset)))


def test_what_a_dataset_denies_stays_out_of_what_is_made_of_it(
    tmp_path: Path, make_dataset: Callable[..., Manifest], small_ranges: None
) -> None:
    old, new = Storage(str(tmp_path / "in" / "part")), Storage(str(tmp_path / "out"))
    make_dataset(old, {"train": 60}, per_shard=25)
    (tmp_path / "in" / "part" / "train-00001.index.parquet").unlink()  # so this tar itself is looked at
    section = config({"format": "tars", "url": str(tmp_path / "in")}, splits={"train": 1.0})
    deny(old, "takedown", [1, 30, 31])
    deny(old, "score-clip", [30, 40, 59])
    first, _ = job.make_dataset(section, new)
    assert (first.read, first.written, first.dropped) == (60, 55, {"denied": 5})
    assert [d["detail"] for d in first.dropped_samples].count("it is on the deny-list deny/takedown.parquet") == 2
    assert all(d["file"].startswith("part/train-0000") for d in first.dropped_samples)
    expected = sorted(f"train {n}" for n in range(60) if n not in (1, 30, 31, 40, 59))
    assert captions(new.url) == expected and not new.exists("deny")
    assert job.make_dataset(section, new) == (first, {})

    deny(old, "takedown", [1, 30, 5, 6])  # two more, and one that may be seen again
    second, _ = job.make_dataset(section, new)
    assert (second.version, second.read, second.written, second.dropped) == (2, 60, 56, {"denied": 4})
    assert len(second.dropped_samples) == 4
    assert captions(new.url) == sorted({*expected, "train 31"} - {"train 5", "train 6"}) and find_about(new, "source") == {"keys": 2}
    assert captions(f"{new.url}@1") == sorted({*expected} - {"train 5", "train 6"})  # in all versions
    assert job.make_dataset(section, new) == (second, {})

    deny(old, "takedown", [1, 30, 5])
    assert job.make_dataset(section, new) == (second, {}) and "train 6" in captions(new.url) and "train 5" not in captions(new.url)
    old.remove("deny")
    third, _ = job.make_dataset(section, new)
    assert (third.version, third.read, third.written, third.dropped) == (3, 60, 60, {}) and not new.names("deny")
    assert captions(new.url) == sorted(f"train {n}" for n in range(60))

    pq.write_table(pa.table({"keys": ["a"]}), tmp_path / "list")
    old.put(tmp_path / "list", "deny/mine.parquet")
    with pytest.raises(DataError, match=r"shard.source.url: .*/part/deny/mine.parquet has no column 'key' \(there: keys\)"):
        job.make_dataset(section, new)


@pytest.mark.parametrize("named", ["storage", "source"])
def test_every_url_of_a_config_is_in_its_store(
    s3: tuple[str, Callable[[], str]],
    named: str,
    web: Hostile,
    image: bytes,
    make_dataset: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an S3-compatible store a config says once where it is: no environment variable is needed. A source can be in another."""
    endpoint, bucket = s3[0], s3[1]()
    store = Storage(bucket, endpoint)
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    for n in range(6):
        store.write(f"folder/{'cat' if n % 2 else 'dog'}/{n}.jpg", image)
    rows = [{"url": web.url(f"good/s3-{n}"), "text": f"{n}"} for n in range(6)]
    store.put(urls(tmp_path / "urls.parquet", rows), "urls/0.parquet")
    store.put(urls(tmp_path / "table.parquet", [{"image": image, "text": f"{n}"} for n in range(6)]), "table/0.parquet")
    make_dataset(store / "tars", {"train": 6})
    for kind in ("folder", "urls", "table", "tars"):
        source = {"format": kind, "url": f"{bucket}/{kind}/*.parquet" if kind in ("urls", "table") else f"{bucket}/{kind}"}
        storage = {"url": bucket, "endpoint": endpoint} if named == "storage" else {"url": str(tmp_path)}
        source |= {} if named == "storage" else {"endpoint": endpoint}
        section = parse_config({**config(source, splits={"train": 1.0}).model_dump(mode="json", exclude={"storage"}), "storage": storage})
        assert section.shard is not None
        check_source(section.shard, section.storage)
        assert forecast(section.shard, section.storage).rows == 6 or kind == "tars"
        directory = Storage(section.storage.url, section.storage.endpoint) / f"out-{kind}"
        manifest, _ = job.make_dataset(section, directory)
        assert (manifest.read, manifest.written) == (6, 6)


def test_an_endpoint_is_that_of_one_kind_of_store() -> None:
    storage = StorageSection(url="s3://lab/runs", endpoint="https://s3.lab")
    assert storage.endpoint_of("s3://other/images") == "https://s3.lab"
    assert [storage.endpoint_of(url) for url in ("gs://lab/images", "/images", "https://lab/list.parquet")] == [None] * 3


def test_a_folder_in_one_range_or_many(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are the same, and in the same order across the shards of a split; only the last shards of ranges are smaller."""
    section = config({"url": str(tree)}, samples=7)
    one, many = Storage(str(tmp_path / "one")), Storage(str(tmp_path / "many"))
    first, _ = make_dataset(section, one)
    monkeypatch.setattr(plan, "GROUP_ROWS", 25)
    monkeypatch.setattr(plan, "CHUNK", 16)
    second, _ = make_dataset(section, many)
    for split in ("train", "test"):
        order = [[s["__key__"] for s in samples(d) if s["shard"].startswith(split)] for d in (one, many)]
        assert order[0] == order[1]
    assert (first.read, first.dropped, first.ignored) == (second.read, second.dropped, second.ignored)
    assert len(ShardTable(many)) > len(ShardTable(one)) and max(ShardTable(many).samples) <= 7


def test_without_shuffling_samples_keep_the_order_of_the_source(tree: Path, tmp_path: Path, small_ranges: None) -> None:
    directory = Storage(str(tmp_path / "out"))
    make_dataset(config({"url": str(tree)}, shuffle=False, splits={"train": 1}), directory)
    paths = [json.loads(s["json"])["source"] for s in samples(directory)]
    assert len(paths) == 80 and paths == sorted(paths)


def test_a_piece_that_fails_is_named_and_the_others_are_kept(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, filled, tries = Storage(str(tmp_path / "out")), tmp_path / "filled", tmp_path / "tries"
    filled.mkdir()
    tries.mkdir()

    def failing(name: str, *rest: Any) -> dict[str, Any]:
        (filled / name).touch()
        if name in ("train-00001.tar", "train-00002.tar"):
            (tries / f"{name}-{len(list(tries.glob(name + '*')))}").touch()
            raise StorageError(f"storage x/{name}: cannot write (disk on fire)")
        return fill_shard(name, *rest)

    monkeypatch.setattr(job, "fill_shard", failing)
    section = config({"url": str(tree)}, samples=7)
    told = r"^shard: 2 pieces of the work failed \(the others are finished, and the same command repeats these alone\): train-00001.tar: storage x/train-00001.tar: cannot write \(disk on fire\); train-00002.tar: "
    with pytest.raises(StorageError, match=told):
        make_dataset(section, directory)
    assert len(list(tries.iterdir())) == 6  # three attempts each
    done = {name for name in directory.names() if name.endswith(".tar")}
    assert done == {p.name for p in filled.iterdir()} - {"train-00001.tar", "train-00002.tar"} and len(done) > 5

    again = tmp_path / "again"
    again.mkdir()

    def noted(name: str, *rest: Any) -> dict[str, Any]:
        (again / name).touch()
        return fill_shard(name, *rest)

    monkeypatch.setattr(job, "fill_shard", noted)
    manifest, metrics = make_dataset(section, directory)
    assert {p.name for p in again.iterdir()} == {"train-00001.tar", "train-00002.tar"}
    assert 1 <= round(metrics["shard/images_per_s"] * metrics["shard/seconds"]) <= 14 and manifest.read == 82  # its own work alone
    monkeypatch.undo()
    assert contents(directory) == contents_of(section, Storage(str(tmp_path / "whole"))) and manifest.written == 80


def contents_of(section: Config, directory: Storage) -> dict[str, bytes]:
    make_dataset(section, directory)
    return contents(directory)


def test_a_machine_that_dies_is_made_up_for(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard's first task ends as a killed process does."""
    section, died = config({"url": str(tree)}, samples=25), tmp_path / "died"
    died.mkdir()

    def dying(name: str, *rest: Any) -> dict[str, Any]:
        if not (died / name).exists():
            (died / name).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return fill_shard(name, *rest)

    expected = contents_of(section, Storage(str(tmp_path / "whole")))
    monkeypatch.setattr(job, "fill_shard", dying)
    assert contents_of(section, Storage(str(tmp_path / "out"))) == expected and len(list(died.iterdir())) > 3


def test_code_that_fails_is_no_reason_to_drop_anything(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *rest: Any) -> dict[str, Any]:
        raise ZeroDivisionError(f"in {name}")

    monkeypatch.setattr(job, "fill_shard", broken)
    with pytest.raises(InfrastructureError, match=r"pieces of the work failed .*: test-00000.tar: ZeroDivisionError: in test-00000.tar"):
        make_dataset(config({"url": str(tree)}), Storage(str(tmp_path / "out")))


def test_all_unreadable_parts_are_named(tmp_path: Path, web: Hostile) -> None:
    """Damage that no footer shows: found as rows are read, before anything is downloaded."""
    for n in range(3):
        path = urls(tmp_path / "in" / f"{n}.parquet", [{"url": web.url(f"good/{n}-{m}")} for m in range(3000)])
        if n:
            data = bytearray(path.read_bytes())
            data[100:2000] = b"\xff" * 1900
            path.write_bytes(data)
    before = len(web.seen)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match=r"2 pieces of the work failed.*1.parquet is damaged.*2.parquet is damaged"),
    ):
        patch.setattr(plan, "PIECE_PARTS", 1)
        make_dataset(config({"format": "urls", "url": str(tmp_path / "in")}), Storage(str(tmp_path / "out")))
    assert len(web.seen) == before


def test_versions(web: Hostile, tmp_path: Path, small_ranges: None) -> None:
    """New part files and more rows in an old one: only new keys are asked for; version 1 stays as it was."""
    directory, section = Storage(str(tmp_path / "out")), config({"format": "urls", "url": str(tmp_path / "in")})
    rows = [{"url": web.url(f"good/v{n}"), "text": str(n)} for n in range(150)]
    bad = [{"url": web.url(f"status/404/v{n}"), "text": ""} for n in range(3)]
    urls(tmp_path / "in" / "a.parquet", rows[:60] + bad)
    first, _ = make_dataset(section, directory)
    before, asked = contents(directory), len(web.seen)
    assert make_dataset(section, directory) == (first, {}) and len(web.seen) == asked

    urls(tmp_path / "in" / "a.parquet", [rows[3], *rows[10:70], *bad])  # some rows are gone, some are new
    urls(tmp_path / "in" / "b.parquet", [*rows[100:130], rows[5], rows[100]])
    second, metrics = make_dataset(section, directory)
    assert len(web.seen) == asked + 40 and metrics["shard/read"] == 63 + 41
    assert (second.version, second.read, second.written, second.dropped) == (2, 104, 100, {"duplicate-key": 1, "http-404": 3})
    assert read_manifest(directory, 1) == first and read_manifest(directory) == read_manifest(directory, 2) == second
    after = contents(directory)
    assert {n: after[n] for n in before if n not in ("manifest.json", "shards.parquet")}.items() <= before.items()
    assert (after["manifest-v1.json"], after["shards-v1.parquet"]) == (before["manifest.json"], before["shards.parquet"])
    assert (after["manifest-v2.json"], after["shards-v2.parquet"]) == (after["manifest.json"], after["shards.parquet"])
    assert {s["txt"] for s in samples(directory, 1)} == {str(n).encode() for n in range(60)}
    found = samples(directory)
    assert sorted(int(s["txt"]) for s in found) == [*range(70), *range(100, 130)] and len({s["__key__"] for s in found}) == 100
    for version, count in ((1, 60), (2, 100)):
        opened = [open_dataset(f"{directory.url}@{version}", split) for split in ("train", "test")]
        assert sum(len(d) for d in opened) == count and all(d.manifest.version == version for d in opened)
    assert sum(len(open_dataset(directory.url, split)) for split in ("train", "test")) == 100
    with pytest.raises(DataError, match=r"there is no version 3 \(allowed: 1, 2\)"):
        open_dataset(f"{directory.url}@3")

    assert make_dataset(section, directory) == (second, {})
    urls(tmp_path / "in" / "c.parquet", [rows[7], rows[110]])  # nothing new in it
    assert make_dataset(section, directory) == (second, {})
    urls(tmp_path / "in" / "d.parquet", rows[130:150])
    third, _ = make_dataset(section, directory)
    assert (third.version, third.written) == (3, 120) and read_manifest(directory, 2) == second and read_manifest(directory, 1) == first
    assert (tmp_path / "out" / ".plan").is_dir() and {p.name for p in (tmp_path / "out" / ".plan" / "v3").iterdir()} == {
        "known",
        "state.json",
    }


@pytest.mark.parametrize("moment", ["publish", "tidy", "write_state", "_summarise"])
def test_a_version_that_was_stopped_as_it_ended_is_published(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    directory, section = Storage(str(tmp_path / "out")), config({"url": str(tree)})
    first, _ = make_dataset(section, directory)
    for n in range(5):
        (tree / "cat" / f"new-{n}.png").write_bytes((tree / "cat" / "002.png").read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "tidy":
            real, calls = job.tidy, list[int]()
            patch.setattr(job, "tidy", lambda *a: stopped() if calls else (calls.append(1), real(*a)))  # the first is of version 1
        else:
            patch.setattr(job, moment, stopped)
        make_dataset(section, directory)
    second, _ = make_dataset(section, directory)
    assert (second.version, second.written, read_manifest(directory, 1)) == (2, 85, first)
    assert make_dataset(section, directory) == (second, {})
    assert {p.name for p in (tmp_path / "out" / ".plan" / "v2").iterdir()} == {"known", "state.json"}


def test_new_images_of_new_classes_keep_the_numbers_of_old_ones(tree: Path, tmp_path: Path) -> None:
    directory, section = Storage(str(tmp_path / "out")), config({"url": str(tree)})
    make_dataset(section, directory)
    (tree / "bee").mkdir()
    for n, path in enumerate(sorted((tree / "dog").glob("*.png"))[:20]):
        (tree / "bee" / f"{n}.png").write_bytes(path.read_bytes())
    assert make_dataset(section, directory, grow=False)[1] == {}
    second, _ = make_dataset(section, directory)
    assert (second.version, second.classes, second.written) == (2, ["cat", "dog", "bee"], 100)
    numbers = Counter((json.loads(s["json"])["source"].partition("/")[0], int(s["cls"])) for s in samples(directory))
    assert set(numbers) == {("cat", 0), ("dog", 1), ("bee", 2)}


def test_a_source_that_is_gone_leaves_its_dataset(tree: Path, tmp_path: Path) -> None:
    directory, section = Storage(str(tmp_path / "out")), config({"url": str(tree)})
    first, _ = make_dataset(section, directory)
    tree.rename(tmp_path / "away")
    assert make_dataset(section, directory) == (first, {})


def test_a_source_that_changes_while_it_is_read(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that vanishes after it was listed is a reason; one that comes is for the next version."""
    directory, section, real = Storage(str(tmp_path / "out")), config({"url": str(tree)}), job.clear

    def meanwhile(*arguments: Any, is_first: bool) -> None:
        real(*arguments, is_first=is_first)
        (tree / "cat" / "000.jpg").unlink()
        (tree / "cat" / "new.jpg").write_bytes((tree / "cat" / "004.jpg").read_bytes())

    monkeypatch.setattr(job, "clear", meanwhile)
    first, _ = make_dataset(section, directory)
    assert first.dropped == {"corrupt": 1, "empty": 1, "unreadable": 1} and first.read == 82
    monkeypatch.undo()
    second, _ = make_dataset(section, directory)
    assert (second.version, second.read, second.written) == (2, 83, 80)


def test_odd_names(tmp_path: Path, encoded: Callable[..., bytes], photo: Callable[..., Image.Image]) -> None:
    data = encoded(photo(), "PNG")
    deep = "/".join("x" * 60 for _ in range(5))
    for name in ("a b.png", "日本/ü ö.png", f"{deep}/y.png", "c/d/e.f.g.png", "c/'\"\\$&.png", "new\nline.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    directory = Storage(str(tmp_path / "out"))
    manifest, _ = make_dataset(config({"url": str(tmp_path / "in")}, splits={"train": 1}), directory)
    assert manifest.written == 6 and len({s["__key__"] for s in samples(directory)}) == 6
    assert {json.loads(s["json"])["source"] for s in samples(directory)} >= {"日本/ü ö.png", "new\nline.png", f"{deep}/y.png"}
