"""How every command ends."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from pipeline.core.errors import ExitCode, TesseraError


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process as the commands promise: what a person can mend in one sentence and with the exit code of its
    kind; anything else is a defect of ours, with its traceback."""
    try:
        yield
    except TesseraError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(int(e.exit_code))
    except BrokenPipeError:  # `| head`: click's to handle
        raise
    except Exception:  # noqa: BLE001  the last stop
        traceback.print_exc()
        sys.exit(int(ExitCode.FAILED))


def run_rank(main: Callable[[], object]) -> NoReturn:
    """Run `main`, and end this process with its exit code, without taking Python down before.

    One of gloo's threads may let go of the last collective's tensor while that happens, and then the process aborts, whatever its exit code
    was to be (torch 2.13): on a busy machine one of eight processes that end right after a collective. Functions of `atexit` are called.
    """
    code = 1
    try:
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  as Python itself ends
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
