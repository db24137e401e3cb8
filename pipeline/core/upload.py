"""A process that hashes and uploads in the background, for a process that has better things to do.

    python -m pipeline.core.upload      started by `Uploader`; not for people

It reads requests from its standard input and answers on its standard output, a line of JSON apiece; large contents lie in an anonymous
file that both processes hold. A process and not a thread: hashing and uploading would fight with their owner for the interpreter. It works
at a lower priority, and dies with its owner.

After each upload the store is asked what it has. The size must be right, and the MD5 where the store tells one (`core/stores.py`); where it
tells none, as files, stores that encrypt with keys of their own, and Azure for large objects, the size alone is compared.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core import stores
from pipeline.core.errors import CredentialsError, InfrastructureError, StorageError, TesseraError
from pipeline.core.progress import say
from pipeline.core.retry import insist
from pipeline.core.storage import Storage

_ERRORS = {kind.__name__: kind for kind in (CredentialsError, StorageError)}
_NICE = 5


@dataclass(frozen=True)
class Receipt:
    """One uploaded object."""

    name: str
    bytes: int
    sha256: str


class Uploader:
    """Uploads below `directory`, in a process of its own: the first `size` bytes of the file `fd`, and small objects. `patience`: for how
    many seconds it goes on trying where the store fails; `warn` is told of each failure."""

    def __init__(self, directory: Storage, fd: int, size: int, patience: float, warn: Callable[[str], None] = say) -> None:
        about = {"url": directory.url, "endpoint": directory.endpoint, "fd": fd, "bytes": size, "patience": patience}
        self._warn = warn
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.core.upload", json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # ctrl-C is for the owner, who decides
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def upload(self, key: str, block: int) -> tuple[Receipt, list[str]]:
        """Upload the file as `key`. Gives its receipt, and the sha256 of each `block` bytes of it.

        Raises:
            StorageError, CredentialsError: the store's last. InfrastructureError: the process is gone.
        """
        reply = self._ask({"key": key, "block": block})
        return Receipt(**reply["receipt"]), reply["blocks"]

    def write(self, objects: Mapping[str, bytes]) -> list[Receipt]:
        """Upload small objects by key; raises as `upload`."""
        reply = self._ask({"objects": {key: base64.b64encode(data).decode() for key, data in objects.items()}})
        return [Receipt(**r) for r in reply["receipts"]]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None, "made with pipes"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while line := self._process.stdout.readline():
                reply = json.loads(line)
                if "warning" in reply:
                    self._warn(reply["warning"])
                elif "error" in reply:
                    raise _ERRORS.get(reply["error"], StorageError)(reply["text"])
                else:
                    return reply
        except (OSError, ValueError) as e:
            raise InfrastructureError(f"the uploading process {self.pid} is gone ({e})") from e
        raise InfrastructureError(f"the uploading process {self.pid} died with exit status {self._process.wait()}")

    def kill(self) -> None:
        """End the process, whatever it is doing; who waits for it gets an InfrastructureError. Any thread may call this."""
        self._process.kill()

    def close(self) -> None:
        """The same, where nobody waits for it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of what it did not take any more
                    pipe.close()


# Inside the process


def main() -> None:
    about = json.loads(sys.argv[1])
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # for the owner
        signal.signal(each, signal.SIG_IGN)
    os.nice(_NICE)
    _Process(about).serve()


class _Process:
    def __init__(self, about: Mapping[str, Any]) -> None:
        self.directory = Storage(about["url"], about["endpoint"])
        self.fd, self.bytes, self.patience = about["fd"], about["bytes"], about["patience"]
        self.replies, sys.stdout = sys.stdout, sys.stderr  # nothing that is printed may come between
        self.compares = not self.directory.is_local
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self.requests.put(json.loads(line))
        finally:
            os._exit(0)  # the owner is gone, maybe in the middle of a line, and with it whoever would need this

    def serve(self) -> None:
        while True:
            request = self.requests.get()
            try:
                self._reply(self._write(request["objects"]) if "objects" in request else self._upload(request["key"], request["block"]))
            except TesseraError as e:
                self._reply({"error": type(e).__name__, "text": str(e)})

    def _reply(self, values: Mapping[str, Any]) -> None:
        print(json.dumps(values), file=self.replies, flush=True)

    def _upload(self, key: str, block: int) -> dict[str, Any]:
        def own(start: int, stop: int) -> bytes:
            return os.pread(self.fd, stop - start, start)

        with ThreadPoolExecutor(2) as pool:  # beside the upload; hashing leaves the interpreter to others
            hashing = pool.submit(_hash, self.fd, self.bytes, block)
            md5 = pool.submit(stores.md5, own, self.bytes, self.directory.protocol) if self.compares else None

            def put() -> None:
                try:
                    self.directory.put(Path(f"/dev/fd/{self.fd}"), key)
                except StorageError:
                    if md5 is None or not self._is_there(key, md5.result()):
                        raise
                self._check(key, self.bytes, own, md5.result if md5 else None)

            self._try(put)
            whole, blocks = hashing.result()
        return {"receipt": asdict(Receipt(key, self.bytes, whole)), "blocks": blocks}

    def _write(self, objects: Mapping[str, str]) -> dict[str, Any]:
        receipts = []
        for key, text in objects.items():
            data = base64.b64decode(text)
            self._try(lambda key=key, data=data: self._write_one(key, data))  # type: ignore[misc]
            receipts.append(asdict(Receipt(key, len(data), hashlib.sha256(data).hexdigest())))
        return {"receipts": receipts}

    def _write_one(self, key: str, data: bytes) -> None:
        def own(start: int, stop: int) -> bytes:
            return data[start:stop]

        self.directory.write(key, data)
        self._check(key, len(data), own, (lambda: stores.md5(own, len(data), self.directory.protocol)) if self.compares else None)

    def _is_there(self, key: str, md5: str) -> bool:
        """Whether an upload that failed did not: a store may put its parts together for longer than the client waits, which asks again, and
        hears that there is no such upload."""
        try:
            there = self.directory.head(key)
        except (FileNotFoundError, StorageError):
            return False
        return there.size == self.bytes and there.md5 == md5

    def _check(self, key: str, size: int, own: stores.ReadRange, md5: Callable[[], str] | None) -> None:
        """Raises StorageError unless what is there is what was uploaded, `own`."""
        where = f"storage {self.directory.url}/{key}"
        try:
            there = self.directory.head(key)
            if there.size != size:
                raise StorageError(f"{where}: {size} bytes were uploaded, and {there.size} are there")
            if md5 is None or there.md5 in (None, md5()):
                return
            # Some stores have ETags that look like an MD5 and are none: the content itself decides, and from then on such are not heeded.
            at = stores.first_difference(own, lambda start, stop: self.directory.read_range(key, start, stop), size)
        except FileNotFoundError as e:
            raise StorageError(f"{where}: it was uploaded, and is not there") from e
        if at is not None:
            raise StorageError(f"{where}: what is there differs from what was uploaded, from byte {at:,} on")
        self.compares = False

    def _try(self, act: Callable[[], None]) -> None:
        insist(act, self.patience, lambda text: self._reply({"warning": text}))


def _hash(fd: int, size: int, block: int) -> tuple[str, list[str]]:
    """sha256 of the first `size` bytes of a file, and of each of their blocks."""
    whole, blocks = hashlib.sha256(), []
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        for start in range(0, size, block):
            with view[start : start + block] as part:
                blocks.append(hashlib.sha256(part).hexdigest())
                whole.update(part)
    return whole.hexdigest(), blocks


if __name__ == "__main__":
    main()
