"""Where images come from: what there is to read, without reading it.

A source lists `Item`s (an image, its class, its side files) and reads one file at a time. New kinds of source are added
to `SOURCES`, under the word that `shard.source.format` names them by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.shard import Shard, Source
from pipeline.core.errors import ConfigError, CredentialsError, DataError, StorageError, choose
from pipeline.core.storage import Storage

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
SIDE_SUFFIXES = frozenset({"txt", "cls", "json"})


@dataclass(frozen=True)
class Item:
    """One image: `path` names it in its source (a relative path, a URL, a table and row), `bytes` of it and its side files (0 where that
    is not known beforehand), `side` their paths by suffix. A table gives caption, label and what else it has (`extra`) itself."""

    path: str
    bytes: int
    class_name: str | None = None
    side: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    label: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """Items sorted by path; class names sorted, so that a name's place is its class id; files that are no images, counted."""

    items: list[Item]
    classes: list[str]
    ignored: int


class FolderSource:
    """A folder of images on any storage: a class a sub-folder, or flat.

    The first folder of an image's relative path is its class; an image that lies directly in the source has the integer
    of its `.cls` side file, or no label. `<stem>.txt`, `.cls` and `.json` beside an image are its side files. Every other
    file, and whatever is hidden (`.git`, `._photo.jpg`), is ignored and counted.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.storage = Storage(url)

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError, or StorageError where the file is there but cannot be read."""
        return self.storage.read(path)

    def is_there(self) -> bool:
        """Whether the folder itself still answers. Raises StorageError where nobody does."""
        return self.storage.exists()

    def check(self) -> None:
        """Raise what `scan` would raise, without building the list.

        Raises:
            DataError: there is no such folder, or it holds no images.
            StorageError: it cannot be listed.
        """
        if not any(_is_image(path) for path, _ in self._files()):
            self._refuse()

    def scan(self) -> Listing:
        """List everything; raises as `check` does."""
        images: list[tuple[str, int]] = []
        others: dict[str, tuple[str, int]] = {}  # lower-case suffix and stem -> path, bytes
        ignored = 0
        for path, size in self._files():
            suffix = _suffix(path)
            if _is_image(path):
                images.append((path, size))
            elif suffix in SIDE_SUFFIXES and not _is_hidden(path):
                # `a.TXT` and `a.txt` are two files for one member: the later in order is taken, the other ignored.
                ignored += f"{_stem(path)}.{suffix}" in others
                others[f"{_stem(path)}.{suffix}"] = (path, size)
            else:
                ignored += 1
        if not images:
            self._refuse()
        items = [self._item(path, size, others) for path, size in images]
        taken = {path for item in items for path in item.side.values()}
        ignored += len(others) - len(taken)
        return Listing(items, sorted({i.class_name for i in items if i.class_name is not None}), ignored)

    @staticmethod
    def _item(path: str, size: int, others: dict[str, tuple[str, int]]) -> Item:
        found = {s: others[key] for s in sorted(SIDE_SUFFIXES) if (key := f"{_stem(path)}.{s}") in others}
        folder, slash, _ = path.partition("/")
        return Item(path, size + sum(n for _, n in found.values()), folder if slash else None, {s: p for s, (p, _) in found.items()})

    def _files(self) -> Iterator[tuple[str, int]]:
        """(relative path, bytes) of every file, sorted."""
        try:
            folders = set()
            for path, size in self.storage.walk():
                if not path:  # the URL is itself a file
                    return
                if not path.endswith("/"):  # some stores hold an object that stands for a folder
                    folders.add(path.partition("/")[0])
                    yield path, size
            for name in self.storage.names():
                if name not in folders:  # a listing leaves out folders that it may not enter: ask again, to be told why
                    self.storage.names(name)
        except (StorageError, CredentialsError) as e:
            raise type(e)(f"shard.source.url: {e}") from e
        except FileNotFoundError:
            return

    def _refuse(self) -> None:
        url = self.storage.url
        if not self.storage.exists():
            raise DataError(f"shard.source.url: there is no folder {url}")
        if any(not path for path, _ in self.storage.walk()):
            raise DataError(f"shard.source.url: {url} is a file, this names a folder of images")
        raise DataError(f"shard.source.url: the folder {url} holds no images (known by their suffix: {', '.join(sorted(IMAGE_SUFFIXES))})")


SOURCES: dict[str, type[FolderSource]] = {"folder": FolderSource}


def open_source(source: Source) -> FolderSource:
    """The source that a config names.

    Raises:
        ConfigError: `shard.source.format` is not known, or the section has keys that this format does not use.
    """
    made = SOURCES[choose("shard.source.format", source.format, SOURCES)](source.url)
    if source.columns and source.format == "folder":
        raise ConfigError("shard.source.columns: a folder has no columns, leave this out")
    return made


def check_source(shard: Shard) -> None:
    """Preflight: raise what is wrong with the source, before anything starts and without reading an image.

    Raises:
        ConfigError, DataError, StorageError: naming the config path.
    """
    open_source(shard.source).check()


def _suffix(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _is_image(path: str) -> bool:
    return _suffix(path) in IMAGE_SUFFIXES and not _is_hidden(path)
