"""Images as files in a folder, with side files beside them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

from pipeline.config.shard import Fetch
from pipeline.core.errors import CredentialsError, DataError, StorageError
from pipeline.core.retry import patiently
from pipeline.shards.dropped import Dropped
from pipeline.shards.sources.base import Files, Ignored, Item, Lost, Part, Source, Survey, printable
from pipeline.shards.sources.sorting import in_order

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
SIDE_SUFFIXES = frozenset({"txt", "cls", "json"})
_READERS = 8  # files read at once: an object store answers each in tens of milliseconds
_RUN = 4  # items that one thread reads one after another: less to hand over
_AHEAD = 8  # runs read before they are needed


class FolderSource(Source):
    """A folder of images on any storage: a class a sub-folder, or flat.

    The first folder of an image's relative path is its class; an image that lies directly in the source has the integer
    of its `.cls` side file, or no label. `<stem>.txt`, `.cls` and `.json` beside an image are its side files. Every other
    file, and whatever is hidden (`.git`, `._photo.jpg`), is ignored and counted. A part is a sub-folder, or the files
    outside any. One task lists it, a page at a time on a file system and on S3, and brings it in order through temporary
    files (`sorting.py`): 0.2 KB of disk a file, and memory for some hundred thousand names however many there are. Other
    stores give a listing as a whole, which has to fit in memory there (a kilobyte a file).
    """

    def check(self) -> None:
        for part in self.parts():
            if any(is_image(path) for path, _ in self._listed(part)):
                return
        self._refuse()

    def parts(self) -> list[Part]:
        with _told():
            found, folders = False, list[str]()
            for name, size in self.storage.scan():
                found = True
                if size is None:
                    folders.append(name)
            if not found and not self.storage.exists():
                raise DataError(f"shard.source.url: there is no folder {self.storage.url}")
            if not found and not self.storage.fs.isdir(self.storage.path):
                raise DataError(f"shard.source.url: {self.storage.url} is a file, this names a folder of images")
            if "" in folders:  # S3 has such keys, and a folder of that name cannot be told from the one that it is in
                url = self.storage.url
                raise DataError(f"shard.source.url: {url} has objects below an empty name ({url}//..), rename them")
            return [Part("", 0), *(Part(name, 0) for name in sorted(folders))]

    def survey(self) -> Survey:
        rows, size, classes, digest = 0, 0, set[str](), hashlib.sha256()
        parts = self.parts()
        for part in parts:
            for item in self.rows(part):
                if isinstance(item, Item):
                    rows, size = rows + 1, size + item.bytes
                    classes.update([item.class_name] if item.class_name is not None else [])
                    digest.update(f"{item.path}\0{item.bytes}\0".encode("utf-8", "surrogateescape"))
        if not rows:
            self._refuse()
        return Survey(rows, len(parts), size / rows, len(classes), True, digest.hexdigest())

    def rows(self, part: Part) -> Iterator[Item | Lost | Ignored]:
        ignored = 0

        def named() -> Iterator[tuple[str, bool, str, int]]:
            """Side files first, of each stem."""
            nonlocal ignored
            for path, size in self._listed(part):
                if is_image(path) or (_suffix(path) in SIDE_SUFFIXES and not _is_hidden(path)):
                    yield _stem(path), is_image(path), path, size
                else:
                    ignored += 1

        def images() -> Iterator[tuple[str, int, dict[str, str]]]:
            """Path and bytes of each image with its side files, and their paths by suffix."""
            nonlocal ignored
            for _, files in groupby(in_order(named(), lambda file: file[:3]), lambda file: file[0]):
                side, is_taken = dict[str, tuple[str, int]](), False
                for _, is_an_image, path, size in files:
                    if is_an_image:
                        is_taken = True
                        yield path, size + sum(n for _, n in side.values()), {suffix: side[suffix][0] for suffix in sorted(side)}
                    else:
                        # `a.TXT` and `a.txt` are two files for one member: the later in order is taken, the other ignored.
                        ignored += _suffix(path) in side
                        side[_suffix(path)] = path, size
                ignored += 0 if is_taken else len(side)

        for path, size, side in in_order(images(), lambda image: image[0]):
            folder, slash, _ = path.partition("/")
            yield Item(path, size, folder if slash else None, side)
        yield Ignored(ignored)

    def fetch(self, items: Sequence[Item], settings: Fetch, max_bytes: int, share: int) -> Iterator[tuple[int, Files | Dropped]]:
        runs = [range(first, min(first + _RUN, len(items))) for first in range(0, len(items), _RUN)]
        with ThreadPoolExecutor(_READERS) as pool:
            ahead: deque[Future[list[Files | Dropped]]] = deque()
            for number in range(len(runs) + _AHEAD):
                if number < len(runs):
                    ahead.append(pool.submit(self._read_all, [items[index] for index in runs[number]]))
                if number >= _AHEAD and number - _AHEAD < len(runs):
                    yield from zip(runs[number - _AHEAD], ahead.popleft().result(), strict=True)

    def _read_all(self, items: Sequence[Item]) -> list[Files | Dropped]:
        return [self._read(item) for item in items]

    def _read(self, item: Item) -> Files | Dropped:
        try:
            return Files(self._bytes(item.path), {suffix: self._bytes(path) for suffix, path in item.side.items()})
        except (FileNotFoundError, StorageError) as e:
            if not self.storage.exists():
                raise DataError(f"shard.source.url: the folder {self.url} is no longer there") from e
            gone = isinstance(e, FileNotFoundError)
            return Dropped("unreadable", "the file vanished after it was listed" if gone else printable(str(e)))

    def _bytes(self, path: str) -> bytes:
        return patiently(self.storage, path, lambda: self.storage.read(path))

    def _listed(self, part: Part) -> Iterator[tuple[str, int]]:
        """(path relative to the source, bytes) of every file of a part, in no order."""
        with _told():
            if not part.name:
                yield from ((name, size) for name, size in self.storage.scan() if size is not None)
                return
            found = False
            for path, size in (self.storage / part.name).scan(deep=True):
                found = True
                yield f"{part.name}/{path}", size or 0
            if not found:  # a listing leaves out folders that it may not enter: ask again, to be told why
                self.storage.names(part.name)

    def _refuse(self) -> None:
        raise DataError(
            f"shard.source.url: the folder {self.storage.url} holds no images (known by their suffix: {', '.join(sorted(IMAGE_SUFFIXES))})"
        )


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the store begin with what the config calls it."""
    try:
        yield
    except (StorageError, CredentialsError) as e:
        raise type(e)(f"shard.source.url: {e}") from e


def _suffix(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def is_image(path: str) -> bool:
    return _suffix(path) in IMAGE_SUFFIXES and not _is_hidden(path)
