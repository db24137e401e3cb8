"""Save the state of training as a checkpoint, and find the way back to it. All ranks call each function together."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoints, Commit, ModelCard, Receipt
from pipeline.checkpoint.commit import HISTORY, LOADER
from pipeline.checkpoint.model import split_url, write_model
from pipeline.config.schema import StorageSection
from pipeline.core.errors import CheckpointError, ConfigError, Diverged, StorageError, TesseraError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.loop import Row
from pipeline.train.zero import Engine

_FULL = 1 << 20  # a disk with fewer bytes left than this is full


@dataclass(frozen=True)
class State:
    """What a restored checkpoint says beside the engine's state: its commit, the training history, the loader's state."""

    commit: Commit
    history: list[Row]
    loader: dict[str, Any]


def save(
    engine: Engine, checkpoints: Checkpoints, card: ModelCard, loader: dict[str, Any], history: list[Row], keep: int, world: World
) -> None:
    """Write, upload and commit a checkpoint at `card.step`, then remove those beyond `keep`; `loader` is the stream's state.

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
                _check_finite(weights, step)
                with _writing(directory):
                    write_model(directory, card, weights)
                    (directory / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in history))
                    (directory / LOADER).write_text(json.dumps(loader))
            for file in sorted(p for p in directory.rglob("*") if p.is_file()):
                receipts.append(checkpoints.upload(step, attempt, file.relative_to(directory).as_posix(), file))
        except TesseraError as e:
            error = e  # the others wait for this rank: tell them before giving up
        _raise_first(world.gather(error))
        everyone = [r for part in world.gather(receipts) for r in part]
        try:
            if world.is_main:
                checkpoints.commit(Commit(step, loader["consumed"], attempt, world.size, engine.stage, loader["view"], everyone))
                checkpoints.retain(keep)
        except TesseraError as e:
            error = e
        _raise_first(world.gather(error))


def restore(engine: Engine, checkpoints: Checkpoints, view: str, world: World) -> State | None:
    """Load the run's newest sound checkpoint into `engine`; None where there is none.

    Raises:
        CheckpointError: it was saved by another number of workers, at another stage, or on other data.
    """
    while True:
        commit = world.broadcast(_newest(checkpoints) if world.is_main else None)
        if commit is None:
            return None
        try:
            return _load(engine, checkpoints, commit, view, world, "pretrain")
        except _Damaged as e:
            if world.is_main:
                checkpoints.set_aside(commit, str(e))
            world.barrier()


def restore_from(engine: Engine, url: str, storage: StorageSection, view: str, world: World) -> State:
    """Load the checkpoint `URL` or `URL@step` of another run, and change nothing there.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit, as in `restore`.
        ConfigError: it lies outside the config's storage. DeepSpeed's files are pickles, which run code as they are read.
    """
    where = "pretrain.start.from"
    base, step = split_url(url)
    source, root = Storage(base, storage.endpoint), Storage(storage.url, storage.endpoint)
    if not source.url.startswith(f"{root.url}/"):
        raise ConfigError(f"{where}: {base} with load: all must lie in this config's storage, {root.url} (load: weights may lie anywhere)")
    checkpoints = Checkpoints(source)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{where}: there is no committed checkpoint in {base}")
    commit = checkpoints.read(step if step is not None else steps[-1])
    try:
        return _load(engine, checkpoints, commit, view, world, where)
    except _Damaged as e:
        raise CheckpointError(f"{where}: {e}") from e


class _Damaged(Exception):
    pass


def _load(engine: Engine, checkpoints: Checkpoints, commit: Commit, view: str, world: World, where: str) -> State:
    """Fetch, verify and load; all ranks raise `_Damaged` together where one of them finds damage."""
    _check_fits(commit, engine, view, world, f"{where}: checkpoint {checkpoints.directory.url}/step-{commit.step}")
    with tempfile.TemporaryDirectory(prefix="tessera-restore-") as local:
        damage: str | None = None
        try:
            checkpoints.fetch(commit, Path(local))
        except CheckpointError as e:
            damage = str(e)
        damages = [d for d in world.gather(damage) if d is not None]
        if damages:
            raise _Damaged(damages[0])
        engine.load(Path(local))
        history = [json.loads(line) for line in (Path(local) / HISTORY).read_text().splitlines()]
        loader = json.loads((Path(local) / LOADER).read_text())
    if world.is_main:
        say(f"resuming at step {commit.step:,} from {checkpoints.directory.url}")
    return State(commit, history, loader)


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


def _check_finite(weights: dict[str, torch.Tensor], step: int) -> None:
    """A diverged model must not push sound checkpoints out."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise Diverged(f"pretrain: {name} is no longer finite at step {step}, which is not saved; try a lower pretrain.optimizer.lr")


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
