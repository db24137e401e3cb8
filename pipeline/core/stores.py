"""What object stores tell of an object, and what is left on them of uploads that never ended: each kind in its own words."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import StorageError

S3 = ("s3", "s3a")
_PART, _MOST_PARTS = 50 << 20, 10_000  # of an upload to S3, as s3fs has them where it is told nothing
_AT_ONCE = 16 << 20  # bytes
_PAGE = 1000  # names, the most that S3 tells at once

ReadRange = Callable[[int, int], bytes]  # bytes from, and up to


@dataclass(frozen=True)
class Head:
    """What a store tells of an object without sending it. `md5`: of the content, in hex, or of the MD5s of its N parts, with "-N" behind
    it, as S3 has it; None where the store tells none."""

    size: int
    md5: str | None


def head(fs: Any, protocol: str, path: str) -> Head:
    """One request. S3 tells an MD5 as the ETag, except that of an object under a key of KMS looks like one and is none of the content;
    Google tells one of what was not composed, Azure of what came in one piece. Files have none: they were synced."""
    if protocol in S3:
        bucket, key, _ = fs.split_path(path)
        told = fs.call_s3("head_object", Bucket=bucket, Key=key)
        is_md5 = not str(told.get("ServerSideEncryption") or "").startswith("aws:kms")
        return Head(int(told["ContentLength"]), str(told.get("ETag") or "").strip('"') or None if is_md5 else None)
    info = fs.info(path)
    if text := info.get("md5Hash"):
        return Head(int(info["size"]), base64.b64decode(text).hex())
    raw = getattr(info.get("content_settings"), "content_md5", None)
    return Head(int(info["size"]), bytes(raw).hex() if raw else None)


def names(fs: Any, protocol: str, path: str) -> list[str]:
    """Sorted names of what lies directly at `path`."""
    try:
        if protocol in S3:  # s3fs would hold a kilobyte of each
            return sorted(name for name, _ in _scan_s3(fs, path, deep=False))
        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def scan(fs: Any, protocol: str, path: str, deep: bool) -> Iterator[tuple[str, int | None]]:
    """(name, bytes, None of a directory) of what lies directly at `path`, or where `deep` (path, bytes) of all files below it, in no order.
    Of files and S3 a page at a time is in memory, of other stores all. Left out are objects that stand for a folder.

    Raises:
        FileNotFoundError. StorageError: a directory may not be listed.
    """
    if protocol in S3:
        yield from _scan_s3(fs, path, deep)
    elif protocol in ("file", "local"):
        yield from _scan_files(fs, path, "", deep)
    else:
        root = len(fs._strip_protocol(path).rstrip("/"))
        for info in fs.find(path, detail=True).values() if deep else fs.ls(path, detail=True):
            name = info["name"][root:].strip("/")
            if info["type"] == "directory":
                yield name, None
            elif name and not info["name"].endswith("/"):
                yield name, int(info.get("size") or 0)


def _scan_s3(fs: Any, path: str, deep: bool) -> Iterator[tuple[str, int | None]]:
    _, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    for told in _pages_s3(fs, path, deep):
        yield from ((found["Prefix"].removeprefix(prefix).rstrip("/"), None) for found in told.get("CommonPrefixes", []))
        for found in told.get("Contents", []):
            if not found["Key"].endswith("/"):
                yield found["Key"].removeprefix(prefix), int(found["Size"])


def _pages_s3(fs: Any, path: str, deep: bool) -> Iterator[dict[str, Any]]:
    """What S3 tells of what lies at, or where `deep` anywhere below `path`."""
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE} | ({} if deep else {"Delimiter": "/"})
    while True:
        told = fs.call_s3("list_objects_v2", **asked)
        yield told
        if not told.get("IsTruncated"):
            return
        asked["ContinuationToken"] = told["NextContinuationToken"]


def remove(fs: Any, protocol: str, path: str) -> None:
    """Remove an object, or a directory and all below it. Some stores raise FileNotFoundError where there is none.

    Of S3 a page at a time: s3fs lists all of it first, in a time that grows with the square of the folders (of a million: hours),
    and does not tell what it could not remove."""
    if protocol not in S3:
        fs.rm(path, recursive=True)
        return
    bucket, key, _ = fs.split_path(path)
    for page in _pages_s3(fs, path, deep=True):
        if found := [{"Key": each["Key"]} for each in page.get("Contents", [])]:
            told = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": found, "Quiet": True})
            for error in told.get("Errors", []):
                raise OSError(f"{error.get('Code')}: {error.get('Key')}: {error.get('Message')}")
    if key:
        fs.call_s3("delete_object", Bucket=bucket, Key=key)


def _scan_files(fs: Any, path: str, below: str, deep: bool, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, int | None]]:
    """What `fs` tells of each entry, as its own listings do, which hold all of them. A link to a directory is one, but for a link to
    one of those `above`, or to one that holds them, which would lead round and round."""
    above |= {os.path.realpath(path)}
    try:
        found = os.scandir(path)
    except NotADirectoryError:
        return
    except PermissionError as e:
        raise StorageError(f"storage {path}: no permission to list") from e
    with found:
        for entry in found:
            with suppress(FileNotFoundError):  # it vanished meanwhile
                if not entry.is_dir() or (entry.is_symlink() and _holds_one(os.path.realpath(entry.path), above)):
                    yield below + entry.name, int(fs.info(entry)["size"])
                elif not deep:
                    yield entry.name, None
                else:
                    yield from _scan_files(fs, entry.path, f"{below}{entry.name}/", deep, above)


def _holds_one(directory: str, others: frozenset[str]) -> bool:
    return any(os.path.commonpath([directory, other]) == directory for other in others)


def part_size(size: int) -> int:
    """Bytes of a part of an upload of `size` bytes to S3; up to twice as many go in one piece."""
    return max(_PART, math.ceil(size / _MOST_PARTS))


def md5(read: ReadRange, size: int, protocol: str) -> str:
    """What `Head.md5` is for the content that `read` gives."""
    part = part_size(size) if protocol in S3 and size >= 2 * part_size(size) else max(size, 1)
    digests = [_md5(read, start, min(start + part, size)) for start in range(0, max(size, 1), part)]
    if part >= size:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _md5(read: ReadRange, start: int, stop: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    for at in range(start, stop, _AT_ONCE):
        digest.update(read(at, min(at + _AT_ONCE, stop)))
    return digest.digest()


def first_difference(one: ReadRange, other: ReadRange, size: int) -> int | None:
    """Where the first piece of two contents begins that is not the same in both."""
    pieces = ((at, min(at + _AT_ONCE, size)) for at in range(0, size, _AT_ONCE))
    return next((start for start, stop in pieces if one(start, stop) != other(start, stop)), None)


def abort_uploads(fs: Any, path: str) -> int:
    """Abort the unfinished uploads in parts of objects on S3 whose paths begin with `path`; gives how many there were."""
    bucket, prefix, _ = fs.split_path(path)
    page: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    while True:
        told = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        found += [(upload["Key"], upload["UploadId"]) for upload in told.get("Uploads", []) if upload["Key"].startswith(prefix)]
        if not told.get("IsTruncated"):
            break
        page = {"KeyMarker": told["NextKeyMarker"], "UploadIdMarker": told["NextUploadIdMarker"]}
    for key, upload in found:
        with suppress(FileNotFoundError):  # it ended meanwhile
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
    return len(found)
