"""What a machine fetched of remote datasets: one directory, shared by all its processes, of limited size.

Safe under kill -9 at any moment: a part is written beside its place and renamed; locks are the kernel's, and end with
their process; a reader whose part is evicted under its hands keeps it open or fetches it again. Nothing here is trusted:
samples are checked against the index on every read, and a part that fails is dropped and fetched anew.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.core.errors import ConfigError, StorageError

_LOCKS = 1024  # files; a part's name says which one guards its fetching
_TEMPORARY = ".tmp-"
_LEFT_BEHIND = 600.0  # seconds after which a temporary file belongs to nobody
_SOME = 32  # a look at all sizes after each 1/32 of the limit written
_FULL = 0.9  # of the limit, to which old parts are removed

Fetch = Callable[[], bytes]


def default_path() -> Path:
    return Path(tempfile.gettempdir()) / f"tessera-cache-{os.getuid()}"


class Cache:
    """Parts by name, the least recently used removed first; `limit` in bytes may be passed by 1/32 a `Cache` that writes."""

    def __init__(self, path: str | Path | None, limit: int) -> None:
        self.path, self.limit = Path(path) if path else default_path(), limit
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"pretrain.loader.cache.path: cannot make {self.path} ({e.strerror})") from e
        if self.path.stat().st_uid != os.getuid():
            raise ConfigError(
                f"pretrain.loader.cache.path: {self.path} belongs to somebody else, who could change what is read; choose another place"
            )
        self._written = limit  # so that the first part looks at what others left
        self._lock = threading.Lock()

    def read(self, name: str, fetch: Fetch, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `start` of the part `name`, which `fetch` gets where it is not there."""
        data = self._look(name, start, length)
        if data is not None:
            return data
        with self._guard(name):
            data = self._look(name, start, length)  # somebody else was quicker
            if data is None:
                whole = fetch()
                self._keep(name, whole)
                data = whole[start : None if length is None else start + length]
        return data

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def drop(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def lock(self, name: str) -> FileLock:
        """A lock between all processes and threads of the machine, for making what is kept under `name`."""
        return FileLock(self.path / f".lock-{name}", thread_local=False)

    def _look(self, name: str, start: int, length: int | None) -> bytes | None:
        try:
            file = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if start == 0 or length is None:
                os.utime(file)  # used now; once a part is enough
            return os.pread(file, (os.fstat(file).st_size - start) if length is None else length, start)
        finally:
            os.close(file)

    def _guard(self, name: str) -> FileLock:
        return FileLock(self.path / f".lock-{zlib.crc32(name.encode()) % _LOCKS}", thread_local=False)

    def _keep(self, name: str, data: bytes) -> None:
        temporary = self.path / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(data)
            temporary.rename(self.path / name)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            if e.errno == errno.ENOSPC:
                raise StorageError(f"pretrain.loader.cache: the disk of {self.path} is full; choose a smaller size or another path") from e
            raise
        with self._lock:
            self._written += len(data)
            due = self._written > self.limit / _SOME
            self._written = 0 if due else self._written
        if due:
            self.trim()

    def trim(self) -> None:
        """Remove the least recently used parts beyond the limit, unless another process is at it."""
        try:
            with FileLock(self.path / ".lock-trim", timeout=0, thread_local=False):
                self._trim()
        except Timeout:
            return

    def _trim(self) -> None:
        parts: list[tuple[float, int, str]] = []
        for entry in os.scandir(self.path):
            try:
                about = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.startswith(_TEMPORARY):
                if time.time() - about.st_mtime > _LEFT_BEHIND:
                    self.drop(entry.name)
            elif not entry.name.startswith("."):
                parts.append((about.st_mtime, about.st_size, entry.name))
        total = sum(size for _, size, _ in parts)
        if total <= self.limit:
            return
        for _, size, name in sorted(parts):
            self.drop(name)
            total -= size
            if total <= self.limit * _FULL:
                return
