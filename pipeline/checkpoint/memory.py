"""Host memory that holds a rank's part of a checkpoint while it is written, shared with the process that writes it."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from pipeline.checkpoint.fragments import OF_MODEL, Fragment, lay_out
from pipeline.core.errors import StorageError

_CHUNK = 4 << 20  # bytes that a thread copies at a time; a copy of more bypasses the processor's caches, and was slower


class HostMemory:
    """The safetensors file of `fragments`, as memory that `fill` copies their numbers into; the same layout each time.

    It is an anonymous file in memory, so that the writing process sends it off as the file it is: there is one copy, and nothing is
    written to a disk on the way. Where the machine has too little memory, or no anonymous files, it is a file in TMPDIR.

    Raises:
        StorageError: neither memory nor disk has room for it.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        header, self.pieces, self.bytes = lay_out(fragments)
        self.is_on_disk = not hasattr(os, "memfd_create") or free_memory() < self.bytes
        if self.is_on_disk:
            with tempfile.TemporaryFile(prefix="tessera-save-") as file:
                self.fd = os.dup(file.fileno())
        else:
            self.fd = os.memfd_create("tessera-save")
        try:
            # Room is taken now: a save must not fail for it later, nor wait for the kernel to find pages.
            os.posix_fallocate(self.fd, 0, self.bytes) if hasattr(os, "posix_fallocate") else os.ftruncate(self.fd, self.bytes)
        except OSError as e:
            os.close(self.fd)
            raise StorageError(
                f"pretrain.save: a rank's part of a checkpoint takes {self.bytes / 2**30:.1f} GiB of host memory, or of TMPDIR, "
                f"and neither has room for it ({e.strerror})"
            ) from e
        self._map = mmap.mmap(self.fd, self.bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._map[: len(header)] = header
        self._rooms = [self._bytes[p.offset : p.offset + p.numel * p.itemsize] for p in self.pieces]
        self._is_pinned = torch.cuda.is_available() and not self.is_on_disk and _pin(self._bytes)
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), "fill")

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy the numbers of `fragments`, those of the constructor, as they are now."""
        found = {(f.key, f.name, f.start): f.tensor.view(torch.uint8) for f in fragments}
        pairs = [(room, found[p.key, p.name, p.start]) for room, p in zip(self._rooms, self.pieces, strict=True)]
        here = []
        for room, tensor in pairs:
            if tensor.is_cpu:
                here.append((room.numpy(), tensor.numpy()))
            else:
                room.copy_(tensor, non_blocking=self._is_pinned)
        self._copy(here)
        if self._is_pinned:
            torch.cuda.synchronize()

    def _copy(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Of bytes that are in host memory: all of torch's cores share them, which of many small tensors torch's own copy lets wait for
        each other at each."""
        parts = [(room[at : at + _CHUNK], source[at : at + _CHUNK]) for room, source in pairs for at in range(0, len(room), _CHUNK)]
        chunks = iter(parts)  # of a list: threads may take from it together

        def work(_: int) -> None:
            for room, source in chunks:
                np.copyto(room, source)

        list(self._threads.map(work, range(torch.get_num_threads())))

    def first_not_finite(self) -> str | None:
        """The name of a parameter or buffer that holds an infinity or no number, or whose average does, if there is one."""
        for p, room in zip(self.pieces, self._rooms, strict=True):
            if p.key in OF_MODEL and not torch.isfinite(room.view(p.torch_dtype)).all():
                return p.name
        return None

    def close(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._threads.shutdown()
        del self._bytes, self._rooms
        with contextlib.suppress(BufferError):  # a tensor that somebody still holds keeps the mapping, and it alone
            self._map.close()
        os.close(self.fd)


def free_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this rank may still take: its share, among the ranks of this host, of what the host has and of what each cgroup
    around this process (the file `own` names them) leaves. In a container the host's number alone would be too large."""
    free = [psutil.virtual_memory().available, *_left(cgroups, own)]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _left(cgroups: Path, own: Path) -> Iterator[int]:
    """Bytes that each cgroup with a limit leaves, of version 2 or 1. Pages of files that nobody used of late it would give up."""
    for line in own.read_text().splitlines() if own.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, usage, pages = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, pages = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = root / path.strip("/")
        # A container may see its own cgroup as the root while `own` has the host's name for it.
        for group in [inner, *inner.parents]:
            if not group.is_relative_to(root):
                break
            with contextlib.suppress(OSError):  # the root of a host has no limit, and one that may not be read is not known
                most = (group / limit).read_text().strip()
                if most != "max":
                    stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                    yield max(0, int(most) - int((group / usage).read_text()) + int(stat.get(pages, 0)))


def _pin(memory: torch.Tensor) -> bool:
    """Page-lock `memory`, so that a GPU copies into it at full rate; tells whether it could."""
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
