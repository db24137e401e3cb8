from __future__ import annotations

import pytest

from pipeline.core.units import Duration, format_bytes, format_count, format_seconds, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("90 epochs", 90, "epoch"),
        ("1 epoch", 1, "epoch"),
        ("400M samples", 400e6, "sample"),
        ("12.8B samples", 12.8e9, "sample"),
        (" 20k steps ", 20_000, "step"),
        ("2e4 steps", 20_000, "step"),
        (".5 epochs", 0.5, "epoch"),
        ("30 minutes", 30, "minute"),
    ],
)
def test_durations(text: str, value: float, unit: str) -> None:
    duration = Duration.parse(text)
    assert (duration.value, duration.unit) == (pytest.approx(value, rel=1e-15), unit)
    assert Duration.parse(str(duration)) == duration and Duration.parse(duration) is duration


@pytest.mark.parametrize("text", ["90", "epochs", "90epochs", "-1 steps", "90 parsecs", "1,000 steps", "", 90, None, True, "1 step 2"])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(
        ValueError, match=r"needs a number and a unit, such as '90 epochs'.*units: epochs, samples, steps, seconds, minutes, hours, days"
    ):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "batch", "samples", "steps"),
    [
        ("90 epochs", 256, 1000, 352),  # 351.56 rounded up: no sample is left out
        ("1 epoch", 250, 1000, 4),
        ("1 epoch", 251, 1000, 4),
        ("1 epoch", 249, 1000, 5),
        ("0.1 epochs", 10, 300, 3),  # 0.1 x 300 is 30.000000000000004
        ("1M samples", 4096, 7, 245),
        ("20000 steps", 256, 1000, 20_000),
        ("1 sample", 256, 1000, 1),
        ("0.2 steps", 256, 1000, 1),
    ],
)
def test_steps(text: str, batch: int, samples: int, steps: int) -> None:
    assert Duration.parse(text).steps(batch, samples) == steps


def test_times() -> None:
    assert [Duration.parse(f"2 {u}s").seconds for u in ("second", "minute", "hour", "day")] == [2, 120, 7200, 172_800]
    assert Duration.parse("1 hour").is_time and not Duration.parse("1 step").is_time
    with pytest.raises(AssertionError):
        Duration.parse("1 hour").steps(1, 1)


def test_str() -> None:
    assert [str(Duration.parse(t)) for t in ("1 epochs", "12.8B samples", "0.5 hours")] == ["1 epoch", "12800000000 samples", "0.5 hours"]


def test_bytes() -> None:
    assert parse_bytes("256 MiB") == 2**28 and parse_bytes("1.5kB") == 1500 and parse_bytes("10 B") == parse_bytes(10) == 10
    for bad in ("256", "256 mb", 0, -1, True, 2.5, None, "1 MiB or so", "0 MiB", "0.2 B"):
        with pytest.raises(ValueError, match=r"needs a number and a unit, such as '256 MiB' \(units: B, kB,"):
            parse_bytes(bad)


def test_numbers_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**50)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB", "1024.0 TiB"]
    assert [format_count(n) for n in (7, 1_234_567, 2e12, 12_800_000_000)] == ["7", "1.23M", "2T", "12.8B"]
    assert [format_seconds(n) for n in (8.24, 59.94, 200, 7500)] == ["8.2 s", "59.9 s", "3 min 20 s", "2 h 05 min"]
    assert format_seconds(59.97) == "1 min 00 s"


@pytest.mark.parametrize(
    ("given", "count"),
    [("14.2M", 14_200_000), ("1.28M", 1_280_000), (" 400 M ", 400_000_000), ("12.8B", 12_800_000_000), ("1k", 1000), ("1K", 1000),
     ("1281167", 1_281_167), (1_281_167, 1_281_167), (1, 1), ("2e4", 20_000), (7.0, 7), ("0.5k", 500)],
)  # fmt: skip
def test_counts(given: object, count: int) -> None:
    found = parse_count(given)
    assert found == count and isinstance(found, int)


@pytest.mark.parametrize(
    "given",
    [0, -3, 0.5, "0", "1.5", "0.0001k", "1,000", "1 T", "M", "", "five", None, True, [3], float("nan"), float("inf"), "1e300", 10**16],
)
def test_what_is_no_count(given: object) -> None:
    with pytest.raises(ValueError, match=r"^needs a whole number of 1 or more, such as 1281167 or '14.2M' \(k, M, B\)$"):
        parse_count(given)
