"""Save the state of training in the background: training stands still for a copy to host memory, and for nothing else.

    begin    all ranks, at the same step: copy the fragments to host memory, hand over to the uploading process, go on training
    (thread) upload, tell rank 0 the receipts, learn from it whether it could commit
    take     what became of it, once that is known

At most one save is in flight. Receipts travel through a small key-value store of torch's beside the process group, so that no collective
of training waits for an upload.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.commit import Checkpoints, Commit, Lease
from pipeline.checkpoint.fragments import BLOCK, Fragment, Index
from pipeline.checkpoint.memory import HostMemory
from pipeline.checkpoint.retain import Retention, retain
from pipeline.core.errors import CheckpointError, CredentialsError, Diverged, Fenced, InfrastructureError, StorageError, TesseraError
from pipeline.core.progress import say
from pipeline.core.retry import insist
from pipeline.core.upload import Receipt, Uploader
from pipeline.core.world import World

_GRACE = 60.0  # seconds that another rank's news may come later than its patience allows
_SLOWEST = 4e6  # bytes a second of an upload that still counts as one
_LAST = 60.0  # seconds for removing what does not stay, after the last save


@dataclass(frozen=True)
class Outcome:
    """What became of a save; `error` is None where it was committed. `stall`: seconds that training stood still; `seconds`: from the
    beginning to the commit; `bytes`: of this rank."""

    step: int
    error: TesseraError | None
    stall: float
    seconds: float
    bytes: int


class Saver:
    """Saves of one job, on all ranks alike.

    Args:
        fragments: what this rank saves; the same names and places at each save.
        lease: the job's.
        patience: for how many seconds an upload that fails is tried again.
    """

    def __init__(
        self, checkpoints: Checkpoints, lease: Lease, fragments: Sequence[Fragment], retention: Retention, patience: float, world: World
    ) -> None:
        self.checkpoints, self.lease, self.retention, self.patience, self.world = checkpoints, lease, retention, patience, world
        self.memory = HostMemory(fragments)
        self._uploader: Uploader | None = None
        self._longest = _longest(patience, max(world.gather(self.memory.bytes)))
        self._board = _open_board(world, self._longest + patience + _GRACE)  # rank 0 commits as well
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.is_pending = False  # whether an outcome is still to be taken

    @property
    def is_free(self) -> bool:
        """Whether `begin` may be called: the last outcome was taken, and what did not stay is removed."""
        return not self.is_pending and not (self._thread and self._thread.is_alive())

    def begin(self, fragments: Sequence[Fragment], commit: Commit | None, files: Mapping[str, bytes]) -> float:
        """Begin a save. Rank 0 gives the commit, still without files, and the small `files` that belong to it; all ranks call this
        together, once the last outcome was taken. Gives the seconds that training stood still."""
        assert not self.is_pending, "one save at a time"
        if self._thread is not None:
            self._thread.join()
        began = time.perf_counter()
        commit = self.world.broadcast(commit)
        assert commit is not None, "rank 0 gives the commit"
        self.memory.fill(fragments)
        stall = time.perf_counter() - began
        self.is_pending = True
        self._thread = threading.Thread(target=self._finish, args=(commit, dict(files), began, stall), daemon=True, name="save")
        self._thread.start()
        return stall

    def take(self, timeout: float = 0.0) -> Outcome | None:
        """The outcome of the save in flight, waited for `timeout` seconds; None while it goes on."""
        if not self.is_pending:
            return None
        try:
            outcome = self._outcomes.get(timeout > 0, timeout)
        except queue.Empty:
            return None
        self.is_pending = False
        return outcome

    def close(self) -> None:
        """Give up what is in flight; removing what does not stay is not given up at once."""
        if self.is_pending and self._uploader is not None:
            self._uploader.kill()
        if self._thread is not None:
            self._thread.join(_LAST if not self.is_pending else 5)
        if self._uploader is not None:
            self._uploader.close()
        self.memory.close()

    # The thread

    def _finish(self, commit: Commit, files: dict[str, bytes], began: float, stall: float) -> None:
        error = self._conclude(commit, *self._try_upload(commit, files))
        self._outcomes.put(Outcome(commit.step, error, stall, time.perf_counter() - began, self.memory.bytes))
        if self.world.is_main and error is None:
            try:
                retain(self.checkpoints, self.lease, self.retention)
            except TesseraError as e:
                say(f"warning: old checkpoints could not be removed ({e})")

    def _try_upload(self, commit: Commit, files: Mapping[str, bytes]) -> tuple[list[Receipt], TesseraError | None]:
        """Receipts, or why there are none: whatever it is, the other ranks wait to hear of it."""
        try:
            return self._upload(commit, files), None
        except TesseraError as e:
            return [], e
        except Exception as e:  # noqa: BLE001  nobody else would hear of it
            return [], _unexpected(commit, e)

    def _upload(self, commit: Commit, files: Mapping[str, bytes]) -> list[Receipt]:
        if (name := self.memory.first_not_finite()) is not None:  # a diverged model must not push sound checkpoints out
            raise Diverged(
                f"pretrain: {name} is no longer finite at step {commit.step:,}, which is not saved; try a lower pretrain.optimizer.lr"
            )
        if self._uploader is None:
            self._uploader = Uploader(self.checkpoints.directory, self.memory.fd, self.memory.bytes, self.patience, self._warn)
        name = f"rank-{self.world.rank:05d}-of-{self.world.size:05d}"
        alarm = threading.Timer(self._longest, self._uploader.kill)  # a store that neither answers nor fails
        alarm.start()
        try:
            receipt, blocks = self._uploader.upload(f"{commit.prefix}/{name}.safetensors", BLOCK)
            index = Index(f"{name}.safetensors", receipt.bytes, BLOCK, blocks, self.memory.pieces)
            small = self._uploader.write(
                {f"{commit.prefix}/{key}": data for key, data in {f"{name}.json": index.to_json(), **files}.items()}
            )
        except InfrastructureError:
            self._uploader.close()
            self._uploader = None  # the next save has a new one
            raise
        finally:
            alarm.cancel()
        return [Receipt(r.name.removeprefix(f"{commit.prefix}/"), r.bytes, r.sha256) for r in (receipt, *small)]

    def _conclude(self, commit: Commit, receipts: list[Receipt], error: TesseraError | None) -> TesseraError | None:
        """Rank 0 gathers everybody's receipts and commits; all ranks learn what came of it."""
        if not self.world.is_main:
            self._board.put(f"{commit.attempt}/{self.world.rank}", (receipts, error))
            return self._board.take(f"{commit.attempt}/outcome")[1]
        self._board.forget()
        everyone = [(receipts, error), *(self._board.take(f"{commit.attempt}/{rank}") for rank in range(1, self.world.size))]
        errors = [e for _, e in everyone if e is not None]
        error = errors[0] if errors else self._commit(commit, [r for part, _ in everyone for r in part])
        self._board.put(f"{commit.attempt}/outcome", ([], error))
        if errors or isinstance(error, Fenced):
            self._discard(commit)
        return error

    def _commit(self, commit: Commit, files: list[Receipt]) -> TesseraError | None:
        whole = replace(commit, files=files)
        try:
            insist(lambda: self.checkpoints.commit(whole, self.lease), self.patience, self._warn)
        except TesseraError as e:
            return e
        except Exception as e:  # noqa: BLE001  the other ranks wait for an outcome
            return _unexpected(commit, e)
        return None

    def _discard(self, commit: Commit) -> None:
        """What was uploaded of a save that came to nothing: it takes up room, which may be what is missing. A commit that was made while
        another job took up the run may be one that it goes on from."""
        try:
            if not self.checkpoints.has(commit):
                self.checkpoints.directory.remove(commit.prefix)
        except TesseraError as e:
            say(f"warning: what was uploaded of the checkpoint at step {commit.step:,} is still there ({e}); a later one removes it")

    def _warn(self, text: str) -> None:
        say(f"warning: saving a checkpoint: {text}")


