"""How every command ends."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

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
