"""From a listed item to the members of a sample, or to the reason why it is dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config.shard import ShardImages
from pipeline.core.errors import DataError, StorageError
from pipeline.shards.images import Checked, Dropped, check_image
from pipeline.shards.sources import FolderSource, Item

_READERS = 8  # files read at once: an object store answers each in tens of milliseconds
_AHEAD = 16  # items read before they are needed
MOST_LABELS = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One sample of a shard; `label` is -1 where it has none, `text` is UTF-8, `meta` a JSON object."""

    key: str
    image: Checked
    label: int
    text: bytes | None
    meta: bytes

    def members(self) -> dict[str, bytes]:
        """Bytes by member suffix."""
        optional = {"cls": str(self.label).encode() if self.label >= 0 else None, "txt": self.text}
        return {self.image.extension: self.image.data, "json": self.meta, **{k: v for k, v in optional.items() if v is not None}}


@dataclass(frozen=True)
class Files:
    """What was read of one item: the image and its side files by suffix."""

    image: bytes
    side: dict[str, bytes]


def read_samples(
    source: FolderSource, samples: list[tuple[str, Item]], images: ShardImages, classes: list[str]
) -> Iterator[tuple[Item, Sample | Dropped]]:
    """Each (key, item) in order, with its sample or the reason why it has none.

    Raises:
        DataError, StorageError: the source as a whole has gone, so that dropping its files one by one would lose all of it.
    """
    ids = {name: i for i, name in enumerate(classes)}
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(samples), _AHEAD):
            part = samples[start : start + _AHEAD]
            for (key, item), files in zip(part, pool.map(lambda s: _read(source, s[1]), part), strict=True):
                yield item, files if isinstance(files, Dropped) else make_sample(key, item, files, images, ids)


def _read(source: FolderSource, item: Item) -> Files | Dropped:
    try:
        return Files(source.read(item.path), {suffix: source.read(path) for suffix, path in item.side.items()})
    except (FileNotFoundError, StorageError) as e:
        if not source.is_there():
            raise DataError(f"shard.source.url: the folder {source.url} is no longer there") from e
        return Dropped("unreadable", "the file vanished after it was listed" if isinstance(e, FileNotFoundError) else printable(str(e)))


def make_sample(key: str, item: Item, files: Files, images: ShardImages, ids: dict[str, int]) -> Sample | Dropped:
    """Check every part of a sample. Reasons beside those of images: bad-cls, bad-json, bad-txt."""
    image = check_image(files.image, images)
    if isinstance(image, Dropped):
        return image
    try:
        label = _label(item, files.side.get("cls"), ids)
    except ValueError:
        most = len(ids) or MOST_LABELS
        return Dropped("bad-cls", f"{item.side['cls']} holds {files.side['cls'][:40]!r}, not a whole number from 0 to {most - 1}")
    text = files.side.get("txt")
    try:
        _ = (text or b"").decode("utf-8")
    except UnicodeDecodeError as e:
        return Dropped("bad-txt", f"{item.side['txt']} is not UTF-8 ({e.reason} at byte {e.start})")
    try:
        meta = _meta(item, files.side.get("json"))
    except (ValueError, RecursionError) as e:
        return Dropped("bad-json", f"{item.side['json']} is not a JSON object ({str(e)[:200]})")
    return Sample(key, image, label, text, meta)


def _label(item: Item, side: bytes | None, ids: dict[str, int]) -> int:
    """The class id: of the folder, or for an image outside any folder of its side file; -1: none."""
    if item.class_name is not None:
        return ids[item.class_name]
    if side is None:
        return -1
    label = int(side.decode("ascii").strip())
    if not 0 <= label < (len(ids) or MOST_LABELS):
        raise ValueError("out of range")
    return label


def _meta(item: Item, side: bytes | None) -> bytes:
    values = json.loads(side.decode("utf-8-sig")) if side is not None else {}
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    return json.dumps({**values, "source": printable(item.path)}, sort_keys=True, allow_nan=False).encode()


def printable(text: str) -> str:
    """File names that are not UTF-8 are spelt with a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
