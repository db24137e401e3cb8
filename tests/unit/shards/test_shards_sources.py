from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.shard import Fetch, Shard
from pipeline.core import retry, stores
from pipeline.core.errors import ConfigError, DataError, StorageError, UserError
from pipeline.core.storage import Storage
from pipeline.shards.dropped import Dropped
from pipeline.shards.images import Checked
from pipeline.shards.samples import Sample
from pipeline.shards.sources import Files, FolderSource, Ignored, Item, Source, TarSource, check_source, open_source, sorting
from pipeline.shards.writer import write_shard


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    return root


def shard(url: object, **more: object) -> Shard:
    return Shard.model_validate({"source": {"url": str(url), **more}})


def listed(source: Source) -> tuple[list[Item], int]:
    """All items of a source, and how many files it ignores."""
    rows = [row for part in source.parts() for row in source.rows(part)]
    return [r for r in rows if isinstance(r, Item)], sum(r.count for r in rows if isinstance(r, Ignored))


def test_a_class_is_the_first_folder(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.png", "dog/deep/b.JPG", "cat/a.webp", "cat/a.txt")
    items, ignored = listed(FolderSource(str(tmp_path)))
    assert items == [
        Item("cat/a.webp", 10, "cat", {"txt": "cat/a.txt"}),
        Item("dog/a.png", 5, "dog"),
        Item("dog/deep/b.JPG", 5, "dog"),
    ]
    assert ignored == 0
    survey = FolderSource(str(tmp_path)).survey()
    assert (survey.rows, survey.classes, survey.exact) == (3, 2, True) and survey.mean == pytest.approx(20 / 3)


def test_links_to_folders_are_followed_but_never_round_and_round(tmp_path: Path) -> None:
    """As of a subset of a larger collection, made of links to some of its classes."""
    whole, part = touch(tmp_path / "whole", "dog/a.png", "dog/deep/b.png", "cat/c.png", "loose.png"), tmp_path / "part"
    touch(part, "own/d.png")
    (part / "dog").symlink_to(whole / "dog")
    (part / "own" / "more").symlink_to(whole / "cat")
    (part / "own" / "e.png").symlink_to(whole / "loose.png")
    (part / "own" / "up").symlink_to(part)
    (whole / "dog" / "deep" / "round").symlink_to(whole / "dog")
    items, ignored = listed(FolderSource(str(part)))
    assert [(i.path, i.class_name, i.bytes) for i in items] == [
        ("dog/a.png", "dog", 5),
        ("dog/deep/b.png", "dog", 5),
        ("own/d.png", "own", 5),
        ("own/e.png", "own", 5),
        ("own/more/c.png", "own", 5),
    ]
    assert ignored == 2  # the links back


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "dog/deep/a.png", "dog/b.png")
    (tmp_path / "dog" / "deep").chmod(0)
    try:
        with pytest.raises(StorageError, match=r"^shard.source.url: storage .*/dog/deep: no permission to list$"):
            listed(FolderSource(str(tmp_path)))
    finally:
        (tmp_path / "dog" / "deep").chmod(0o755)


def test_flat_folder_with_side_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.CLS", "a.json", "a.b.png", "a.b.txt", "b.png")
    items, _ = listed(FolderSource(str(tmp_path)))
    assert {i.path: (i.class_name, i.side) for i in items} == {
        "a.jpg": (None, {"cls": "a.CLS", "json": "a.json"}),
        "a.b.png": (None, {"txt": "a.b.txt"}),
        "b.png": (None, {}),
    }


