"""What this process keeps of tensors that are freed, before and after the first step; each in a process of its own, since it is for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Tensors of 8 MiB, 256 MiB together, are freed where another one lies on top of each; tells how much of them is still there.
FREED = """
from pathlib import Path
import torch
from pipeline.train import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.ones(2**22)  # freed, it has glibc take tensors of up to its size into the heap from now on, where nobody forbids it
for name in {names}:
    getattr(heap, name)()
before = resident()
held = [(torch.ones(2**21), torch.ones(2**8)) for _ in range(32)]
small = [each for _, each in held]
del held
print((resident() - before) / 2**28)
"""


def freed(*names: str) -> float:
    done = subprocess.run([sys.executable, "-c", FREED.format(names=list(names))], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_what_is_built_goes_and_what_steps_free_stays() -> None:
    assert freed() > 0.9
    assert freed("stay_outside") < 0.1
    assert freed("stay_outside", "keep_memory") > 0.9
