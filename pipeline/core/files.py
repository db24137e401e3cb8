"""One file at a URL, such as a vocabulary or a list of keys, on anything that fsspec reads, the web among it; and temporary
files."""

from __future__ import annotations

import errno
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from pipeline.core.errors import DataError, StorageError, UserError
from pipeline.core.storage import Storage


def split_file(url: str, endpoint: str | None = None) -> tuple[Storage, str]:
    """The directory of the file at `url`, and its name there; `endpoint` is that of object stores."""
    folder, slash, name = url.rpartition("/")
    if not name:
        raise UserError(f"{url!r}: names a directory, a file is wanted")
    return Storage(folder or slash or ".", endpoint), name


def read_checked(url: str, sha256: str | None = None, endpoint: str | None = None) -> bytes:
    """The bytes of the file at `url`.

    Raises:
        DataError: there is no such file, or its sha256 is not the one given.
    """
    directory, name = split_file(url, endpoint)
    try:
        data = directory.read(name)
    except FileNotFoundError:
        raise DataError(f"{url}: there is no such file") from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.strip().lower():
        raise DataError(f"{url}: this is another file, its sha256 is {found} and {sha256} was expected")
    return data


@contextmanager
def in_tmpdir(what: str) -> Iterator[None]:
    """Raises StorageError where the operating system refuses to take `what` in TMPDIR."""
    try:
        yield
    except OSError as e:
        why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise StorageError(f"{what}: cannot write here what is being put together, {why} (TMPDIR names another place)") from e


def write_whole(file: FileIO, data: bytes | memoryview) -> int:
    """All of `data` to a file in TMPDIR, which has no buffer, since that would fail anew on closing. Gives its length. Raises as
    `in_tmpdir`."""
    with in_tmpdir(file.name if isinstance(file.name, str) else tempfile.gettempdir()):
        write_all(file, data)
    return len(data)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """To a file without a buffer, which takes a part where the disk is nearly full, so that the next attempt says so."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
