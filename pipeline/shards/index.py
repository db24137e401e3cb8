"""The index of a tar: one row a sample, and a reason for each sample that gets none.

The one place where rows are made: of shards that we write, of tars that others wrote (`adopt.py`), and to verify both.
What a sample is follows webdataset: neighbouring members whose paths agree up to the first dot of the base name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import simplejpeg

from pipeline.shards import images, samples
from pipeline.shards.duplicates.phash import PHASH, perceptual_hash
from pipeline.shards.images import Dropped
from pipeline.shards.manifest import INDEX_SCHEMA
from pipeline.shards.samples import printable
from pipeline.shards.tars import End, Member, Tape, Walk
from pipeline.shards.text import LONGEST

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes, in any case; of several in one sample the first is its image
_USED = frozenset({*IMAGES, "cls", "json", "txt"})
_HELD = 1 << 24  # bytes of an image held at once; its header lies far before
_LARGEST = 2**31 - 1  # pixels a side
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset passes over these


@dataclass
class _Part:
    """A member of a sample. `value`: an image's (width, height), a label, numbers out of json, or why it is of no use."""

    offset: int
    length: int
    value: Any = None
    sha256: str = ""
    phash: int | None = None


@dataclass
class _Group:
    """Neighbouring members of one key; `crc` is of the bytes from `start` to `end`."""

    key: str
    start: int
    end: int = 0
    crc: int = 0
    parts: dict[str, _Part] = field(default_factory=dict)

    @property
    def used(self) -> frozenset[str]:
        return _USED & self.parts.keys()


def index_schema(columns: Sequence[str] = (), hashed: bool = False) -> pa.Schema:
    """`INDEX_SCHEMA`, with perceptual hashes where it is `hashed`, and a float64 for each number taken from the samples' json, marked."""
    taken = [pa.field(name, pa.float64(), metadata={"from": "json"}) for name in columns]
    return pa.schema([*INDEX_SCHEMA, *([pa.field(PHASH, pa.uint64())] if hashed else []), *taken])


def json_columns(schema: pa.Schema) -> list[str]:
    """The columns of an index that were taken from json."""
    return [f.name for f in schema if (f.metadata or {}).get(b"from") == b"json"]


