"""Directories on any file system or object store, with writes that are seen whole or not at all.

The only user of fsspec. What a reader may rely on:

- `write` and `put` publish a whole object or nothing: local files are written beside their name, synced and renamed;
  object stores publish a finished upload only.
- `create` succeeds for exactly one of many writers (a hard link on files, `If-None-Match: *` on S3 and Azure, generation 0 on Google);
  `is_conditional` finds out whether a store keeps to it.
- nothing is cached: a listing shows what other processes have written since.
- failures that a person can mend (no permission, no space, no such bucket, nobody answers) become `StorageError`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import split_protocol

from pipeline.core import stores
from pipeline.core.errors import CredentialsError, StorageError

_OTHER_STORES = ("gs", "gcs", "abfs", "abfss", "az")
_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "max_pool_connections": 32,
        "retries": {"total_max_attempts": 2, "mode": "standard"},
    },
}
_DENIED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "NoCredentialsError",
    "ExpiredToken",
    "Forbidden",
    "InvalidClientTokenId",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "ClientAuthenticationError",
    "DefaultCredentialsError",
    "RefreshError",
)
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "azure", "gcsfs", "google")  # libraries whose errors need not be OSErrors


class Storage:
    """A directory at `url`, on any fsspec file system; a plain path is a local directory.

    Picklable and cheap to make: the connection is opened on first use, once a process.
    """

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        protocol, path = split_protocol(url)
        self.protocol: str = protocol or "file"
        self.endpoint = endpoint
        self.path: str = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self._fs: Any = None
        self._pid = 0

    @property
    def is_local(self) -> bool:
        return self.protocol in ("file", "local")

    @property
    def url(self) -> str:
        return self.path if self.is_local else f"{self.protocol}://{self.path}"

    @property
    def fs(self) -> Any:
        # An instance reused after a fork raises in s3fs; a new process opens its own.
        if self._fs is None or self._pid != os.getpid():
            options: dict[str, Any] = {"use_listings_cache": False} if self.protocol in (*stores.S3, *_OTHER_STORES) else {}
            options |= _S3_OPTIONS if self.protocol in stores.S3 else {}
            if self.endpoint and self.protocol in (*stores.S3, "gs", "gcs"):
                options["endpoint_url"] = self.endpoint
            try:
                self._fs = fsspec.filesystem(self.protocol, **options)
            except (ImportError, ValueError) as e:
                raise StorageError(f"storage {self.url}: cannot use {self.protocol!r} URLs ({e})") from e
            self._pid = os.getpid()
        return self._fs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __truediv__(self, name: str) -> Storage:
        """The directory `name` below this one."""
        child = Storage(f"{self.url}/{name}", self.endpoint)
        child._fs, child._pid = self._fs, self._pid
        return child

    def _at(self, key: str) -> str:
        path = f"{self.path}/{key}" if key else self.path
        return f"{self.protocol}://{path}" if self.protocol in ("http", "https") else path  # fsspec's http wants the whole URL

    # Reading

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError where there is no such object."""
        with self._explained("read", key):
            if not self.is_local:
                return self.fs.cat_file(self._at(key))
            with open(self._at(key), "rb", buffering=0) as file:  # half the time of Path.read_bytes, for files of images
                return file.readall()

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`, fewer where the object is shorter. Raises FileNotFoundError where there is no such object."""
        with self._explained("read", key):
            try:
                return self.fs.cat_file(self._at(key), start=start, end=end)
            except Exception as e:
                if "InvalidRange" in f"{e} {e.__cause__}" or "Range Not Satisfiable" in str(e):
                    return b""  # it ends before `start`
                raise

    def read_into(self, key: str, start: int, room: memoryview) -> int:
        """Fill `room` with the bytes from `start` on; gives how many there were. Raises as `read_range`, which takes longer on files:
        new memory costs more than reading into what is there."""
        if not self.is_local:
            data = self.read_range(key, start, start + len(room))
            room[: len(data)] = data
            return len(data)
        with self._explained("read", key), open(self._at(key), "rb", buffering=0) as file:
            file.seek(start)
            count = 0
            while got := file.readinto(room[count:]):
                count += got
            return count

    def exists(self, key: str = "") -> bool:
        with self._explained("read", key):
            return bool(self.fs.exists(self._at(key)))

    def head(self, key: str) -> stores.Head:
        """The size of an object, and the checksum that the store has of it. Raises FileNotFoundError where there is no such object."""
        with self._explained("read", key):
            return stores.head(self.fs, self.protocol, self._at(key))

    def names(self, key: str = "") -> list[str]:
        """Sorted names of what lies directly in a directory; empty where there is none."""
        with self._explained("list", key):
            return stores.names(self.fs, self.protocol, self._at(key))

    def scan(self, deep: bool = False) -> Iterator[tuple[str, int | None]]:
        """What `stores.scan` says of this directory; nothing where there is none."""
        with self._explained("list", ""), suppress(FileNotFoundError):
            yield from stores.scan(self.fs, self.protocol, self._at(""), deep)

    def walk(self, pattern: str | None = None) -> Iterator[tuple[str, int]]:
        """(path relative to this directory, bytes) of every file below it, or of those that fit a pattern (`*/*.csv`), sorted by path."""
        with self._explained("list", ""):
            found = self.fs.glob(f"{self.path}/{pattern}", detail=True) if pattern else self.fs.find(self.path, detail=True)
        root = len(self.fs._strip_protocol(self.path).rstrip("/"))
        yield from ((path[root:].lstrip("/"), int(found[path].get("size") or 0)) for path in sorted(found))

    def get(self, key: str, local: Path) -> None:
        with self._explained("read", key):
            self.fs.get_file(self._at(key), str(local))

    # Writing

    def write(self, key: str, data: bytes) -> None:
        """Publish `data` under `key`, over what was there."""
        with self._explained("write", key):
            if self.is_local:
                os.replace(self._beside(key, data), self._at(key))
                self._sync_directory(key)
            else:
                self.fs.pipe_file(self._at(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Publish `data`, which no other writer has, under `key` unless something is there already; tells whether this call did it."""
        with self._explained("write", key):
            try:
                self._link(key, data) if self.is_local else self.fs.pipe_file(self._at(key), data, mode="create")
                return True
            except FileExistsError:
                # Where a reply was lost, the client of a store, or of NFS, asks again and meets its own write: compare before giving up.
                with suppress(FileNotFoundError):  # removed meanwhile: another's
                    return self.fs.cat_file(self._at(key)) == data
                return False

    def put(self, local: Path, key: str, move: bool = False) -> None:
        """Publish a local file under `key`. `move`: of a local store, it lies on the same file system and may be taken from there."""
        with self._explained("write", key):
            if self.is_local:
                temporary = os.fspath(local) if move else self._beside(key, None)
                try:
                    with open(temporary, "rb+") as target:
                        if not move:
                            with open(local, "rb") as source:
                                shutil.copyfileobj(source, target, 1 << 22)
                        target.flush()
                        os.fsync(target.fileno())
                    os.replace(temporary, self._at(key))
                    self._sync_directory(key)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
            else:
                options = {"chunksize": stores.part_size(os.path.getsize(local))} if self.protocol in stores.S3 else {}
                self.fs.put_file(str(local), self._at(key), **options)

    def remove(self, key: str = "") -> None:
        """Remove an object, or a directory and all below it; nothing happens where there is none."""
        with self._explained("remove", key), suppress(FileNotFoundError):
            stores.remove(self.fs, self.protocol, self._at(key))

    def abort_uploads(self, prefix: str) -> int:
        """Give up what a killed process left of uploads to S3, in parts, of keys that begin with `prefix`; tells how many there were. Such
        parts are in no listing, and paid for. Other stores drop theirs by themselves, and so does MinIO, which does not list them."""
        with self._explained("remove", prefix):
            return stores.abort_uploads(self.fs, self._at(prefix)) if self.protocol in stores.S3 else 0

    def check_writable(self) -> None:
        """Raises StorageError, with the reason, unless an object can be written and removed here."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"tessera")
            self.remove(probe)
        except (StorageError, CredentialsError) as e:
            raise type(e)(str(e).replace(f"/{probe}", "")) from e

    def is_conditional(self) -> bool:
        """Whether `create` holds here: some S3 servers take the condition and ignore it. Found out with an object that is removed again."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            return self.create(probe, b"first") and not self.create(probe, b"second") and self.read(probe) == b"first"
        finally:
            self.remove(probe)

    def _link(self, key: str, data: bytes) -> None:
        """Raises FileExistsError where there is a file."""
        temporary = self._beside(key, data)
        try:
            os.link(temporary, self._at(key))
            self._sync_directory(key)
        finally:
            os.unlink(temporary)

    def _beside(self, key: str, data: bytes | None) -> str:
        """A new temporary file in the directory of `key`, holding `data`, synced to disk."""
        directory = os.path.dirname(self._at(key))
        os.makedirs(directory, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=directory)
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(data or b"")
                f.flush()
                os.fsync(f.fileno())
            os.chmod(name, 0o644)
        except BaseException:
            os.unlink(name)
            raise
        return name

    def _sync_directory(self, key: str) -> None:
        descriptor = os.open(os.path.dirname(self._at(key)), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Turn what a person can mend into one sentence; let a reader's FileNotFoundError through."""
        where = f"storage {self.url}/{key}" if key else f"storage {self.url}"
        try:
            yield
        except (StorageError, CredentialsError):
            raise
        except Exception as e:
            text = f"{type(e).__name__}: {e}"
            if any(word in text for word in _DENIED) or (not self.is_local and isinstance(e, PermissionError)):
                raise CredentialsError(f"{where}: the store refused these credentials, cannot {action} ({e})") from e
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise StorageError(f"{where}: cannot {action}, the disk is full") from e
            if isinstance(e, OSError) and e.errno == errno.EROFS:
                raise StorageError(f"{where}: cannot {action}, the file system is read-only") from e
            if isinstance(e, FileNotFoundError) and action == "read":
                raise
            if isinstance(e, PermissionError):
                raise StorageError(f"{where}: no permission to {action}") from e
            if isinstance(e, OSError) or type(e).__module__.split(".")[0] in _CLIENTS:
                raise StorageError(f"{where}: cannot {action} ({text})") from e
            raise
