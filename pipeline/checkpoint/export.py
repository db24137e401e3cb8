"""The model in a checkpoint, in the form that others load: put together from all ranks' parts, piece by piece, in the memory of a few
tensors; every byte is verified before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.checkpoint.commit import Checkpoints, Commit
from pipeline.checkpoint.fragments import OF_MODEL, Fragment, Index
from pipeline.checkpoint.model import find_card, is_run, read_shapes, split_url
from pipeline.checkpoint.read import read_into
from pipeline.core.errors import CheckpointError, NoSuchRun
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.models import formats
from pipeline.models.formats.lazy import Rows, State

_MIB = 1 << 20


def find_commits(url: str, endpoint: str | None = None) -> tuple[Checkpoints, list[Commit]]:
    """The checkpoint that `URL@step` names, or all those of the run `URL`, the newest last.

    Raises:
        NoSuchRun: there is no run. CheckpointError: no such step.
    """
    base, step = split_url(url)
    if not is_run(base, endpoint):
        raise NoSuchRun(f"run {base}: there is no run here")
    checkpoints = Checkpoints(Storage(base, endpoint))
    return checkpoints, checkpoints.commits() if step is None else [checkpoints.read(step)]


def export(url: str, dst: str, to: str, *, endpoint: str | None = None, force: bool = False, most: int | None = None) -> Commit:
    """Write the model of the checkpoint `URL@step`, or of the run's newest, to the directory `dst`; gives the checkpoint. `to`, `force` and
    `most` are those of `formats.export`, and so is what is written.

    Raises:
        NoSuchRun: nothing was committed there. CheckpointError: there is no such step, or it is damaged. ConfigError: the format cannot
            express the model. StorageError: as `formats.export`. In all cases nothing is left at `dst`.
    """
    checkpoints, commits = find_commits(url, endpoint)
    if not commits:
        raise NoSuchRun(f"run {checkpoints.run.url}: there is no committed checkpoint here")
    commit = commits[-1]
    card = find_card(checkpoints.run, commit.step)
    with torch.device("meta"):  # shapes without numbers
        model = card.make()
    reader = _Reader(checkpoints, commit)
    state = model.state_dict()
    if differing := sorted(n for n in {*state, *reader.shapes} if n not in state or reader.shapes.get(n) != list(state[n].shape)):
        raise CheckpointError(f"{_where(checkpoints, commit)}: its {differing[0]} is not as its card says")
    size = sum(tensor.numel() * 4 for tensor in state.values())
    with Progress("export", size / _MIB, "MiB") as progress:
        formats.export(
            model, dst, to, state=State.of(state, reader), endpoint=endpoint, mean=card.mean, std=card.std, classes=card.classes or None,
            force=force, most=most, told=lambda count: progress.update(count / _MIB),
        )  # fmt: skip
    return commit


class _Reader:
    """Rows of parameters and buffers, as they are asked for."""

    def __init__(self, checkpoints: Checkpoints, commit: Commit) -> None:
        self.checkpoints, self.commit = checkpoints, commit
        self.shapes = read_shapes(checkpoints, commit)
        self._indices = [_of_model(index) for index in checkpoints.indices(commit)]
        pieces = sorted((p for index in self._indices for p in index.pieces), key=lambda p: -OF_MODEL.index(p.key))
        self._kinds = {p.name: (p.key, p.torch_dtype) for p in pieces}  # the average comes last, and so stays

    def __call__(self, rows: Sequence[Rows]) -> list[torch.Tensor]:
        """Raises CheckpointError where some are missing or damaged."""
        wanted = [self._room(each) for each in rows]
        read_into(self.checkpoints, self.commit, self._indices, wanted)
        return [f.tensor.view(-1, *shape[1:]) if (shape := self.shapes[f.name]) else f.tensor.view(()) for f in wanted]

    def _room(self, rows: Rows) -> Fragment:
        if rows.name not in self._kinds:
            raise CheckpointError(f"{_where(self.checkpoints, self.commit)}: holds no {rows.name}")
        key, dtype = self._kinds[rows.name]
        shape = self.shapes[rows.name]
        row = math.prod(shape[1:])
        stop = math.prod(shape) if rows.stop is None else rows.stop * row
        return Fragment(key, rows.name, rows.start * row, torch.empty(stop - rows.start * row, dtype=dtype))


def _of_model(index: Index) -> Index:
    """Without what is of the optimiser."""
    return Index(index.file, index.size, index.block, index.blocks, [p for p in index.pieces if p.key in OF_MODEL])


def _where(checkpoints: Checkpoints, commit: Commit) -> str:
    return f"checkpoint {checkpoints.directory.url}/{commit.prefix}"
