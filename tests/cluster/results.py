"""RESULTS.md: the table of faults, and the preemption trace. A run of some of them brings their part of it up to date."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_HEAD = """\
# Faults injected into a running pre-training

{machine}. Rows are written by the tests of `make chaos`, those that were run; each says when (UTC).

A tiny ViT in fp32, saved every {every} steps. *Lost*: steps done again, of those that one save covers: {every}, and as many as are done
while a save is on its way. *Standstill*: the longest time without a step. *Losses*: all of them, against a run that nobody disturbed; bit
for bit, or with another number of workers relative. Each run is also checked for: every step once, samples consumed as many as the order
has up to there (but for the replaced ones named here), every byte of every checkpoint as it was saved, nothing left behind in the store. Where losses do
not apply, the run diverged, and its checkpoints alone are checked.

| fault | what was done | lost | standstill | losses | verdict | when |
|---|---|---|---|---|---|---|
"""
_TRACE = "\n## A preemption trace\n"


@dataclass(frozen=True)
class Result:
    """`told`: lost (steps), flight (steps done while a save is on its way), seconds (of standstill), losses (in words); what does not apply
    is missing."""

    fault: str
    done: str
    told: Mapping[str, Any]
    verdict: str


def update_table(file: Path, results: Iterable[Result], every: int) -> None:
    """Write `results` into the table in `file`; rows of faults that are not among them stay as they are."""
    table, _, trace = (file.read_text() if file.exists() else "").partition(_TRACE)
    rows = {_name(line): line for line in table.splitlines(keepends=True)[len(_HEAD.splitlines()) :]}
    rows |= {_name(line): line for line in _lines(results, every, datetime.now(UTC))}
    file.write_text(_HEAD.format(machine=machine(), every=every) + "".join(rows.values()) + (_TRACE + trace if trace else ""))


def update_trace(file: Path, text: str) -> None:
    """Put `text` in the place of what `file` says of a trace."""
    table = (file.read_text() if file.exists() else "").partition(_TRACE)[0]
    file.write_text(f"{table}{_TRACE}\n{text}")


def _name(row: str) -> tuple[str, ...]:
    """What tells a row from the others: the fault, and what was done."""
    return tuple(row.split("|")[1:3])


def _lines(results: Iterable[Result], every: int, when: datetime) -> Iterator[str]:
    for r in results:
        most = f" of {every} + {r.told['flight']}" if "flight" in r.told else ""
        lost = f"{r.told['lost']}{most}" if "lost" in r.told else ""
        seconds = f"{r.told['seconds']:.1f} s" if "seconds" in r.told else ""
        yield f"| {r.fault} | {r.done} | {lost} | {seconds} | {r.told.get('losses', '')} | {r.verdict} | {when:%Y-%m-%d %H:%M} |\n"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    engines = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed"))
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release()}, {engines}"
