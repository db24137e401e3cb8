"""From the files of a checkpoint, whatever number of ranks wrote them, into the tensors that somebody wants filled.

Each wanted run of numbers is looked up in the indices, and only the blocks that hold some of it are fetched. Each block is hashed and
compared before a number of it is used. Neighbouring blocks are fetched with one request; a few requests are under way at a time, so the
memory needed is a few spans, however large the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue

import torch

from pipeline.checkpoint.commit import Checkpoints, Commit
from pipeline.checkpoint.fragments import Fragment, Index, Piece
from pipeline.core.errors import CheckpointError
from pipeline.core.retry import retrying

SPAN = 32 << 20  # bytes fetched with one request, at most
_THREADS = 4
_READINGS = 2  # of a block that differs from what was saved: the first may have been damaged on its way


class Damaged(CheckpointError):
    """Something of a checkpoint is missing, or is not as it was saved."""


@dataclass(frozen=True)
class _Copy:
    """Bytes `start` to `stop` of a file, to the numbers of `tensor` from `into` on."""

    start: int
    stop: int
    tensor: torch.Tensor
    into: int
    dtype: torch.dtype


def read_into(checkpoints: Checkpoints, commit: Commit, indices: Sequence[Index], wanted: Iterable[Fragment]) -> int:
    """Fill the tensors of `wanted` with what the checkpoint holds of them; gives the bytes that were fetched and verified.

    Raises:
        CheckpointError: it does not hold all of one; nothing is filled. Damaged: a file is; some tensors may be filled then.
    """
    where = f"checkpoint {checkpoints.directory.url}/{commit.prefix}"
    copies = _plan(indices, wanted, where)
    spans = [(index, span, copies[index.file]) for index in indices for span in _spans(index, copies[index.file])]
    rooms = _make_rooms()
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(_copy_span, checkpoints, commit, rooms, *span) for span in spans]
        done, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in waiting:
            job.cancel()
        return sum(job.result() for job in done if not job.cancelled())


def verify(checkpoints: Checkpoints, commit: Commit, told: Callable[[int], None] = lambda count: None) -> int:
    """Fetch and hash every byte of a checkpoint, keeping none; gives their number, and tells numbers of them on the way. Raises as
    `read_into`."""
    indices = checkpoints.indices(commit)
    known = {index.file for index in indices}
    total = sum(len(checkpoints.fetch(commit, r.name)) for r in commit.files if r.name not in known)
    told(total)
    rooms = _make_rooms()
    with ThreadPoolExecutor(_THREADS) as pool:
        spans = [(index, span) for index in indices for span in _whole(index)]
        for count in pool.map(lambda s: _copy_span(checkpoints, commit, rooms, s[0], s[1], []), spans):
            total += count
            told(count)
    return total


def _plan(indices: Sequence[Index], wanted: Iterable[Fragment], where: str) -> dict[str, list[_Copy]]:
    """What to copy from each file."""
    holders: dict[tuple[str, str], list[tuple[Piece, str]]] = defaultdict(list)
    for index in indices:
        for piece in index.pieces:
            holders[piece.key, piece.name].append((piece, index.file))
    copies: dict[str, list[_Copy]] = defaultdict(list)
    for f in wanted:
        covered = f.start
        for piece, file in sorted(holders[f.key, f.name], key=lambda h: h[0].start):
            low, high = max(covered, piece.start), min(f.stop, piece.stop)
            if low >= high or low > covered:
                continue
            begin = piece.offset + (low - piece.start) * piece.itemsize
            end = begin + (high - low) * piece.itemsize
            copies[file].append(_Copy(begin, end, f.tensor, low - f.start, piece.torch_dtype))
            covered = high
        if covered < f.stop:
            raise CheckpointError(f"{where}: holds no {f.key} of {f.name} from number {covered:,} to {f.stop:,}")
    for each in copies.values():
        each.sort(key=lambda c: c.start)
    return copies


def _spans(index: Index, copies: Sequence[_Copy]) -> Iterator[tuple[int, int]]:
    """The blocks that `copies` need, in runs of neighbours of at most SPAN bytes: first, and one after the last."""
    blocks = sorted({b for c in copies for b in range(c.start // index.block, -(-c.stop // index.block))})
    most = max(1, SPAN // index.block)
    begin = 0
    for i, (one, other) in enumerate(pairwise([*blocks, -1]), start=1):
        if other != one + 1 or i - begin == most:
            yield blocks[begin], one + 1
            begin = i


def _whole(index: Index) -> Iterator[tuple[int, int]]:
    most = max(1, SPAN // index.block)
    for first in range(0, len(index.blocks), most):
        yield first, min(first + most, len(index.blocks))


def _make_rooms() -> SimpleQueue[bytearray]:
    """Memory for a span apiece of each thread."""
    rooms: SimpleQueue[bytearray] = SimpleQueue()
    for _ in range(_THREADS):
        rooms.put(bytearray())
    return rooms


def _copy_span(
    checkpoints: Checkpoints, commit: Commit, rooms: SimpleQueue[bytearray], index: Index, span: tuple[int, int], copies: Sequence[_Copy]
) -> int:
    """Fetch the blocks `span` of a file, verify them, and copy what they hold of `copies`; gives the bytes fetched."""
    room = rooms.get()
    try:
        return _copy_through(room, checkpoints, f"{commit.prefix}/{index.file}", index, span, copies)
    finally:
        rooms.put(room)


def _copy_through(room: bytearray, checkpoints: Checkpoints, key: str, index: Index, span: tuple[int, int], copies: Sequence[_Copy]) -> int:
    begin, end = span[0] * index.block, min(span[1] * index.block, index.size)
    if len(room) < end - begin:
        room.extend(bytes(end - begin - len(room)))
    where = f"checkpoint {checkpoints.directory.url}/{key}"
    with memoryview(room) as whole, whole[: end - begin] as view:
        for reading in range(1, _READINGS + 1):
            try:
                count = retrying(where, lambda: checkpoints.directory.read_into(key, begin, view))
            except FileNotFoundError:
                raise Damaged(f"{where}: is missing") from None
            differing = _first_differing(view[:count], index, span)
            if differing is None:
                break
            if reading == _READINGS:
                raise Damaged(f"{where}: is damaged, its bytes from {differing:,} on differ from what was saved")
        for c in copies:
            low, high = max(c.start, begin), min(c.stop, end)
            if low < high:  # whole numbers: blocks end where numbers do
                numbers = torch.frombuffer(view[low - begin : high - begin], dtype=torch.uint8).view(c.dtype)
                into = c.into + (low - c.start) // c.dtype.itemsize
                c.tensor[into : into + numbers.numel()].copy_(numbers)
                del numbers  # which holds the view
    return end - begin


def _first_differing(view: memoryview, index: Index, span: tuple[int, int]) -> int | None:
    """Where in its file the first block begins that is not as it was saved."""
    for number in range(*span):
        at = (number - span[0]) * index.block
        part = view[at : at + index.block]
        if len(part) != min(index.block, index.size - number * index.block) or hashlib.sha256(part).hexdigest() != index.blocks[number]:
            return number * index.block
    return None


def newest_sound(checkpoints: Checkpoints) -> Commit | None:
    """The newest checkpoint, every byte of which is as it was saved; damaged ones are set aside on the way."""
    for commit in reversed(checkpoints.commits()):
        try:
            verify(checkpoints, commit)
            return commit
        except CheckpointError as e:
            checkpoints.set_aside(commit, str(e))
    return None
