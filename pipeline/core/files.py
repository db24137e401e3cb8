"""One file at a URL, such as a vocabulary or a list of keys, on anything that fsspec reads, the web among it."""

from __future__ import annotations

import hashlib

from pipeline.core.errors import DataError, UserError
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
