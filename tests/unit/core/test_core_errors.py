from __future__ import annotations

import pickle

import pytest

from pipeline.core import errors
from pipeline.core.errors import ConfigError, DataError, ExitCode, TesseraError, choose, find_error, nearest


def subclasses(kind: type[TesseraError]) -> list[type[TesseraError]]:
    return [kind, *(s for c in kind.__subclasses__() if c.__module__ == errors.__name__ for s in subclasses(c))]


@pytest.mark.parametrize("kind", subclasses(TesseraError))
def test_an_error_survives_pickling(kind: type[TesseraError]) -> None:
    back = pickle.loads(pickle.dumps(kind("batch: 3 is odd")))  # noqa: S301
    assert type(back) is kind and str(back) == "batch: 3 is odd" and back.exit_code == kind.exit_code


def test_exit_codes() -> None:
    expected = {
        "TesseraError": 100, "UserError": 3, "ConfigError": 3, "StorageError": 3, "DataError": 3, "CheckpointError": 3, "CredentialsError": 3, "OutOfMemory": 3,
        "ClusterUnreachable": 4, "NoSuchRun": 102, "InfrastructureError": 33, "Unsaved": 33, "Preempted": 34, "Diverged": 65, "StageFailed": 100, "Fenced": 103,
    }  # fmt: skip
    assert {k.__name__: int(k.exit_code) for k in subclasses(TesseraError)} == expected
    assert sorted(ExitCode) == [0, 2, 3, 4, 33, 34, 65, 100, 101, 102, 103]


def test_nearest() -> None:
    assert nearest("bacth", ["batch", "data"]) == ", did you mean 'batch'?"
    assert nearest("zzz", ["batch", "data"]) == "" and nearest("x", []) == ""


def test_choose() -> None:
    assert choose("a.b", "cosine", {"cosine": 1, "linear": 2}) == "cosine"
    with pytest.raises(ConfigError) as e:
        choose("pretrain.schedule.name", "cosin", {"linear": 2, "cosine": 1})
    assert str(e.value) == "pretrain.schedule.name: 'cosin' is not known, did you mean 'cosine'? (allowed: cosine, linear)"


class TaskError(Exception):
    """Like Ray's RayTaskError."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a traceback of forty lines")
        self.cause = cause


class GroupError(Exception):
    """Like Ray Train's WorkerGroupError."""

    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("workers failed")
        self.worker_failures = failures


def test_find_error() -> None:
    ours = DataError("data x: is damaged")
    assert find_error(ours) is ours
    assert find_error(ValueError("x")) is None
    assert find_error(TaskError(ours)) is ours
    assert find_error(TaskError(TaskError(ours))) is ours
    assert find_error(GroupError({0: ValueError("died with it"), 1: TaskError(ours)})) is ours
    chained = RuntimeError("x")
    chained.__cause__ = GroupError({0: ours})
    assert find_error(chained) is ours
    wrapper = RuntimeError("controller")
    wrapper.controller_failure = ours  # type: ignore[attr-defined]
    assert find_error(wrapper) is ours


def test_find_error_gives_back_our_class_alone() -> None:
    ours = ConfigError("batch: 3 is odd")

    class Both(TaskError, ConfigError):  # what Ray raises where an error of ours crossed a process
        exit_code = ExitCode.PREFLIGHT

    found = find_error(Both(ours))
    assert found is ours and str(found) == "batch: 3 is odd"


def test_find_error_in_a_circle() -> None:
    a, b = RuntimeError("a"), RuntimeError("b")
    a.__cause__, b.__cause__ = b, a
    assert find_error(a) is None


def test_find_error_through_ray() -> None:
    """The class that Ray really makes; no cluster is needed to make it."""
    from ray.exceptions import RayTaskError

    ours = DataError("data x: is damaged")
    wrapped = RayTaskError("f", "a traceback", ours).as_instanceof_cause()
    assert isinstance(wrapped, DataError) and str(wrapped) != str(ours)
    assert find_error(wrapped) is ours
