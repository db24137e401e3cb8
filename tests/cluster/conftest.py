"""The cluster that is harmed, the runs that nobody disturbs, and the table of what came of it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.here import STEPS_HERE, Here
from tests.cluster.hosts import why_not
from tests.cluster.lab import Lab, open_lab
from tests.cluster.results import Result, update_table
from tests.cluster.runs import EVERY, Row, running

LONG = 450  # steps of the longest run on the cluster
_RESULTS = pytest.StashKey[dict[str, Result]]()


@pytest.fixture(scope="session")
def whole_lab() -> Iterator[Lab]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with open_lab() as lab:
        yield lab


@pytest.fixture
def lab(whole_lab: Lab) -> Lab:
    """The cluster, whole and idle again after the test before."""
    whole_lab.heal()
    return whole_lab


@pytest.fixture(scope="session")
def unbroken(whole_lab: Lab) -> list[Row]:
    """What a run records that nobody disturbs, on three hosts; others compare the steps that they do."""
    whole_lab.submit(whole_lab.config("unbroken", LONG), "pretrain.save.every=10 minutes").ends_with(0)
    rows = whole_lab.run("unbroken").history()
    assert [row["step"] for row in rows] == list(range(1, LONG + 1))
    return rows


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory, s3: tuple[str, Callable[[], str]]) -> Here:
    endpoint, make_bucket = s3
    return Here(tmp_path_factory.mktemp("here"), endpoint, make_bucket())


@pytest.fixture(scope="session")
def unbroken_here(here: Here) -> list[Row]:
    """The same on this machine, with two workers."""
    values = here.config("unbroken", STEPS_HERE)
    with running(here.start(values, "pretrain.save.every=10 minutes", has_ray=False)) as job:
        job.ends_with(0)
    return here.run(values).history()


@pytest.fixture
def told(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test has measured, for the table."""
    return request.node.stash.setdefault(_TOLD, {})


_TOLD = pytest.StashKey[dict[str, Any]]()


# The table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="Bring the table of faults in this file up to date.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    fault = item.get_closest_marker("fault")
    if fault is not None and (report.when == "call" or not report.passed):
        why = str(call.excinfo.value).splitlines()[0][:200] if call.excinfo and str(call.excinfo.value) else ""
        verdict = "held" if report.passed else f"skipped: {why}" if report.skipped else f"**failed**: {why}"
        name, done = fault.args
        if hasattr(item, "callspec"):
            done += f" ({item.callspec.id})"
        item.config.stash[_RESULTS][item.nodeid] = Result(name, done, item.stash.get(_TOLD, {}), verdict.replace("|", "/"))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    results, file = session.config.stash[_RESULTS], session.config.getoption("results", None)
    if file is not None and results:
        update_table(file, results.values(), EVERY)
