"""What the first and last bytes of an image file tell: its size, and whether it is there up to its end.

For `images.check: ends`, where pixels are not decoded: a file that was cut off is found, damage in between is not. Whatever
is not quite plain counts as having no end here, and is then decoded.
"""

from __future__ import annotations

_PNG_HEADER = 8
_PNG_CHUNK = 12  # length, kind, checksum
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def ends(data: bytes, kind: str) -> bool:
    """Whether a JPEG, PNG or WEBP, whose header was read, goes on to its end, and has nothing behind its pixels that would matter."""
    return {"JPEG": jpeg_ends, "PNG": png_ends, "WEBP": webp_ends}[kind](data)


def jpeg_ends(data: bytes) -> bool:
    return data.endswith(b"\xff\xd9")


def png_ends(data: bytes) -> bool:
    """All chunks are there, and pixels are the last of them: behind those may be EXIF, which Pillow would heed."""
    at, last = _PNG_HEADER, b""
    if not data.endswith(_PNG_END):
        return False
    end = len(data) - len(_PNG_END)
    while at < end:
        last = data[at + 4 : at + 8]
        at += _PNG_CHUNK + int.from_bytes(data[at : at + 4], "big")
    return at == end and last == b"IDAT"


def webp_ends(data: bytes) -> bool:
    """The file has as many bytes as its container says (it has no end marker)."""
    size = 8 + int.from_bytes(data[4:8], "little")
    return len(data) in (size, size + size % 2)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP's canvas by its first chunk (RFC 9649); None where it is none, or cut off."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if data[12:16] == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None
