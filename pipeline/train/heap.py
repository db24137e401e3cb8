"""Where glibc puts a training process's tensors on a CPU: what stays is outside of its heap, what comes and goes with each step in it.

What is outside is given back to the kernel when it is freed; the heap stays as large as it was at its fullest.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def stay_outside() -> None:
    """From now on tensors of 1 MiB or more lie outside. A model would leave a heap as large as it is once DeepSpeed has copied it; so would
    ZeRO-3's first step, which gathers each parameter by itself, to learn their order, among activations that stay."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 2**20)


def keep_memory() -> None:
    """After the first step: have glibc keep what one frees for the next. Else it gives it back to the kernel, and faults it in again page
    by page: 16,000 to 200,000 faults a step of ViT-S/16 at a batch of 16, against less than 4,000."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most there is
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
