"""Global batches that did not train the model, written into a stream's ledger. All ranks call each function together, and alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.core.errors import TesseraError
from pipeline.core.world import World
from pipeline.stream.ledger import BadSample, Skip
from pipeline.stream.loader import Stream

_NAMED = 256  # samples, at most, that the ledger names by key; positions name all


def leave_out(stream: Stream, step: int, turns: Sequence[int], world: World, samples: Sequence[tuple[int, int]] = ()) -> Skip:
    """The update of the global batch handed out last, of `step`, was left out; `turns` are those of this rank's micro-batches of it whose
    own loss was no finite number. `samples`: turn and place of those that gave no finite numbers themselves, where the loss is one of all
    together; where any rank has some, they alone are to blame."""
    first, size = stream.consumed - stream.global_batch, stream.micro_batch
    batches = [first + stream.mine[turn] * size for turn in turns if turn < len(stream.mine)]
    single = [first + stream.mine[turn] * size + place for turn, place in samples if turn < len(stream.mine)]
    found = world.gather((batches, single))
    blamed, length = [start for _, rank in found for start in rank], 1
    if not blamed:
        blamed, length = [start for rank, _ in found for start in rank], size
    suspects: list[tuple[int, int]] = []
    for start in sorted(blamed):
        if suspects and suspects[-1][1] == start:
            suspects[-1] = (suspects[-1][0], start + length)
        else:
            suspects.append((start, start + length))
    few = sum(last - start for start, last in suspects) <= _NAMED
    keys = [key for start, last in suspects for key in _keys(stream, start, last - start)] if few and world.is_main else []
    reason = f"its {'loss' if suspects else 'gradient'} is no finite number"
    skip = Skip(first, stream.consumed, step, reason, suspects=tuple(suspects), keys=tuple(world.broadcast(keys)))
    stream.ledger.skip(skip)
    return skip


def _keys(stream: Stream, start: int, count: int) -> Iterator[str]:
    places = stream.mixture.at(start, count)
    for i, (dataset, number) in enumerate(zip(places.dataset.tolist(), places.number.tolist(), strict=True)):
        replaced = stream.ledger.at(start + i)
        try:
            yield stream.datasets[dataset].key_of(replaced.by if replaced else number)
        except BadSample as e:
            yield e.key
        except TesseraError:
            return  # a store that fails now: the names are for people, and other ranks wait


def go_back(stream: Stream, state: Mapping[str, Any], step: int, reason: str) -> Skip:
    """Go on from `state`, of a checkpoint before, yet with what follows the last global batch handed out, of `step`; what lies between is
    passed over. The stream is to be iterated anew then."""
    met, position = [skip for skip in stream.ledger.skips if not skip.is_passed], stream.consumed
    stream.resume(state)
    passed = Skip(stream.consumed, position, step, reason, is_passed=True)
    for skip in met:
        if skip.first >= stream.consumed:
            stream.ledger.skip(skip)
    stream.ledger.skip(passed)
    stream.consumed = position
    return passed


def told_skip(skip: Skip) -> str:
    """In a clause."""
    if skip.is_passed:
        return (
            f"positions {skip.first:,} to {skip.last - 1:,} were passed over, {skip.last - skip.first:,} samples: training had come to "
            f"step {skip.step:,} with them and went back ({skip.reason})"
        )
    parts = ", ".join(f"{first:,} to {last - 1:,}" for first, last in skip.suspects)
    return f"the update of step {skip.step:,} was left out ({skip.reason}{f'; at positions {parts}' if parts else ''})"
