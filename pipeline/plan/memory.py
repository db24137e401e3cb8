"""The memory of one worker: its items, the moments of a step (moments.py), and the fullest of these, which is the peak, not the sum of
all items.

On a CPU what comes and goes with each step lies in glibc's heap, in tensors below 32 MiB: activations, gradients that parameters hold, and
at stage 3 gathered parameters. The heap gives nothing back, so that what lay in it is there still when buckets, which lie outside, are
fullest (train/heap.py; activations are all taken to be smaller than that).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.plan.moments import BUILDERS, Amounts
from pipeline.plan.setup import Setup

ITEMS = ("parameters", "gradients", "optimizer", "averages", "activations", "logits", "buffers", "temporaries", "runtime", "allocator")


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker: each item at its most; the sum at each moment, and the fullest moment's. `host` is what lies in host memory
    beside a GPU: what is offloaded, the checkpoint's copy, batches that wait."""

    items: Amounts
    moments: Amounts
    at_peak: Amounts
    host: Amounts = field(default_factory=dict)
    buckets: Amounts = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_at(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])


def memory_of(s: Setup) -> Memory:
    """Raises nothing: what does not fit anywhere is a number too."""
    share = -(-s.tensors.parameters // s.workers)
    build = BUILDERS[s.stage](s, share)
    moments = {name: build.amounts(name) for name in ("start", "forward", "backward", "reduce", "update")}
    in_heap = {name: each.pop("_heap", 0) + each.get("activations", 0) + each.get("logits", 0) for name, each in moments.items()}
    if s.on_cpu:  # it stays as large as it was at its fullest
        for name in ("forward", "backward", "reduce", "update"):
            moments[name]["allocator"] = max(in_heap.values()) - in_heap[name]
    sums = {name: sum(each.values()) for name, each in moments.items()}
    items = {item: max(each.get(item, 0) for each in moments.values()) for item in ITEMS}
    fullest = max(sums, key=lambda name: sums[name])
    host = {name: size for name, size in build.host().items() if size}
    return Memory(items, sums, {k: v for k, v in moments[fullest].items() if v}, host, build.buckets())
