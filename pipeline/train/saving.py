"""Take up the state of training from a checkpoint, written by any number of ranks at any ZeRO stage. All ranks call each function together.

What a checkpoint holds beside each rank's fragments: `state.json` (the states of loader and guard, the optimiser's count of steps, the
shapes of all tensors), `model.json` (the card), `history.jsonl` (the recorded metrics).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import Checkpoints, Commit
from pipeline.checkpoint.commit import ALL_DAMAGED, HISTORY, STATE
from pipeline.checkpoint.fragments import Fragment, Index
from pipeline.checkpoint.model import CARD, ModelCard, split_url
from pipeline.checkpoint.read import Damaged, read_into
from pipeline.core.errors import CheckpointError, TesseraError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.train.speed import Row
from pipeline.train.zero import Engine

_RANDOM = "random"


@dataclass(frozen=True)
class State:
    """What a restored checkpoint says beside the engine's state: its commit, the training history, the states of loader and guard."""

    commit: Commit
    history: list[Row]
    loader: dict[str, Any]
    guard: dict[str, Any]


def fragments(engine: Engine, world: World) -> list[Fragment]:
    """All that this rank saves: the engine's fragments, and the state of torch's generators. Each micro-batch seeds these anew (`loop.py`),
    so training depends on them only in what it draws outside of one."""
    return [*engine.fragments(), *(Fragment(_RANDOM, name, 0, state) for name, state in _generators(world).items())]


def _generators(world: World) -> dict[str, torch.Tensor]:
    states = {f"cpu.{world.rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states


def files(engine: Engine, card: ModelCard, loader: dict[str, Any], guard: dict[str, Any], history: Sequence[bytes]) -> dict[str, bytes]:
    """The small files of a checkpoint; rank 0 writes them. `history`: as `encode` gives its rows."""
    return {
        STATE: json.dumps({"loader": loader, "guard": guard, "engine": engine.numbers()}).encode(),
        CARD: card.to_json(),
        HISTORY: b"".join(history),
    }


def encode(row: Row) -> bytes:
    """A row of the history as a line of its file: once, when it is recorded. All of a long run's take a second."""
    return json.dumps(row).encode() + b"\n"


def restore(engine: Engine, checkpoints: Checkpoints, view: str, world: World) -> State | None:
    """Load the run's newest sound checkpoint into `engine`, and set aside the damaged ones on the way; None where there is none.

    Raises:
        CheckpointError: it was saved on other data, or holds another model's state; the engine is as it was. Or all are damaged: what the
            engine holds is of no use then.
    """
    is_spoilt = False
    while True:
        commit = on_main(world, lambda: next(reversed(checkpoints.commits()), None))
        if commit is None and is_spoilt:
            raise CheckpointError(f"checkpoints of {checkpoints.run.url}: {ALL_DAMAGED}")
        if commit is None:
            return None
        try:
            return _load(engine, checkpoints, commit, view, world, "pretrain")
        except _Damaged as e:
            is_spoilt = True
            if world.is_main:
                checkpoints.set_aside(commit, str(e))
            world.barrier()


def restore_from(engine: Engine, url: str, endpoint: str | None, view: str, world: World) -> State:
    """Load the checkpoint `URL` or `URL@step` of another run, and change nothing there.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit, as in `restore`.
    """
    where = "pretrain.start.from"
    base, step = split_url(url)
    checkpoints = Checkpoints(Storage(base, endpoint))

    def find() -> Commit:
        commits = checkpoints.commits()
        if not commits:
            raise CheckpointError(f"{where}: there is no committed checkpoint in {base}")
        return commits[-1] if step is None else checkpoints.read(step)

    try:
        return _load(engine, checkpoints, on_main(world, find), view, world, where)
    except _Damaged as e:
        raise CheckpointError(f"{where}: {e}") from e


class _Damaged(Exception):
    pass


def _load(engine: Engine, checkpoints: Checkpoints, commit: Commit, view: str, world: World, where: str) -> State:
    """Fetch, verify and load; all ranks raise `_Damaged` together where one of them finds damage."""
    at = f"{where}: checkpoint {checkpoints.directory.url}/step-{commit.step}"
    if commit.view != view:
        raise CheckpointError(
            f"{at} was trained on other data ({commit.view[:12]}..) than the dataset there now ({view[:12]}..); where a deny-list came "
            "since, go on without it (data.own_deny, data.deny), or start a new run from this checkpoint (pretrain.start, load: weights)"
        )

    def fetch() -> tuple[list[Index], dict[str, Any], list[Row]]:
        history = [json.loads(line) for line in checkpoints.fetch(commit, HISTORY).splitlines()]
        checkpoints.fetch(commit, CARD)  # whoever takes the model out of it needs that
        return checkpoints.indices(commit), json.loads(checkpoints.fetch(commit, STATE)), history

    # Rank 0 reads what all need, so that a thousand ranks do not ask for a thousand indices each.
    indices, state, history = on_main(world, fetch, _Damaged)
    ours, theirs = engine.numbers()["shapes"], state["engine"]["shapes"]
    if differing := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise CheckpointError(f"{at} is of a different model; its {differing[0]} is not as this model's")
    generators = _generators(world)
    saved = {(piece.key, piece.name) for index in indices for piece in index.pieces}
    wanted = [Fragment(_RANDOM, name, 0, value) for name, value in generators.items() if (_RANDOM, name) in saved]
    error: CheckpointError | None = None
    try:
        with torch.no_grad():
            read_into(checkpoints, commit, indices, [*engine.fragments(), *wanted])
    except CheckpointError as e:
        error = e
    if errors := [e for e in world.gather(error) if e is not None]:
        raise _Damaged(str(errors[0])) if any(isinstance(e, Damaged) for e in errors) else errors[0]
    engine.restored(state["engine"])
    for name, value in generators.items():
        if (_RANDOM, name) in saved:
            torch.set_rng_state(value) if name.startswith("cpu") else torch.cuda.set_rng_state(value, world.device)
    if world.is_main:
        say(f"resuming at step {commit.step:,} from {checkpoints.directory.url}")
    return State(commit, history, state["loader"], state.get("guard", {}))  # the first versions had none


def on_main(world: World, find: Any, kind: type[Exception] | None = None) -> Any:
    """What rank 0 finds, on every rank; what it raises of ours is raised everywhere, a CheckpointError as `kind` where that is given."""
    found: Any = None
    if world.is_main:
        try:
            found = (find(), None)
        except TesseraError as e:
            found = (None, e)
    found, error = world.broadcast(found)
    if isinstance(error, CheckpointError) and kind is not None:
        raise kind(str(error))
    if error is not None:
        raise error
    return found
