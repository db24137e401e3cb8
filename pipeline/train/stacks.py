"""What another process of this machine does, seen from outside: it need not run for that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_PATIENCE = 20.0  # seconds for py-spy


def process_state(pid: int) -> tuple[str, int]:
    """(state, ticks of processor time) of a process; no state where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])


def kernel_stacks(pid: int) -> str:
    """What the kernel says of a process and its threads."""
    lines = []
    for name in ("status", "wchan", "stack"):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text()
        except OSError as e:  # another user's, or a kernel that does not tell
            text = f"({e.strerror})"
        wanted = [
            line for line in text.splitlines() if name != "status" or line.startswith(("State", "Threads", "VmRSS", "SigPnd", "ShdPnd"))
        ]
        lines += [f"/proc/{pid}/{name}:", *(f"    {line}" for line in wanted)]
    return "\n".join(lines)


def python_stacks(pid: int) -> str:
    """Python's stacks read from outside, which needs no help of the process."""
    command = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if command is None:
        return "(py-spy is not there to read its Python stacks)"
    try:
        done = subprocess.run([command, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"(py-spy: {e})"
    return done.stdout if done.returncode == 0 else f"(py-spy: {done.stderr.strip()})"
