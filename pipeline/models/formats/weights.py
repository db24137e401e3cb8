"""Writing tensors to safetensors files, a few at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline.core.files import in_tmpdir, write_whole
from pipeline.models.formats.lazy import Lazy, Read

AT_ONCE = 64 << 20  # bytes of tensors that are read together; a larger one is read alone
_NAMES = {
    torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def split(weights: str, tensors: Mapping[str, Lazy], most: int | None) -> dict[str, list[str]]:
    """Names of tensors by file: all in the file `weights`, or where they are of more than `most` bytes, in order in several of at most so
    many; a larger tensor has one of its own. Called as Hugging Face calls them, model-00001-of-00003.safetensors."""
    files: list[list[str]] = [[]]
    room = most
    for name, tensor in tensors.items():
        if room is not None and most is not None:
            if tensor.bytes > room and files[-1]:
                files.append([])
                room = most
            room -= tensor.bytes
        files[-1].append(name)
    if len(files) == 1:
        return {weights: files[0]}
    stem, ending = weights.rsplit(".", 1)
    return {f"{stem}-{n:05d}-of-{len(files):05d}.{ending}": names for n, names in enumerate(files, start=1)}


def is_of(name: str, weights: str) -> bool:
    """Whether a file called `name` may be what `split` made of `weights`."""
    stem, ending = weights.rsplit(".", 1)
    return re.fullmatch(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{ending}", name) is not None


def write_file(path: Path, tensors: Mapping[str, Lazy], read: Read, told: Callable[[int], None]) -> None:
    """Write a safetensors file, byte for byte as safetensors itself does: a header that is known beforehand, and then tensor by tensor.
    `told` is given numbers of bytes as they are written.

    Raises:
        StorageError: the machine's temporary directory, where `path` is, does not take it.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    with in_tmpdir(str(path)):
        file = open(path, "wb", buffering=0)  # noqa: SIM115  closed below
    with file:
        write_whole(file, _header(ordered))
        for batch in _batches(ordered):
            for made in _make(batch, read):
                told(write_whole(file, made.view(-1).view(torch.uint8).numpy().data))


def _make(batch: Mapping[str, Lazy], read: Read) -> Iterator[torch.Tensor]:
    """The tensors of a batch as they are written, which are read together and forgotten with it."""
    found = iter(read([rows for tensor in batch.values() for rows in tensor.parts]))
    for name, tensor in batch.items():
        made = tensor.make(*islice(found, len(tensor.parts)))
        assert made.shape == tensor.like.shape, f"{name} is as its header says"
        yield made.to("cpu", tensor.dtype).contiguous()


def _header(tensors: Mapping[str, Lazy]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.bytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.like.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _batches(tensors: Mapping[str, Lazy]) -> Iterator[dict[str, Lazy]]:
    """In order, of AT_ONCE bytes where that can be."""
    batch: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if batch and sum(t.bytes for t in batch.values()) + tensor.bytes > AT_ONCE:
            yield batch
            batch = {}
        batch[name] = tensor
    yield batch
