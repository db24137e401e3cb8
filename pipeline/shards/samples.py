"""From a listed item to the members of a sample, or to the reason why it is dropped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from datetime import time as datetime_time
from decimal import Decimal
from typing import Any
from uuid import UUID

from pipeline.config.shard import Shard, ShardImages, ShardText
from pipeline.core.errors import ConfigError, DataError, StorageError
from pipeline.core.functions import load_function
from pipeline.shards.dropped import Drop, Dropped
from pipeline.shards.images import Checked, check_image
from pipeline.shards.sources import FolderSource, Item
from pipeline.shards.text import LONGEST, check_text

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
class Recipe:
    """What of a config decides whether an item becomes a sample, and how it looks; `filter` names a function of the user's."""

    images: ShardImages = field(default_factory=ShardImages)
    text: ShardText = field(default_factory=ShardText)
    filter: str | None = None

    @staticmethod
    def of(shard: Shard) -> Recipe:
        return Recipe(shard.images, shard.text, shard.filter)


@dataclass(frozen=True)
class Files:
    """What was read of one item: the image and its side files by suffix."""

    image: bytes
    side: dict[str, bytes]


def read_samples(
    source: FolderSource, samples: list[tuple[str, Item]], recipe: Recipe, classes: list[str]
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
                yield item, files if isinstance(files, Dropped) else make_sample(key, item, files, recipe, ids)


def _read(source: FolderSource, item: Item) -> Files | Dropped:
    try:
        return Files(source.read(item.path), {suffix: source.read(path) for suffix, path in item.side.items()})
    except (FileNotFoundError, StorageError) as e:
        if not source.is_there():
            raise DataError(f"shard.source.url: the folder {source.url} is no longer there") from e
        return Dropped("unreadable", "the file vanished after it was listed" if isinstance(e, FileNotFoundError) else printable(str(e)))


def make_sample(key: str, item: Item, files: Files, recipe: Recipe, ids: dict[str, int]) -> Sample | Dropped:
    """Check every part of a sample, what is cheap before the image is decoded.

    A caption or label beside the image wins over the table's; the folder over both. Reasons: see `Dropped`.

    Raises:
        ConfigError: the filter cannot be found, or it raised something itself.
    """
    try:
        label = _label(item, files.side.get("cls"), ids)
        text = check_text(_caption(item, files.side.get("txt")), recipe.text)
        meta = _meta(item, files.side.get("json"))
    except Drop as e:
        return e.dropped
    image = check_image(files.image, recipe.images)
    if isinstance(image, Dropped):
        return image
    sample = Sample(key, image, label, text, meta)
    if recipe.filter is not None and not _is_kept(recipe.filter, sample):
        return Dropped("filtered", f"{recipe.filter} is false for it")
    return sample


def _label(item: Item, side: bytes | None, ids: dict[str, int]) -> int:
    """The class id: of the folder, for an image outside any folder of its side file or table (-1 there, too, means none); -1: none."""
    if item.class_name is not None:
        return ids[item.class_name]
    most = (len(ids) or MOST_LABELS) - 1
    if side is None:
        if item.label is not None and not -1 <= item.label <= most:
            raise Drop("bad-cls", f"its label is {item.label}, not a whole number from 0 to {most}")
        return -1 if item.label is None else item.label
    try:
        label = int(side.decode("ascii").strip())
    except ValueError:
        label = -1
    if not 0 <= label <= most:
        raise Drop("bad-cls", f"{item.side['cls']} holds {side[:40]!r}, not a whole number from 0 to {most}")
    return label


def _caption(item: Item, side: bytes | None) -> str | None:
    if side is None:
        return item.text
    try:
        return side.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Drop("bad-txt", f"{item.side['txt']} is not UTF-8 ({e.reason} at byte {e.start})") from e


def _meta(item: Item, side: bytes | None) -> bytes:
    """What the table has beside caption and label, then what the side file says, then where the sample is from; keys sorted."""
    try:
        values = json.loads(side.decode("utf-8-sig")) if side is not None else {}
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        extra = {name: plain(value) for name, value in item.extra.items()}
        meta = json.dumps({**extra, **values, "source": printable(item.path)}, sort_keys=True, allow_nan=False).encode()
    except (ValueError, RecursionError) as e:
        where = f"{item.side['json']} is not a JSON object" if side is not None else "its columns make no JSON"
        raise Drop("bad-json", f"{where} ({str(e)[:200]})") from e
    if len(meta) > LONGEST:
        raise Drop("bad-json", f"{len(meta)} bytes, the most is {LONGEST}")
    return meta


def plain(value: Any) -> Any:
    """A value of a table's column as JSON has it: numbers that are not finite become null, times ISO 8601, bytes base64.

    Raises ValueError for a kind that is none of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | datetime_time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    raise ValueError(f"a {type(value).__name__} has no form in JSON")


def _is_kept(name: str, sample: Sample) -> bool:
    """Ask the user's filter: of the sample's json, and beside it key, caption and label (None: it has none), width and height."""
    function = load_function("shard.filter", name)
    told = json.loads(sample.meta) | {
        "key": sample.key,
        "caption": None if sample.text is None else sample.text.decode(),
        "label": None if sample.label < 0 else sample.label,
        "width": sample.image.width,
        "height": sample.image.height,
    }
    source = told["source"]
    try:
        return bool(function(told))
    except Exception as e:
        raise ConfigError(f"shard.filter: {name} raised {type(e).__name__} ({e}) for the sample {sample.key} of {source}") from e


def printable(text: str) -> str:
    """File names that are not UTF-8 are spelt with a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
