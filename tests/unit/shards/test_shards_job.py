from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from pipeline.config import Config, parse_config
from pipeline.core.errors import DataError, StorageError
from pipeline.core.storage import Storage
from pipeline.shards import job
from pipeline.shards import manifest as manifests
from pipeline.shards.deny import DenyListWriter
from pipeline.shards.job import dataset_fingerprint, make_dataset
from pipeline.shards.manifest import find_manifest, read_manifest, read_shards

pytestmark = pytest.mark.usefixtures("cluster")


def config(source: Path, **shard: object) -> Config:
    section = {"source": {"url": str(source)}, "splits": {"train": 0.7, "test": 0.3}, "size": "60 KiB", **shard}
    return parse_config({"name": "t", "storage": "runs", "shard": section})


def names(directory: Storage) -> list[str]:
    """What readers see."""
    return [name for name in directory.names() if name != ".plan"]


def contents(directory: Storage) -> dict[str, bytes]:
    return {name: directory.read(name) for name in names(directory)}


def test_the_whole_stage(tree: Path, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "shards"))
    manifest, metrics = make_dataset(config(tree), directory)
    assert read_manifest(directory) == manifest
    assert (manifest.read, manifest.written, manifest.ignored) == (82, 80, 2)
    assert manifest.dropped == {"corrupt": 1, "empty": 1}
    assert [(d["file"], d["reason"]) for d in manifest.dropped_samples] == [("cat/nothing.png", "empty"), ("dog/damaged.jpg", "corrupt")]
    assert "premature end" in manifest.dropped_samples[1]["detail"].lower() and manifest.unnamed == 0
    assert manifest.classes == ["cat", "dog"] and sum(manifest.splits.values()) == 80
    assert manifest.smallest == (40, 32) and manifest.source == str(tree)
    assert {k: metrics[f"shard/{k}"] for k in ("read", "written", "dropped", "ignored")} == {
        "read": 82,
        "written": 80,
        "dropped": 2,
        "ignored": 2,
    }
    assert metrics["shard/images_per_s"] > 0 and metrics["shard/bytes"] == manifest.bytes

    records = [r for split in ("train", "test") for r in read_shards(directory, split)]
    assert len(read_shards(directory, "train")) > 1 and all(r.bytes <= 60 * 1024 for r in records)
    of_shards = {n for r in records for n in (r.name, r.index_name)}
    assert set(names(directory)) == of_shards | {"manifest.json", "shards.parquet"}
    read = [s for r in records for s in wds.WebDataset(str(tmp_path / "shards" / r.name), shardshuffle=False)]
    assert len({s["__key__"] for s in read}) == 80
    for sample in read:
        path = json.loads(sample["json"])["source"]
        assert manifest.classes[int(sample["cls"])] == path.partition("/")[0]
        assert sample[path.rpartition(".")[2]] == (tree / path).read_bytes()
        assert sample["txt"] == (tree / path).with_suffix(".txt").read_bytes()


def test_the_number_of_workers_changes_nothing(tree: Path, tmp_path: Path) -> None:
    made = []
    for workers in (1, 2):
        directory = Storage(str(tmp_path / f"shards-{workers}"))
        make_dataset(config(tree, workers=workers, images={"resize": {"pixels": 24}}), directory)
        made.append(contents(directory))
    assert made[0] == made[1]


def test_a_finished_dataset_is_kept_and_another_replaces_it(tree: Path, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "shards"))
    first, _ = make_dataset(config(tree), directory)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir() if p.name != ".plan"}
    assert make_dataset(config(tree, workers=1), directory) == (first, {})
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir() if p.name != ".plan"} == before

    for name in ("takedown", "duplicates"):
        with DenyListWriter(directory, name, {}) as out:
            out.add(pa.table({"key": ["a" * 20]}))
            out.publish({})
    second, metrics = make_dataset(config(tree, splits={"all": 1.0}, size="10 MiB"), directory)
    assert metrics and second.hash != first.hash
    assert names(directory) == ["all-00000.index.parquet", "all-00000.tar", "deny", "manifest.json", "shards.parquet"]
    assert directory.names("deny") == ["takedown.parquet"]  # keys are the same, so what was taken down would come back