def _unexpected(commit: Commit, error: Exception) -> InfrastructureError:
    return InfrastructureError(f"pretrain.save: the checkpoint at step {commit.step:,} failed ({type(error).__name__}: {error})")


def new_attempt(lease: Lease) -> str:
    """A prefix that nobody used before."""
    return f"g{lease.generation}-{uuid.uuid4().hex}"


class _Board:
    """Where ranks leave each other news, by key; with one rank there is nobody to tell."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store
        self._read: list[str] = []

    def forget(self) -> None:
        """Drop what was read; on rank 0, which alone reads what others put there, before each save."""
        while self._read and self._store is not None:
            self._store.delete_key(self._read.pop())

    def put(self, key: str, news: tuple[list[Receipt], TesseraError | None]) -> None:
        if self._store is not None:
            receipts, error = news
            told = {"error": type(error).__name__, "text": str(error)} if error else {}
            self._store.set(key, json.dumps({"receipts": [asdict(r) for r in receipts], **told}))

    def take(self, key: str) -> tuple[list[Receipt], TesseraError | None]:
        """Wait for the news under `key`; an InfrastructureError among them where they do not come in time."""
        assert self._store is not None, "alone"
        try:
            values: dict[str, Any] = json.loads(self._store.get(key))
            self._read.append(key)
        except (dist.DistStoreError, RuntimeError) as e:
            return [], InfrastructureError(f"pretrain.save: a rank has told nothing of its part of the checkpoint ({e})")
        error = _ERRORS.get(values["error"], InfrastructureError)(values["text"]) if "error" in values else None
        return [Receipt(**r) for r in values["receipts"]], error


_ERRORS = {kind.__name__: kind for kind in (CheckpointError, CredentialsError, Diverged, Fenced, InfrastructureError, StorageError)}


def _longest(patience: float, size: int) -> float:
    """Seconds that a rank's uploads, of `size` bytes in all, may take: longer than any store that works needs."""
    return size / _SLOWEST + 2 * patience + _GRACE  # twice: it uploads two things in turn


def _open_board(world: World, longest: float) -> _Board:
    """Of all ranks, which wait for news for `longest` seconds; rank 0 keeps it."""
    if world.size == 1:
        return _Board(None)
    host, wait = os.environ["MASTER_ADDR"], timedelta(seconds=longest)
    if world.is_main:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        world.broadcast(store.port)
        return _Board(store)
    return _Board(dist.TCPStore(host, world.broadcast(None), is_master=False, wait_for_workers=False, timeout=wait))
