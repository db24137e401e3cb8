"""Two sets of names for the same tensors: rules that read both ways.

A rule pairs one tensor of ours with one or several of theirs, which are then joined along the first dimension (queries, keys and
values). In names `{i}` and `{j}` stand for numbers, `{p}` for the last part. Which tensors there must be is said by our model, made on
the meta device: so everything missing, unknown or of another shape is known, and named, before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models.formats.lazy import Lazy

Tensors = dict[str, torch.Tensor]
_SHOWN = 5
_FIELDS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>[a-z_]+)", "name": r"(?P<name>.+)"}


class Change(NamedTuple):
    """How one tensor of theirs becomes ours, and back; formats that are only read have no way back."""

    read: Callable[[torch.Tensor], torch.Tensor]
    write: Callable[[torch.Tensor], torch.Tensor] | None = None


AS_IS = Change(lambda t: t, lambda t: t)
TRANSPOSED = Change(lambda t: t.t(), lambda t: t.t())
ROW = Change(lambda t: t[None, None], lambda t: t[0, 0])  # (D,), ours (1, 1, D)
TABLE = Change(lambda t: t[None], lambda t: t[0])  # (N, D), ours (1, N, D)


class Rule(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    change: Change = AS_IS


def rule(ours: str, *theirs: str, change: Change = AS_IS) -> Rule:
    return Rule(ours, theirs, change)


SAME_NAMES = (rule("{name}", "{name}"),)


class Pair(NamedTuple):
    """One tensor of ours, and the names of theirs that it is made of; none where their format has no such tensor."""

    ours: str
    theirs: tuple[str, ...]
    change: Change


def pair(names: Iterable[str], rules: Sequence[Rule]) -> list[Pair]:
    """The first rule that fits each of our names."""
    patterns = [(re.compile(_pattern(r.ours)), r) for r in rules]
    pairs = []
    for name in names:
        for pattern, r in patterns:
            if found := pattern.fullmatch(name):
                pairs.append(Pair(name, tuple(t.format(**found.groupdict()) for t in r.theirs), r.change))
                break
        else:
            pairs.append(Pair(name, (), AS_IS))
    return pairs


def _pattern(name: str) -> str:
    parts = re.split(r"\{(\w+)\}", name)
    return "".join(_FIELDS[part] if odd % 2 else re.escape(part) for odd, part in enumerate(parts))


def read_state(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], rules: Sequence[Rule], ignored: Sequence[str], url: str
) -> Tensors:
    """`tensors` of another format under our names, in the shapes of `wanted`; numbers in fp32.

    Args:
        ignored: patterns of names that the format may have beside the model's.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all in one sentence that begins with `url`.
    """
    state: Tensors = {}
    missing: list[str] = []
    wrong: list[str] = []
    used: set[str] = set()
    for ours, theirs, change in pair(wanted, rules):
        absent = [t for t in theirs if t not in tensors]
        if absent or not theirs:
            used.update(theirs)
            if not _spared(ours):
                missing += absent or [f"{ours} (ours)"]
            else:
                state[ours] = torch.zeros(wanted[ours].shape, dtype=wanted[ours].dtype)
            continue
        used.update(theirs)
        shapes = " + ".join(f"{t} {tuple(tensors[t].shape)}" for t in theirs)
        try:
            made = torch.cat([change.read(tensors[t]) for t in theirs]) if len(theirs) > 1 else change.read(tensors[theirs[0]])
        except (RuntimeError, IndexError) as e:  # of another number of dimensions
            wrong.append(f"{shapes} is no {tuple(wanted[ours].shape)} ({str(e).splitlines()[0]})")
            continue
        if made.shape != wanted[ours].shape:
            wrong.append(f"{shapes} instead of {_undone(wanted[ours], theirs, change)}")
            continue
        # In order, for a product may round otherwise, and slower, when its factor is stored transposed.
        state[ours] = (made.float() if made.is_floating_point() else made).contiguous()
    unknown = [name for name in tensors if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignored)]
    problems = [
        f"{what}: {listed(names)}" for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)) if names
    ]
    if problems:
        raise CheckpointError(f"{url}: does not fit the model, {'; '.join(problems)}")
    return state


def write_state(state: Mapping[str, Lazy], rules: Sequence[Rule], target: str) -> dict[str, Lazy]:
    """Our `state` under their names, each tensor of theirs made of no more of ours than it takes.

    Raises:
        ConfigError: the format has no name for some of it.
    """
    written: dict[str, Lazy] = {}
    pairs = pair(state, rules)
    if nameless := [p.ours for p in pairs if not p.theirs]:
        raise ConfigError(f"{target}: has no name for {listed(nameless)}")
    for ours, theirs, change in pairs:
        assert change.write is not None, "rules of formats that are only read are not written"
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            written[name] = part.map(change.write)
    return written


def listed(names: Sequence[str]) -> str:
    """A handful of names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def strip_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors below `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers `{i}` takes in `pattern` among the names that begin with it, as in "blocks.{i}."."""
    found = re.compile(_pattern(pattern))
    return len({match["i"] for name in names if (match := found.match(name))})


def _spared(name: str) -> bool:
    """Counters of BatchNorm that older files have not; nothing depends on them while the momentum is a number."""
    return name.endswith(".num_batches_tracked")


def _undone(wanted: torch.Tensor, theirs: tuple[str, ...], change: Change) -> str:
    """The shape that was expected, in their layout where it can be told."""
    if change.write is None or len(theirs) > 1:
        return f"{tuple(wanted.shape)} once read"
    return str(tuple(change.write(wanted).shape))
