"""How processes end."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = "import atexit, sys; from pipeline.core.command import run_rank; atexit.register(lambda: print('left', flush=True))\n"


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        pytest.param("print('done')", 0, "", id="whole"),
        pytest.param("sys.exit(34)", 34, "", id="code"),
        pytest.param("sys.exit()", 0, "", id="none"),
        pytest.param("sys.exit('in words')", 1, "in words", id="words"),
        pytest.param("1 / 0", 1, "ZeroDivisionError", id="error"),
        pytest.param("raise KeyboardInterrupt", 1, "KeyboardInterrupt", id="interrupt"),
    ],
)
def test_a_rank_ends_with_the_code_that_it_was_to_have(body: str, code: int, told: str) -> None:
    """What it printed is there, and what was to be done at exit was."""
    done = subprocess.run([sys.executable, "-c", f"{HEAD}def main():\n    {body}\nrun_rank(main)"], capture_output=True, text=True)
    assert done.returncode == code and told in done.stderr
    assert done.stdout.splitlines() == (["done", "left"] if "print" in body else ["left"])
    assert ("Traceback" in done.stderr) is ("Error" in told or "Interrupt" in told)
