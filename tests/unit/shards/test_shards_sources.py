from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.shard import Shard
from pipeline.core.errors import ConfigError, DataError, UserError
from pipeline.shards.sources import FolderSource, Item, check_source, open_source


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    return root


def shard(url: object, **more: object) -> Shard:
    return Shard.model_validate({"source": {"url": str(url), **more}})


def test_a_class_is_the_first_folder(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.png", "dog/deep/b.JPG", "cat/a.webp", "cat/a.txt")
    listing = FolderSource(str(tmp_path)).scan()
    assert listing.classes == ["cat", "dog"]
    assert listing.items == [
        Item("cat/a.webp", 10, "cat", {"txt": "cat/a.txt"}),
        Item("dog/a.png", 5, "dog"),
        Item("dog/deep/b.JPG", 5, "dog"),
    ]
    assert listing.ignored == 0


def test_flat_folder_with_side_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.CLS", "a.json", "a.b.png", "a.b.txt", "b.png")
    listing = FolderSource(str(tmp_path)).scan()
    assert listing.classes == []
    assert {i.path: (i.class_name, i.side) for i in listing.items} == {
        "a.jpg": (None, {"cls": "a.CLS", "json": "a.json"}),
        "a.b.png": (None, {"txt": "a.b.txt"}),
        "b.png": (None, {}),
    }


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "a.TXT", "lone.txt", "notes.md", ".DS_Store", "._a.png", ".git/x.png", "noext", "a.mp4")
    listing = FolderSource(str(tmp_path)).scan()
    assert [i.path for i in listing.items] == ["a.png"]
    assert listing.items[0].side == {"txt": "a.txt"}
    assert listing.ignored == 8


def test_missing_folder_and_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^shard.source.url: there is no folder .*/gone$"):
        check_source(shard(tmp_path / "gone"))
    touch(tmp_path, "text/a.txt")
    with pytest.raises(DataError, match=r"^shard.source.url: the folder .* holds no images"):
        check_source(shard(tmp_path))
    with pytest.raises(DataError, match=r"is a file, this names a folder"):
        FolderSource(str(tmp_path / "text" / "a.txt")).scan()
    touch(tmp_path, "text/a.png")
    check_source(shard(tmp_path))


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^shard.source.format: 'foldr' is not known, did you mean 'folder'\? \(allowed: folder\)$"):
        open_source(shard("x", format="foldr").source)
    with pytest.raises(ConfigError, match=r"^shard.source.columns: "):
        check_source(shard("x", columns={"url": "URL"}))


def test_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(UserError, match="nosuch"):
        check_source(shard("nosuch://x/y"))
