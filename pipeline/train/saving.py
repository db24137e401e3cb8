"""Save the state of training as a checkpoint, and find the way back to it. All ranks call each function together."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.checkpoint import Checkpoints, Commit, ModelCard, Receipt
from pipeline.checkpoint.commit import HISTORY
from pipeline.checkpoint.model import write_model
from pipeline.core.errors import CheckpointError, StorageError, TesseraError
from pipeline.core.progress import say
from pipeline.core.world import World
from pipeline.train.loop import Row
from pipeline.train.zero import Engine

_FULL = 1 << 20  # a disk with fewer bytes left than this is full


def save(
    engine: Engine, checkpoints: Checkpoints, card: ModelCard, view: str, samples: int, history: list[Row], keep: int, world: World
) -> None:
    """Write, upload and commit a checkpoint at `card.step`, then remove those beyond `keep`.

    Raises:
        TesseraError: the first rank's that could not write or upload, on every rank; nothing is committed then.
    """
    step = card.step
    attempt = world.broadcast(uuid.uuid4().hex)
    with tempfile.TemporaryDirectory(prefix="tessera-save-") as local:
        directory = Path(local)
        with _writing(directory):
            engine.save(directory)
        weights = engine.weights()
        receipts: list[Receipt] = []
        error: TesseraError | None = None
        try:
            if world.is_main:
                with _writing(directory):
                    write_model(directory, card, weights)
                    (directory / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in history))
            for file in sorted(p for p in directory.rglob("*") if p.is_file()):
                receipts.append(checkpoints.upload(step, attempt, file.relative_to(directory).as_posix(), file))
        except TesseraError as e:
            error = e  # the others wait for this rank: tell them before giving up
        _raise_first(world.gather(error))
        everyone = [r for part in world.gather(receipts) for r in part]
        try:
            if world.is_main:
                checkpoints.commit(Commit(step, samples, attempt, world.size, engine.stage, view, everyone))
                checkpoints.retain(keep)
        except TesseraError as e:
            error = e
        _raise_first(world.gather(error))


def restore(engine: Engine, checkpoints: Checkpoints, view: str, world: World, where: str = "pretrain") -> tuple[Commit | None, list[Row]]:
    """Load the newest sound checkpoint into `engine`; gives its commit and history, or (None, []) where there is none.

    Raises:
        CheckpointError: it was saved by another number of workers, at another stage, or on other data.
    """
    while True:
        commit = world.broadcast(_newest(checkpoints) if world.is_main else None)
        if commit is None:
            return None, []
        _check_fits(commit, engine, view, world, f"{where}: checkpoint {checkpoints.directory.url}/step-{commit.step}")
        with tempfile.TemporaryDirectory(prefix="tessera-restore-") as local:
            damage: CheckpointError | None = None
            try:
                checkpoints.fetch(commit, Path(local))
            except CheckpointError as e:
                damage = e
            damages = [d for d in world.gather(damage) if d is not None]
            if damages:
                if world.is_main:
                    checkpoints.set_aside(commit, str(damages[0]))
                world.barrier()
                continue
            engine.load(Path(local))
            history = [json.loads(line) for line in (Path(local) / HISTORY).read_text().splitlines()]
        if world.is_main:
            say(f"resuming at step {commit.step:,} from {checkpoints.directory.url}")
        return commit, history


def _newest(checkpoints: Checkpoints) -> Commit | None:
    steps = checkpoints.steps()
    return checkpoints.read(steps[-1]) if steps else None


def _check_fits(commit: Commit, engine: Engine, view: str, world: World, where: str) -> None:
    if commit.world_size != world.size:
        raise CheckpointError(
            f"{where} was saved by {commit.world_size} workers and can only be resumed by as many, not {world.size}; set cluster.workers"
        )
    if commit.zero_stage != engine.stage:
        raise CheckpointError(
            f"{where} was saved at pretrain.zero.stage {commit.zero_stage} and can only be resumed there, not at {engine.stage}"
        )
    if commit.view != view:
        raise CheckpointError(f"{where} was trained on other data ({commit.view[:12]}..) than the dataset there now ({view[:12]}..)")


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Tell of a full disk, for which torch and safetensors have errors of their own."""
    try:
        yield
    except Exception as e:
        if shutil.disk_usage(directory).free > _FULL:
            raise
        raise StorageError(f"{directory}: cannot write the checkpoint here, the disk is full (TMPDIR names another place)") from e


def _raise_first(errors: list[TesseraError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error
