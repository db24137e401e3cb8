"""State of training in named pieces, and how one rank's pieces lie in its file.

A `Fragment` is a run of neighbouring numbers of one flattened tensor: `key` says of which kind ("weight", "exp_avg", "average", ..), `name`
of which parameter, `start` where in it. The engine hands fragments over and takes them back; nothing here knows an engine, so a state
that one number of ranks cut up at one ZeRO stage can be put together by any other.

The fragments of a rank are one safetensors file, in which each is called `key/name@start`. Beside it lies its `Index`: where each fragment
is, and the sha256 of every block of the file, so that a reader fetches and verifies just the bytes it wants.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

WEIGHT, AVERAGE, BUFFER = "weight", "average", "buffer"  # keys: parameters in fp32, their average; what a model's state holds beside them
OF_MODEL = (AVERAGE, WEIGHT, BUFFER)  # what a model is made of: the first of these that there is of a name
BLOCK = 4 << 20  # bytes; what is hashed, and so fetched, as one
_HEADER_UNIT = 64  # bytes that the header's length is a multiple of
_NAMES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Fragment:
    """`tensor` is one-dimensional and contiguous, the memory of the engine itself: read by a save, written by a resume."""

    key: str
    name: str
    start: int
    tensor: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


@dataclass(frozen=True)
class Piece:
    """A fragment in a file: `numel` numbers of `dtype` (safetensors' name of it) from byte `offset`."""

    key: str
    name: str
    start: int
    numel: int
    dtype: str
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Index:
    """What is in the file called `file`, and the sha256 of each of its blocks of `block` bytes (the last may be shorter)."""

    file: str
    size: int
    block: int
    blocks: list[str]
    pieces: list[Piece]

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "pieces": [list(asdict(p).values()) for p in self.pieces]}).encode()

    @staticmethod
    def parse(data: bytes) -> Index:
        values: dict[str, Any] = json.loads(data)
        return Index(**{**values, "pieces": [Piece(*row) for row in values["pieces"]]})


def lay_out(fragments: Sequence[Fragment]) -> tuple[bytes, list[Piece], int]:
    """(header, place of each fragment, bytes of the whole file): the safetensors file that holds `fragments`, without their numbers.

    Wider types come first, so that every fragment starts at a multiple of its type's size; there are no gaps. Fragments of a key are
    together, so that who wants the weights alone fetches little else.
    """
    ordered = sorted(fragments, key=lambda f: (-f.tensor.dtype.itemsize, f.key))
    entries: dict[str, Any] = {}
    end = 0
    for f in ordered:
        size = f.tensor.numel() * f.tensor.dtype.itemsize
        entries[f"{f.key}/{f.name}@{f.start}"] = {
            "dtype": _NAMES[f.tensor.dtype],
            "shape": [f.tensor.numel()],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_UNIT)
    header = len(text).to_bytes(8, "little") + text
    begins = [len(header) + entry["data_offsets"][0] for entry in entries.values()]
    pieces = [Piece(f.key, f.name, f.start, f.tensor.numel(), _NAMES[f.tensor.dtype], b) for f, b in zip(ordered, begins, strict=True)]
    return header, pieces, len(header) + end


def shapes_of(pieces: Iterable[Piece]) -> dict[tuple[str, str], int]:
    """Numbers of each tensor, (key, name), that `pieces` of all files hold together."""
    sizes: dict[tuple[str, str], int] = {}
    for p in pieces:
        sizes[p.key, p.name] = max(sizes.get((p.key, p.name), 0), p.stop)
    return sizes


def own_share(key: str, name: str, tensor: torch.Tensor, rank: int, size: int) -> Fragment | None:
    """Of a tensor that all of `size` ranks hold whole: the part that `rank` saves; None where nothing is left for it."""
    flat = tensor.detach().view(-1)
    part = -(-flat.numel() // size)
    start = min(rank * part, flat.numel())
    stop = min(start + part, flat.numel())
    return Fragment(key, name, start, flat[start:stop]) if stop > start else None
