"""The table of faults that RESULTS.md is."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_HEAD = """\
# Faults injected into a running pre-training

{when}, {machine}. Made by `make chaos`, and not by hand.

A tiny ViT in fp32, saved every {every} steps. *Lost*: steps done again, of those that one save covers: {every}, and as many as are done
while a save is on its way. *Standstill*: the longest time without a step. *Losses*: all of them, against a run that nobody disturbed; bit
for bit, or with another number of workers relative. Each run is also checked for: every step once, samples consumed as many as the order
has up to there (but for the replaced ones named here), every byte of every checkpoint as it was saved, nothing left behind in the store.

| fault | what was done | lost | standstill | losses | verdict |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Result:
    """`told`: lost (steps), flight (steps done while a save is on its way), seconds (of standstill), losses (in words); what does not apply
    is missing."""

    fault: str
    done: str
    told: Mapping[str, Any]
    verdict: str


def as_markdown(results: Iterable[Result], every: int) -> str:
    lines = [_HEAD.format(when=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", machine=machine(), every=every)]
    for r in results:
        most = f" of {every} + {r.told['flight']}" if "flight" in r.told else ""
        lost = f"{r.told['lost']}{most}" if "lost" in r.told else ""
        seconds = f"{r.told['seconds']:.1f} s" if "seconds" in r.told else ""
        lines.append(f"| {r.fault} | {r.done} | {lost} | {seconds} | {r.told.get('losses', '')} | {r.verdict} |\n")
    return "".join(lines)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    engines = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed"))
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release()}, {engines}"
