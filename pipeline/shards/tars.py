"""A tar read once, front to back: its members, where they lie, and how it ends.

tarfile alone stops without a word at a damaged header, at a cut one, and at a cut between two members; here they are told
apart. Nothing is held but the block at hand.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pipeline.core.retry import patiently
from pipeline.core.storage import Storage

_BLOCK = 1 << 23  # bytes asked of the store at once
_PIECE = 1 << 20
_HEADERS = 1 << 26  # bytes; no member has more in headers of its own
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# What tarfile raises on damaged headers.
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)


@dataclass(frozen=True)
class End:
    """How reading a tar ended, and the first byte that was not understood.

    whole: at the end-of-archive marker. unmarked: after a whole member, where a marker should be. truncated: inside a
    member or its header (or there are no bytes at all). damaged: at what should be a header. not-a-tar, compressed: at
    the first byte.
    """

    kind: Literal["whole", "unmarked", "truncated", "damaged", "not-a-tar", "compressed"]
    at: int

    @property
    def is_cut(self) -> bool:
        return self.kind not in ("whole", "unmarked")

    def __str__(self) -> str:
        where = f"at byte {self.at:,}"
        return {
            "whole": "it is whole",
            "unmarked": f"it has no end-of-archive marker {where}: it may have been cut off there, between two members",
            "truncated": f"it is cut off {where}, inside a member" if self.at else "it has no bytes",
            "damaged": f"it is damaged {where}, where a member's header should be",
            "not-a-tar": "it does not begin as a tar does",
            "compressed": "it is compressed, so that samples cannot be read by their place in it",
        }[self.kind]


@dataclass(frozen=True)
class Member:
    """One member: its first header at `start`, its data from `info.offset_data` to `data_end`, the next member at `end`.

    `head` holds its headers: tar's own, and pax or GNU ones before it.
    """

    info: tarfile.TarInfo
    start: int
    data_end: int
    end: int
    head: bytes


def read_blocks(directory: Storage, name: str) -> Iterator[bytes]:
    """A file's bytes in order, in blocks. Raises FileNotFoundError, StorageError."""
    start = 0
    while block := read_piece(directory, name, start, start + _BLOCK):
        yield block
        start += len(block)


def read_piece(directory: Storage, name: str, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file, fewer at its end. Raises FileNotFoundError, StorageError."""
    return patiently(directory, name, lambda: directory.read_range(name, start, end))


class Tape:
    """Bytes that pass by once. `whole` is the sha256 of all that passed, if they are `hashed`; `crc` may be set by whoever reads."""

    def __init__(self, blocks: Iterator[bytes], hashed: bool = True) -> None:
        self._hashed = hashed
        self._blocks, self._block, self._used = blocks, b"", 0
        self.position, self.crc, self.whole = 0, 0, hashlib.sha256()

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        """Fewer than `count` bytes at the end only."""
        data = self._piece(count)
        if 0 < len(data) < count:
            parts = [data]
            while (count := count - len(parts[-1])) and (data := self._piece(count)):
                parts.append(data)
            data = b"".join(parts)
        return data

    def skip(self, count: int, digest: Any = None) -> None:
        """Pass over the next `count` bytes, or what there is of them."""
        while count > 0 and (piece := self._piece(min(count, _PIECE))):
            count -= len(piece)
            if digest is not None:
                digest.update(piece)

    def drain(self) -> bool:
        """Pass over the rest; tells whether it is all zeros."""
        zeros = True
        while piece := self._piece(_PIECE):
            zeros = zeros and not piece.strip(b"\0")
        return zeros

    def _piece(self, count: int) -> bytes:
        """Of the next `count` bytes those in the block at hand; none at the end only."""
        if self._used == len(self._block) and count > 0:
            self._block, self._used = next(self._blocks, b""), 0
            if self._hashed:
                self.whole.update(self._block)
        piece = self._block[self._used : self._used + max(0, count)]
        self._used += len(piece)
        self.position += len(piece)
        self.crc = zlib.crc32(piece, self.crc)
        return piece


class _Info(tarfile.TarInfo):
    """tarfile's, which reads the plain header of a file, almost all there are, in a quarter of the time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and buf[156:157] == tarfile.REGTYPE and buf[257:262] == b"ustar" and buf[345] == 0:
            try:
                checksum, size = int(buf[148:155].rstrip(b" \0"), 8), int(buf[124:136].rstrip(b" \0"), 8)
            except ValueError:
                checksum = -1  # tarfile knows other ways to write numbers
            if checksum == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                info = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
                info.size = size
                return info
        return super().frombuf(buf, encoding, errors)


class _Headers:
    """The tape as tarfile sees it: asked for headers alone, which are kept here."""

    def __init__(self, tape: Tape) -> None:
        self.tell, self._tape = tape.tell, tape
        self.seen, self.short = b"", False

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _HEADERS:
            raise tarfile.ReadError("no header has this size")
        data = self._tape.read(count)
        self.seen += data
        self.short = self.short or len(data) < count
        return data


class Walk:
    """The members of the tar that begins where `tape` stands. After the last one, `end` says how it ended."""

    def __init__(self, tape: Tape) -> None:
        self._tape, self.end = tape, End("whole", tape.position)

    def __iter__(self) -> Iterator[Member]:
        tape, headers = self._tape, _Headers(self._tape)
        tar: tarfile.TarFile | None = None
        while True:
            headers.seen, start = b"", tape.position
            try:
                if tar is None:
                    tar = tarfile.TarFile(fileobj=headers, tarinfo=_Info, encoding="utf-8")  # type: ignore[arg-type]
                    info = tar.next() if tar.members else None  # type: ignore[attr-defined]
                else:
                    info = tar.next()
            except _BROKEN:
                info = None
            if info is None or tar is None or info.size < 0 or tar.offset < tape.position:
                self.end = _end(headers, start)
                return
            tar.members.clear()  # type: ignore[attr-defined]
            data_end = min(info.offset_data + info.size, tar.offset)
            yield Member(info, start, data_end, tar.offset, headers.seen)
            tape.skip(tar.offset - tape.position)
            if tape.position < tar.offset:
                self.end = End("truncated" if tape.position < data_end else "unmarked", tape.position)
                return


def _end(headers: _Headers, start: int) -> End:
    seen = headers.seen
    if not seen.strip(b"\0"):
        return End("truncated" if not start and not seen else "unmarked" if len(seen) < tarfile.BLOCKSIZE else "whole", start)
    if not start and seen.startswith(_COMPRESSED):
        return End("compressed", 0)
    if headers.short:
        return End("truncated", start)
    return End("damaged" if start else "not-a-tar", start)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_PLAIN = _header("", 0)
_CHECKSUM = sum(_PLAIN[100:124]) + sum(_PLAIN[136:148]) + 8 * ord(" ") + sum(_PLAIN[156:])


def header(name: str, size: int) -> bytes:
    """The header of a plain file of `size` bytes without owner or time, and a pax header before it where the name needs one, as
    tarfile makes them."""
    if len(name) > 100 or not name.isascii() or size >= 8**11:
        return _header(name, size)
    # Almost all there are, in a quarter of the time: name, size and checksum put into an empty one.
    path, length = name.encode().ljust(100, b"\0"), b"%011o\0" % size
    checksum = b"%06o\0 " % (sum(path) + sum(length) + _CHECKSUM)
    return b"".join((path, _PLAIN[100:124], length, _PLAIN[136:148], checksum, _PLAIN[156:]))
