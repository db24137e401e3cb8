from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipeline.core import progress
from pipeline.core.progress import Event, Progress, Tally, emit, say, set_sink


@pytest.fixture(autouse=True)
def _own_terminal() -> Iterator[None]:
    yield
    set_sink(None)


def test_a_sink_gets_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_EVERY", 0)
    events: list[Event] = []
    set_sink(events.append)
    say("hello")
    with Progress("shard", total=10, unit="images", done=4) as p:
        p.update(2, "1 dropped")
        p.update(4)
    assert events[0] == Event(text="hello")
    states = [(e.label, e.done, e.first, e.total, e.unit, e.text, e.finished) for e in events[1:]]
    assert states == [
        ("shard", 6, 4, 10, "images", "1 dropped", False),
        ("shard", 10, 4, 10, "images", "1 dropped", False),
        ("shard", 6, 0, 10, "images", "1 dropped", True),  # what this piece of work did: its rate is its own
    ]
    assert all(e.elapsed >= 0 for e in events)


def test_updates_are_thinned_out() -> None:
    events: list[Event] = []
    set_sink(events.append)
    with Progress("x", 1000, "steps") as p:
        for _ in range(1000):
            p.update()
    assert len(events) < 100 and events[-1].done == 1000 and events[-1].finished


def test_a_failure_is_no_end() -> None:
    events: list[Event] = []
    set_sink(events.append)
    with pytest.raises(ValueError, match="x"), Progress("x", 10, "steps"):
        raise ValueError("x")
    assert not any(e.finished for e in events)


def test_without_a_terminal_lines_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_sink(None)
    say("hello")
    emit(Event("loss 2.3", "pretrain", done=25, total=100, unit="steps", elapsed=5))
    emit(Event("loss 2.2", "pretrain", done=26, total=100, unit="steps", elapsed=5.1))  # too soon for a log
    emit(Event("loss 1.0", "pretrain", done=100, total=100, unit="steps", elapsed=20, finished=True))
    out, err = capsys.readouterr()
    assert out == ""  # standard output is for results
    lines = err.splitlines()
    assert len(lines) == 3 and "\r" not in err and "\033" not in err
    assert lines[0] == "hello"
    assert (
        lines[1].startswith("pretrain")
        and "25%" in lines[1]
        and "25/100" in lines[1]
        and "5.00 steps/s" in lines[1]
        and "loss 2.3" in lines[1]
    )
    assert lines[2] == "pretrain     100 steps in 20.0 s, 5.0 steps/s loss 1.0"


def test_the_rate_of_a_resumed_run_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    set_sink(None)
    emit(Event("", "pretrain", done=110, first=100, total=200, unit="steps", elapsed=5))
    assert "2.00 steps/s" in capsys.readouterr().err


def test_nothing_done_has_a_rate_of_zero(capsys: pytest.CaptureFixture[str]) -> None:
    set_sink(None)
    emit(Event("", "shard", unit="images", finished=True))
    assert capsys.readouterr().err == "shard        0 images in 0.0 s, 0.0 images/s\n"


def test_a_tally_tells_bytes_a_second_what_was_kept_and_why_not() -> None:
    now = [100.0]
    tally = Tally(clock=lambda: now[0])
    assert tally.told() == "0.0 MB/s", "before anything has come, in no time at all"
    now[0] += 4
    tally.add(60, {"http-404": 20, "corrupt": 1}, size=6_000_000)
    tally.add(18, {"corrupt": 1}, size=2_000_000)
    assert tally.told() == "2.0 MB/s, 78.0% kept, 20 http-404"
    assert (tally.kept, tally.dropped, tally.bytes) == (78, {"http-404": 20, "corrupt": 2}, 8_000_000)


def test_what_an_earlier_job_did_is_no_speed_of_this_one() -> None:
    now = [0.0]
    tally = Tally(clock=lambda: now[0])
    tally.add(900, {"corrupt": 100}, size=10**9, is_new=False)
    now[0] = 1.0
    tally.add(1000, {}, size=5_000_000)
    assert tally.told() == "5.0 MB/s, 95.0% kept, 100 corrupt"


def test_nearly_all_is_not_all() -> None:
    tally = Tally(clock=lambda: 0.0)
    tally.add(10**9, {}, size=0)
    assert "100.0% kept" in tally.told()
    tally.add(0, {"corrupt": 1}, size=0)
    assert "99.9% kept, 1 corrupt" in tally.told()


@pytest.mark.parametrize("columns", [80, 120])
def test_the_line_of_a_long_job_has_all_its_figures(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    set_sink(None)
    tally = Tally(clock=iter([0.0, 7200.0]).__next__)
    tally.add(9_300_000, {"a-long-reason-that-has-no-room": 700_000}, size=300_000_000_000)
    emit(Event(tally.told(), "shard", done=10_000_000, total=413_000_000, unit="images", elapsed=7200))
    line = capsys.readouterr().err.rpartition("\033[K")[2]
    assert len(line) < columns, line
    for figure in ("10.0M/413M", "2:00:00<80:36:00", "1.39k images/s", "41.7 MB/s", "93.0% kept"):
        assert figure in line, (figure, line)
