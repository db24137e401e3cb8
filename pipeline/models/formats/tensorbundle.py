"""TensorFlow's checkpoint format, "tensor bundle", without TensorFlow.

`<prefix>.index` is a sorted table in LevelDB's format (a footer points to an index block, that to data blocks of key-value pairs with
shared prefixes) from names to protocol buffers: where a tensor lies in `<prefix>.data-00000-of-00001`, its type, shape and CRC-32C.
After tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle and LevelDB's doc/table_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.core.errors import CheckpointError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # bytes: two block handles, padding, magic
_TRAILER = 5  # of a block: compression, checksum
# tensorflow/core/framework/types.proto; bfloat16 is kept as its bits.
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: "<u2", 19: "<f2"}
_BFLOAT16 = 14


class Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None


def read_bundle(prefix: Path, url: str) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint `prefix`; strings are left out. Checksums are compared.

    Raises:
        CheckpointError: a file is missing, damaged, or of a kind that no TensorFlow checkpoint has.
    """
    index = Path(f"{prefix}.index")
    try:
        return _read(index, prefix, url)
    except FileNotFoundError as e:
        raise CheckpointError(f"{url}: there is no {Path(e.filename).name} beside it") from e
    except (ValueError, LookupError, TypeError, OverflowError) as e:
        raise CheckpointError(f"{url}: {index.name} is damaged, or no index of a TensorFlow checkpoint ({e})") from e


def _read(index: Path, prefix: Path, url: str) -> dict[str, torch.Tensor]:
    table = index.read_bytes()
    pairs = dict(_pairs(table))
    header = _fields(pairs.pop(b""))
    shards = int(header.get(1, [1])[0])
    if header.get(2, [0])[0] != 0:
        raise ValueError("its numbers are big-endian")
    files = {
        shard: np.memmap(f"{prefix}.data-{shard:05d}-of-{shards:05d}", dtype=np.uint8, mode="r")
        for shard in sorted({_entry(value).shard for value in pairs.values()})
    }
    found = {}
    for key, value in pairs.items():
        entry, name = _entry(value), key.decode()
        if entry.dtype not in _TYPES:
            continue
        data = np.array(files[entry.shard][entry.offset : entry.offset + entry.size])
        if len(data) != entry.size or (entry.checksum is not None and unmask(entry.checksum) != crc32c(data)):
            raise CheckpointError(f"{url}: the numbers of {name} are damaged, their checksum is another")
        tensor = torch.from_numpy(data.view(_TYPES[entry.dtype]).reshape(entry.shape))
        found[name] = tensor.view(torch.bfloat16) if entry.dtype == _BFLOAT16 else tensor
    return found


def _pairs(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError("its last bytes are others")
    at = len(table) - _FOOTER
    _block(table, at)  # the metaindex, which is empty
    for _ in range(2):
        _, at = _varint(table, at)
    for _, handle in _block(table, at):
        yield from _block(handle, 0, table)


def _block(handles: bytes, at: int, table: bytes | None = None) -> list[tuple[bytes, bytes]]:
    """Key-value pairs of the block that the handle at `handles[at]` points to."""
    table = handles if table is None else table
    start, at = _varint(handles, at)
    size, _ = _varint(handles, at)
    block, trailer = table[start : start + size], table[start + size : start + size + _TRAILER]
    if trailer[0] != 0:
        raise ValueError("it is compressed")
    if unmask(int.from_bytes(trailer[1:], "little")) != crc32c(np.frombuffer(block + trailer[:1], dtype=np.uint8)):
        raise ValueError("a checksum in it is another")
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key, pairs = len(block) - 4 * (restarts + 1), 0, b"", []
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        pairs.append((key, block[at + rest : at + rest + length]))
        at += rest + length
    return pairs


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """A protocol buffer's fields by number: varints, fixed 32 and 64 bits as integers, the rest as bytes."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
            case 2:
                length, at = _varint(message, at)
                value, at = message[at : at + length], at + length
            case 1 | 5 as kind:
                length = 8 if kind == 1 else 4
                value, at = int.from_bytes(message[at : at + length], "little"), at + length
            case kind:
                raise ValueError(f"a field of type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _entry(message: bytes) -> Entry:
    fields = _fields(message)

    def number(field: int) -> int:
        return int(fields.get(field, [0])[0])

    if 7 in fields:
        raise ValueError("a tensor is cut into slices")
    shape = fields.get(2, [b""])[0]
    if not isinstance(shape, bytes):
        raise ValueError("a tensor has no shape")
    sizes = tuple(int(_fields(dim).get(1, [0])[0]) for dim in _fields(shape).get(2, []) if isinstance(dim, bytes))
    return Entry(number(1), sizes, number(3), number(4), number(5), number(6) if 6 in fields else None)


def unmask(checksum: int) -> int:
    """TensorFlow stores CRCs rotated and shifted, for a CRC of CRCs says little."""
    rotated = (checksum - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


_CRC = _table()
_LANES = 1 << 14


def crc32c(data: np.ndarray) -> int:
    """CRC-32C (Castagnoli) of uint8 `data`. Long ones are cut into lanes, all of which take a byte at once; a lane's result is then
    carried over the bytes after it, which is linear: a 32 x 32 matrix over bits."""
    length = len(data) // _LANES
    head = data[: length * _LANES].reshape(_LANES, length) if length > 64 else data[:0].reshape(1, 0)
    lanes = np.zeros(len(head), dtype=np.uint32)
    lanes[0] = 0xFFFFFFFF
    for column in np.ascontiguousarray(head.T):
        lanes = _CRC[(lanes ^ column) & 0xFF] ^ lanes >> 8
    while len(lanes) > 1:  # neighbours, then neighbours of those
        if len(head) == len(lanes):
            step = _zeros(length)
        lanes = _apply(step, lanes[::2]) ^ lanes[1::2]
        step = _apply(step, step)
    crc = int(lanes[0])
    for byte in data[head.size :].tolist():
        crc = int(_CRC[(crc ^ byte) & 0xFF]) ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _zeros(length: int) -> np.ndarray:
    """What `length` zero bytes make of each bit of a CRC: 32 columns."""
    step, power = np.uint32(1) << np.arange(32, dtype=np.uint32), _CRC[(np.uint32(1) << np.arange(32, dtype=np.uint32)) & 0xFF]
    power = power ^ (np.uint32(1) << np.arange(32, dtype=np.uint32)) >> 8
    while length:
        if length & 1:
            step = _apply(power, step)
        power, length = _apply(power, power), length >> 1
    return step


def _apply(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    result = np.zeros_like(values)
    for bit in range(32):
        result ^= np.where(values >> np.uint32(bit) & 1, matrix[bit], np.uint32(0))
    return result
