"""Bytes from a store that may stutter: what passes is tried again with growing, random pauses; what stays is told apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline.core.errors import InfrastructureError, StorageError
from pipeline.core.progress import say
from pipeline.core.storage import Storage

T = TypeVar("T")

ATTEMPTS = 8  # with the pauses below: half a minute on average, over a minute at most, beside the store's own time
_PAUSE, _LONGEST = 0.25, 15.0  # seconds; the k-th pause is uniform in [0, min(_LONGEST, _PAUSE 2^k)] ("full jitter")
_GONE = 2  # attempts where the store says that there is no such object
_PATIENCE = 15.0  # seconds with a store that fails while one file of many is read


def retrying(what: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again where the store fails (errors 5xx, slow-down, resets, time-outs). `what` is read, as a sentence
    about it begins: "data s3://..", "checkpoint s3://..".

    Raises:
        FileNotFoundError: the store says so twice. InfrastructureError: the store kept failing. CredentialsError: at once.
    """
    retry = Retrying(
        retry=retry_if_exception_type((StorageError, FileNotFoundError)),
        wait=wait_random_exponential(multiplier=_PAUSE, max=_LONGEST),
        stop=_enough,
        before_sleep=lambda state: _tell(what, state),
        reraise=True,
    )
    try:
        return retry(action)
    except StorageError as e:
        raise InfrastructureError(f"{what}: could not be read in {ATTEMPTS} attempts ({e})") from e


def insist(action: Callable[[], T], patience: float, told: Callable[[str], None]) -> T:
    """The result of `action`, tried again where the store fails, for `patience` seconds since it failed first; `told` hears of the first
    failure, the fourth and each tenth. Raises the last StorageError then, and anything else at once."""
    pause = wait_random_exponential(multiplier=2 * _PAUSE, max=2 * _LONGEST)
    began: list[float] = []

    def left(state: RetryCallState) -> float:
        failed = state.outcome_timestamp or time.monotonic()
        began[:] = began or [failed]
        return began[0] + patience - failed

    return Retrying(
        retry=retry_if_exception_type(StorageError),
        wait=lambda state: max(0.0, min(pause(state), left(state))),  # the last attempt is at the end of patience, not beyond
        stop=lambda state: left(state) <= 0,
        before_sleep=lambda state: _tell_some(told, state),
        reraise=True,
    )(action)


def patiently(directory: Storage, name: str, action: Callable[[], T]) -> T:
    """The result of `action`, which reads `name`, one file of many: a store is asked again for 15 seconds, a file system is not. Raises as
    `insist`."""
    if directory.is_local:
        return action()
    return insist(action, _PATIENCE, lambda told: say(f"warning: reading data {directory.url}/{name} failed ({told})"))


def _tell_some(told: Callable[[str], None], state: RetryCallState) -> None:
    if state.attempt_number in (1, 4) or state.attempt_number % 10 == 0:
        told(f"{state.outcome.exception() if state.outcome else None}; trying again")


def _enough(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    return stop_after_attempt(_GONE if isinstance(error, FileNotFoundError) else ATTEMPTS)(state)


def _tell(what: str, state: RetryCallState) -> None:
    if state.attempt_number >= 3:  # a stutter is no news
        error = state.outcome.exception() if state.outcome else None
        say(f"warning: reading {what} failed {state.attempt_number} times, trying again ({error})")