def test_a_listing_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through temporary files, many runs of them: the same rows in the same order."""
    names = [f"{'ab'[n % 2]}{n}.{rest}" for n in range(40) for rest in ("jpg", "b.png", "txt", "b.TXT", "cls", "md")[: 1 + n % 6]]
    touch(tmp_path, *names, "a.png", "caf\udce9.png", "caf\udce9.txt", "d/x.png", "d/.png/x.png", "d/e/x.txt", "d/e/x.webp", "d/e.webp")
    source = FolderSource(str(tmp_path))
    whole, ignored = listed(source)
    stamp = source.survey().stamp
    monkeypatch.setattr(sorting, "HELD", 7)
    assert listed(source) == (whole, ignored) and source.survey().stamp == stamp
    paths = [i.path for i in whole if "/" not in i.path]
    assert paths == sorted(name for name in os.listdir(tmp_path) if name.endswith(("jpg", "png"))) and len(paths) == 75
    assert sum(len(i.side) for i in whole) + ignored == len(names) + 8 - len(whole) and {len(i.side) for i in whole} == {0, 1, 2}


def test_folders_on_any_store(any_store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE", 2)
    names = ["a.png", "a.txt", "b.png", "cat/a.png", "cat/deep/b.JPG", "cat/deep/b.txt", "dog/c.png"]
    for name in names:
        any_store.write(name, b"12345")
    assert sorted(any_store.scan(), key=str) == [("a.png", 5), ("a.txt", 5), ("b.png", 5), ("cat", None), ("dog", None)]
    assert sorted(any_store.scan(deep=True)) == [(name, 5) for name in names]
    assert list((any_store / "gone").scan()) == list((any_store / "gone").scan(deep=True)) == []
    source = FolderSource(any_store.url)
    source.storage = any_store
    assert [(i.path, i.class_name, i.side) for i in listed(source)[0]] == [
        ("a.png", None, {"txt": "a.txt"}), ("b.png", None, {}), ("cat/a.png", "cat", {}),
        ("cat/deep/b.JPG", "cat", {"txt": "cat/deep/b.txt"}), ("dog/c.png", "dog", {}),
    ]  # fmt: skip
    source.storage = any_store / "a.png"
    with pytest.raises(DataError, match=r"is a file, this names a folder|there is no folder"):
        source.parts()


def test_a_folder_without_a_name_is_refused(s3: tuple[str, Callable[[], str]]) -> None:
    """Keys may have two slashes in a row: below the first level these are images as others are."""
    store = Storage(f"{s3[1]()}/in", s3[0])
    for name in ("a.png", "cat//b.png"):
        store.write(name, b"12345")
    source = FolderSource(store.url, s3[0])
    assert [(i.path, i.class_name) for i in listed(source)[0]] == [("a.png", None), ("cat//b.png", "cat")]
    store.write("/c.png", b"12345")
    with pytest.raises(DataError, match=r"^shard.source.url: s3://.*/in has objects below an empty name \(s3://.*/in//..\), rename them$"):
        source.parts()


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "a.TXT", "lone.txt", "notes.md", ".DS_Store", "._a.png", ".git/x.png", "noext", "a.mp4")
    items, ignored = listed(FolderSource(str(tmp_path)))
    assert [i.path for i in items] == ["a.png"]
    assert items[0].side == {"txt": "a.txt"}
    assert ignored == 8


def test_missing_folder_and_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^shard.source.url: there is no folder .*/gone$"):
        check_source(shard(tmp_path / "gone"))
    touch(tmp_path, "text/a.txt")
    for ask in (FolderSource(str(tmp_path)).check, FolderSource(str(tmp_path)).survey):
        with pytest.raises(DataError, match=r"^shard.source.url: the folder .* holds no images"):
            ask()
    with pytest.raises(DataError, match=r"is a file, this names a folder"):
        FolderSource(str(tmp_path / "text" / "a.txt")).parts()
    touch(tmp_path, "text/a.png")
    check_source(shard(tmp_path))


def test_a_file_named_as_its_folder_is_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png/a.png")
    assert [i.path for i in listed(FolderSource(str(tmp_path / "a.png")))[0]] == ["a.png"]


def test_the_stamp_tells_what_changed(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.png", "b.png")
    source = FolderSource(str(tmp_path))
    first = source.survey().stamp
    assert source.survey().stamp == first
    touch(tmp_path, "dog/c.png")
    second = source.survey().stamp
    (tmp_path / "b.png").write_bytes(b"longer")
    assert len({first, second, source.survey().stamp}) == 3


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^shard.source.format: 'foldr' is not known, did you mean 'folder'\? \(allowed: folder, table, tars, urls\)$"
    ):
        open_source(shard("x", format="foldr").source)
    for kind in ("folder", "tars"):
        with pytest.raises(ConfigError, match=r"^shard.source.columns: "):
            check_source(shard("x", format=kind, columns={"url": "URL"}))


def test_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(UserError, match="nosuch"):
        check_source(shard("nosuch://x/y"))


def test_a_vanished_file_is_unreadable_but_a_vanished_folder_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "in/b.png")
    source, items = FolderSource(str(tmp_path / "in")), [Item("a.png", 1), Item("b.png", 5)]
    assert dict(source.fetch(items, Fetch(), 2**20, 1)) == {
        0: Dropped("unreadable", "the file vanished after it was listed"),
        1: Files(b"12345", {}),
    }
    (tmp_path / "in").rename(tmp_path / "out")
    with pytest.raises(DataError, match="no longer there"):
        list(source.fetch(items, Fetch(), 2**20, 1))


def test_items_come_through_json_whatever_they_are_called(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(b"12345")
    items, _ = listed(FolderSource(str(tmp_path)))
    full = Item("ü/日 本.jpg", 7, "ü", {"txt": "a"}, "text\n", 3, {"score": 0.5, "tags": ["a", None]}, "key", ("part", 3, 4))
    for item in [*items, full, Item("x" * 300, 0)]:
        assert Item.decode(item.encode()) == item
    assert [files for _, files in FolderSource(str(tmp_path)).fetch(items, Fetch(), 2**20, 1)] == [Files(b"12345", {})]


class Stutters(Storage):
    """Fails once a name, and where it is `down` always."""

    down = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failed = set[str]()

    def _fail(self, key: str) -> None:
        if self.down or key not in self.failed:
            self.failed.add(key)
            raise StorageError(f"storage {self.url}/{key}: SlowDown")

    def read(self, key: str) -> bytes:
        self._fail(key)
        return super().read(key)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self._fail(key)
        return super().read_range(key, start, end)

    def exists(self, key: str = "") -> bool:
        if self.down:
            raise StorageError(f"storage {self.url}: nobody answers")
        return super().exists(key)


def test_a_store_that_stutters_costs_no_sample_and_one_that_is_away_none_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Callable[..., Image.Image], encoded: Callable[..., bytes]
) -> None:
    """What is read is the same then; and a piece of work that finds no store fails, to be tried again."""
    url = f"memory://{tmp_path.name}-{os.getpid()}"
    directory = Storage(url)
    image = encoded(photo(), "PNG")
    directory.write("pictures/a.png", image)
    directory.write("pictures/a.txt", b"a caption")
    write_shard(directory / "tars", "t.tar", "train", [Sample("a", Checked(image, "png", 48, 32), -1, b"a caption", b"{}")])
    for source in (FolderSource(f"{url}/pictures"), TarSource(f"{url}/tars")):
        items, _ = listed(source)
        source.storage = store = Stutters(source.storage.url)
        ((_, files),) = source.fetch(items, Fetch(), 1 << 20, 1)
        assert isinstance(files, Files) and (files.image, files.side["txt"]) == (image, b"a caption") and store.failed
        store.down = True
        monkeypatch.setattr(retry, "_PATIENCE", 0.0)
        with pytest.raises(StorageError, match="nobody answers"):
            list(source.fetch(items, Fetch(), 1 << 20, 1))
        monkeypatch.undo()