def test_what_makes_another_dataset() -> None:
    """A dataset that was made by an earlier Tessera without a filter is still the same one."""

    def made(**shard: object) -> str:
        section = config(Path("x"), **shard).shard
        assert section is not None
        return dataset_fingerprint(section)

    assert made(workers=3) == "5a88d0f7185cfb7b65d35d0890baa7492b593b7197b1dbc03d49a890ca22a6c9"
    assert len({made(), made(size="1 MiB"), made(filter="builtins.bool"), made(filter="textwrap.dedent")}) == 4


def test_a_dataset_of_another_folder_is_not_taken_for_this_one(tree: Path, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "shards"))
    first, _ = make_dataset(config(tree), directory)
    tree.rename(tmp_path / "moved")
    second, metrics = make_dataset(config(tmp_path / "moved"), directory)
    assert metrics and second.hash == first.hash  # the same images are the same content, wherever they lie


def test_flat_images_with_labels_beside_them(tree: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for n, path in enumerate(sorted((tree / "dog").glob("*.png"))[:6]):
        (flat / path.name).write_bytes(path.read_bytes())
        if n:
            (flat / path.name).with_suffix(".cls").write_text(str(n % 3))
    manifest, _ = make_dataset(config(flat, splits={"train": 1.0}), Storage(str(tmp_path / "shards")))
    assert manifest.classes == ["0", "1", "2"] and manifest.written == 6


def test_nothing_usable_is_an_error_with_its_reasons(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"{n}.png").write_bytes(b"" if n % 3 else b"text")
    directory = Storage(str(tmp_path / "shards"))
    with pytest.raises(DataError, match=r"^shard.source.url: none of the 30 images in .* can be used \(20 empty, 10 not-an-image\)$"):
        make_dataset(config(tmp_path, splits={"train": 1}), directory)
    assert find_manifest(directory) is None

    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")  # once mended, the same command reads it
    manifest, _ = make_dataset(config(tmp_path, splits={"train": 1}), directory)
    assert (manifest.read, manifest.written) == (30, 1)


def test_an_unusable_source_leaves_an_earlier_dataset_alone(tree: Path, tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "shards"))
    first, _ = make_dataset(config(tree), directory)
    with pytest.raises(DataError, match="there is no folder"):
        make_dataset(config(tmp_path / "gone"), directory)
    assert read_manifest(directory) == first


def test_an_error_inside_a_task_is_told_in_its_own_words(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *_: object) -> None:
        raise StorageError(f"storage x/{name}: no permission to write")

    monkeypatch.setattr(job, "fill_shard", broken)
    with pytest.raises(
        StorageError, match=r"^shard: \d pieces of the work failed .*: test-00000.tar: storage x/test-00000.tar: no permission"
    ):
        make_dataset(config(tree), Storage(str(tmp_path / "shards")))


def test_a_directory_that_cannot_be_written_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        make_dataset(config(tree), Storage(str(tmp_path / "file" / "shards")))


def test_a_manifest_names_some_of_many_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each shard as all of them can send; and who they are does not depend on the workers."""
    assert [manifests.named_each(shards) for shards in (1, 100, 1000, 10**6)] == [1000, 1000, 100, 10]
    told = [{"file": f"{n % 7}", "reason": "empty", "detail": f"{n}"} for n in range(40)]
    monkeypatch.setattr(manifests, "NAMED", 12)
    first, again = (manifests.first_named(manifests.first_named([], some[:25]), some[25:]) for some in (told, told[::-1]))
    assert first == again and [d["file"] for d in first[5:7]] == ["0", "1"]
    (tmp_path / "in").mkdir()
    for n in range(59):
        (tmp_path / "in" / f"{n:02d}.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "59.png")
    made = []
    for workers in (1, 2):
        section = config(tmp_path / "in", splits={"train": 1.0}, samples=20, workers=workers)
        made.append(make_dataset(section, Storage(str(tmp_path / f"out-{workers}")))[0])
    assert made[0] == made[1] and (made[0].dropped, made[0].unnamed, len(made[0].dropped_samples)) == ({"empty": 59}, 47, 12)
    assert [d["file"] for d in made[0].dropped_samples] == [f"{n:02d}.png" for n in range(12)]