def smallest(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """(least width, least height) of an index."""
    return min(row["width"] for row in rows), min(row["height"] for row in rows)


class TarIndex:
    """Rows of the tars read into it, by key, in the order of their bytes.

    `labels`: how many classes there are, None for any number. `columns`: numbers to take from the samples' json; null
    where there is none. `hashed`: whether rows have perceptual hashes, for which images are decoded.
    `dropped`: (key, reason) of samples without a row; `ignored`: files that belong to no sample.
    Reasons beside those of `make_sample`: no-image, not-a-file, duplicate-key, scattered, and those of a tar that is cut.
    """

    def __init__(self, labels: int | None = None, columns: Sequence[str] = (), hashed: bool = False) -> None:
        self._labels, self._columns, self._hashed = labels or samples.MOST_LABELS, columns, hashed
        self._found: dict[str, tuple[frozenset[str], dict[str, Any] | Dropped]] = {}  # key -> the members used, its row
        self._others: list[tuple[str, Dropped]] = []
        self.ignored = 0
        self.doubtful: dict[str, Any] | None = None  # the row of a sample that may have gone on where the tar is damaged

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in self._found.values() if not isinstance(row, Dropped)]

    @property
    def dropped(self) -> list[tuple[str, Dropped]]:
        return [(key, row) for key, (_, row) in self._found.items() if isinstance(row, Dropped)] + self._others

    def read(self, tape: Tape) -> End:
        """Take in the tar that begins where `tape` stands, up to its end or to where it is damaged."""
        walk, group, torn = Walk(tape), None, False
        for member in walk:
            if member.info.isdir():
                continue
            name = None if _META.match(member.info.name) else _NAME.fullmatch(member.info.name)
            if name is None:
                self.ignored += 1
                continue
            key, suffix = printable(name[1]), name[2].lower()
            if group is None or group.key != key or suffix in group.parts:
                self._close(group)
                group = _Group(key, member.start)
                tape.crc = zlib.crc32(member.head)
            group.parts[suffix] = self._part(member, suffix, tape)
            tape.skip(member.end - tape.position)
            group.end, group.crc, torn = tape.position, tape.crc, tape.position < member.data_end
        end = walk.end
        if not end.is_cut:
            self._close(group)
            return end
        cut = Dropped(end.kind, str(end))
        if group is None:
            self._others.append(("", cut))
        else:
            row = cut if torn else self._row(group)
            self.doubtful = None if isinstance(row, Dropped) else row
            self._close(group, cut)
        return end

    def add(self, key: str, members: Sequence[tuple[str, int, bytes]], start: int, end: int, crc: int) -> None:
        """Take in a sample of a tar that is being made, so that nothing has to be looked for: it lies from `start` to `end`, `crc` is the
        crc32 of all its bytes, and of each member there are its suffix, where its data begin, and these. The row is that which `read` would
        find, but for the image's sha256, which is left to the caller."""
        group = _Group(key, start, end, crc)
        for suffix, offset, data in members:
            part = group.parts[suffix] = _Part(offset, len(data))
            self._look(part, suffix, f"{key}.{suffix}", data[: self._most(suffix)])
        self._close(group)

    def _part(self, member: Member, suffix: str, tape: Tape) -> _Part:
        info, size = member.info, member.info.size
        if not info.isreg() or info.issparse():
            how = f"a link to {printable(info.linkname)}" if info.linkname else "no plain file"
            return _Part(-1, -1, Dropped("not-a-file", f"{printable(info.name)} is {how}"))
        part = _Part(info.offset_data, size)
        if suffix in _USED:
            data = tape.read(min(size, self._most(suffix)))
            if suffix in IMAGES:
                digest = hashlib.sha256(data)
                tape.skip(size - len(data), digest)
                part.sha256 = digest.hexdigest()
            self._look(part, suffix, printable(info.name), data)
        tape.skip(member.data_end - tape.position)
        return part

    def _most(self, suffix: str) -> int:
        """Bytes of a member that are looked at."""
        return _HELD if suffix in IMAGES and not self._hashed else LONGEST

    def _look(self, part: _Part, suffix: str, name: str, data: bytes) -> None:
        """`data` is the beginning of it."""
        if suffix in IMAGES:
            part.value = image_size(data)
            part.phash = perceptual_hash(data) if self._hashed and part.length <= LONGEST else None
        elif part.length > LONGEST:
            part.value = Dropped(f"bad-{suffix}", f"{name} has {part.length} bytes")
        else:
            part.value = self._side(suffix, name, data)

    def _side(self, suffix: str, name: str, data: bytes) -> Any:
        """A label, the wanted numbers, or None for a caption; in the words of `make_sample` where it is none of these."""
        if suffix == "cls":
            digits = data.strip()
            if digits.isdigit() and len(digits) < 20 and int(digits) < self._labels:
                return int(digits)
            return Dropped("bad-cls", f"{name} holds {data[:40]!r}, not a whole number from 0 to {self._labels - 1}")
        if suffix == "txt":
            try:
                data.decode()
            except UnicodeDecodeError as e:
                return Dropped("bad-txt", f"{name} is not UTF-8 ({e.reason} at byte {e.start})")
            return None
        try:
            values = json.loads(data.decode("utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}")
        except (ValueError, RecursionError) as e:
            return Dropped("bad-json", f"{name} is not a JSON object ({str(e)[:200]})")
        return {column: _number(values.get(column)) for column in self._columns}

    def _close(self, group: _Group | None, cut: Dropped | None = None) -> None:
        """Judge a group once its last member has passed."""
        if group is None:
            return
        key, used, row = group.key, group.used, cut or self._row(group)
        before = self._found[key][0] if key in self._found else frozenset()
        if not before:
            self._found.pop(key, None)  # so that rows stay in the order of their bytes
            self._found[key] = used, row
        elif not used and not cut:  # nothing of a sample that has all it needs elsewhere
            self.ignored += len(group.parts)
        elif before & used:
            self._others.append((key, cut or Dropped("duplicate-key", f"again at byte {group.start:,}; the first is kept")))
        else:
            self._found[key] = before | used, cut or Dropped("scattered", "its members do not lie side by side")

    def _row(self, group: _Group) -> dict[str, Any] | Dropped:
        """One row of the index."""
        parts = group.parts
        image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
        if image is None:
            return Dropped("no-image", f"it has {', '.join(printable(s) for s in sorted(parts))[:200]}")
        absent = _Part(-1, -1)
        label, text, meta = (parts.get(suffix, absent) for suffix in ("cls", "txt", "json"))
        for part in (image, label, text, meta):
            if isinstance(part.value, Dropped):
                return part.value
        row: dict[str, Any] = {"key": group.key, "offset": group.start, "length": group.end - group.start}
        for name, part in (("image", image), ("txt", text), ("json", meta)):
            row |= {f"{name}_offset": part.offset, f"{name}_length": part.length}
        width, height = image.value
        row |= {"cls": -1 if label is absent else label.value, "width": width, "height": height, "crc32": group.crc}
        row |= {"sha256": image.sha256} | ({PHASH: image.phash} if self._hashed else {})
        return row | (meta.value or dict.fromkeys(self._columns))


def image_size(data: bytes) -> tuple[int, int] | Dropped:
    """(width, height) from an image's header, or why there is none."""
    if not data:
        return Dropped("empty", "the file has no bytes")
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return width, height
        except ValueError:
            pass  # Pillow reads kinds that this does not, and has words for the others
    try:
        with images.open_image(data) as image:
            width, height = image.size
    except images.Drop as e:
        return e.dropped
    except images.BROKEN as e:
        return Dropped("corrupt", images.describe_error(e))
    if not (0 < width <= _LARGEST and 0 < height <= _LARGEST):
        return Dropped("corrupt", f"its header says {width}x{height}")
    return width, height


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
