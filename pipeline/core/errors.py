"""Errors that people see, and the exit code each ends with.

A user's mistake raises `UserError` (or a subclass) whose message is one plain sentence: it names the config path, what
was given and what is allowed. The commands print that sentence and exit with `error.exit_code`; anything else is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    USAGE = 2
    PREFLIGHT = 3
    UNREACHABLE = 4
    INFRASTRUCTURE = 33
    PREEMPTED = 34
    DIVERGED = 65
    FAILED = 100
    NOT_FINISHED = 101
    NO_SUCH_RUN = 102
    STOPPED = 103


class TesseraError(Exception):
    """Base of every error with a message meant for people. Takes the message alone, so that it survives pickling."""

    exit_code = ExitCode.FAILED


class UserError(TesseraError):
    """Something about the config, a path, a resource or a credential is wrong; nothing was lost."""

    exit_code = ExitCode.PREFLIGHT


class ConfigError(UserError):
    """The config is missing, malformed, or asks for what cannot be."""


class StorageError(UserError):
    """A file system or object store cannot be reached, read or written."""


class DataError(UserError):
    """A dataset is missing, empty or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class CredentialsError(UserError):
    """A token or key is missing or refused."""


class ClusterUnreachable(TesseraError):
    exit_code = ExitCode.UNREACHABLE


class NoSuchRun(TesseraError):
    exit_code = ExitCode.NO_SUCH_RUN


class OutOfMemory(UserError):
    """A device has not the memory that the config needs. The same command would fail again."""


class InfrastructureError(TesseraError):
    """A machine or service failed under the job; the same command may succeed."""

    exit_code = ExitCode.INFRASTRUCTURE


class Unsaved(InfrastructureError):
    """Nothing could be saved for too long; the same command goes on from the last checkpoint, once the store takes some again."""


class Fenced(TesseraError):
    """Another job has taken up the run; this one must write nothing any more. Not to be retried."""

    exit_code = ExitCode.STOPPED


class Preempted(TesseraError):
    """The machine was asked for back. All is saved; the same command goes on."""

    exit_code = ExitCode.PREEMPTED


class Diverged(TesseraError):
    exit_code = ExitCode.DIVERGED


class StageFailed(TesseraError):
    """Part of a stage failed in a way that is no user's mistake; the message holds what the worker said."""


def nearest(given: str, names: Iterable[str]) -> str:
    """A clause such as ", did you mean 'batch'?", or nothing where no name is close to `given`."""
    close = difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def choose(where: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` if it is one of `allowed`.

    Raises:
        ConfigError: naming the config path `where`, the nearest allowed name, and all of them.
    """
    names = sorted(allowed)
    if given not in names:
        raise ConfigError(f"{where}: {given!r} is not known{nearest(given, names)} (allowed: {', '.join(names)})")
    return given


def find_error(error: BaseException) -> TesseraError | None:
    """The `TesseraError` inside what an engine wrapped around it (causes, Ray's task and worker-group errors)."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        e = queue.pop(0)
        if not isinstance(e, BaseException) or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, TesseraError):
            # Ray raises a class that is both its own and ours; give back ours alone, with its own words.
            inner = getattr(e, "cause", None)
            return inner if isinstance(inner, TesseraError) else e
        queue += [getattr(e, "cause", None), getattr(e, "controller_failure", None), e.__cause__]
        failures = getattr(e, "worker_failures", None)
        queue += list(failures.values()) if isinstance(failures, dict) else []
    return None
