"""Durations and sizes as people write them: `90 epochs`, `400M samples`, `20000 steps`, `30 minutes`, `256 MiB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)"
_PREFIX = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_TIME = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_COUNT = ("epoch", "sample", "step")
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_LARGEST = 1e15  # of any unit; counts stay exact

DURATION_PATTERN = rf"^{_NUMBER}\s*([kKMB]?)\s+({'|'.join([*_COUNT, *_TIME])})s?$"
COUNT_PATTERN = rf"^{_NUMBER}\s*([kKMB]?)$"
SIZE_PATTERN = rf"^{_NUMBER}\s*({'|'.join(_BYTES)})$"


@dataclass(frozen=True)
class Duration:
    """`value` in `unit`, one of epoch, sample, step, second, minute, hour, day."""

    value: float
    unit: str

    @staticmethod
    def parse(text: object) -> Duration:
        """Raises ValueError, naming the allowed units, for anything else than a number and a unit."""
        if isinstance(text, Duration):
            return text
        match = re.match(DURATION_PATTERN, text.strip()) if isinstance(text, str) else None
        if match is None:
            units = ", ".join(f"{u}s" for u in (*_COUNT, *_TIME))
            raise ValueError(f"needs a number and a unit, such as '90 epochs' or '400M samples' (units: {units})")
        number, prefix, unit = match.groups()
        value = float(number) * _PREFIX[prefix]
        if value > _LARGEST:
            raise ValueError(f"must be at most {_LARGEST:g}")
        return Duration(value, unit)

    @property
    def is_time(self) -> bool:
        return self.unit in _TIME

    @property
    def seconds(self) -> float:
        return self.value * _TIME[self.unit]

    def steps(self, batch: int, samples_an_epoch: int) -> int:
        """Optimiser steps of `batch` samples that cover this duration, rounded up; at least one.

        An epoch is `samples_an_epoch` samples; batches run on over its end, so no sample is left out or repeated.
        """
        assert not self.is_time, "a time has no number of steps"
        if self.unit == "step":
            return max(1, round(self.value))
        samples = self.value * (samples_an_epoch if self.unit == "epoch" else 1)
        return max(1, math.ceil(samples / batch - 1e-9))

    def __str__(self) -> str:
        return f"{self.value:.12g} {self.unit}{'' if self.value == 1 else 's'}"


def parse_count(text: object) -> int:
    """`14.2M` or a plain number, of things there are: at least 1. Raises ValueError naming the prefixes."""
    match = re.match(COUNT_PATTERN, text.strip()) if isinstance(text, str) else None
    count = float(match[1]) * _PREFIX[match[2]] if match else text
    if isinstance(count, bool) or not isinstance(count, int | float) or not 1 <= count <= _LARGEST or round(count) != count:
        raise ValueError("needs a whole number of 1 or more, such as 1281167 or '14.2M' (k, M, B)")
    return round(count)


def parse_bytes(text: object) -> int:
    """`256 MiB` or a plain number of bytes. Raises ValueError naming the units."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.match(SIZE_PATTERN, text.strip()) if isinstance(text, str) else None
    count = float(match[1]) * _BYTES[match[2]] if match else 0
    if round(min(count, 1)) < 1:
        raise ValueError(f"needs a number and a unit, such as '256 MiB' (units: {', '.join(_BYTES)})")
    if not math.isfinite(count):
        raise ValueError("is too large")
    return round(count)


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """1_234_567 as `1.23M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def format_flops(count: float) -> str:
    """1.57e21 floating-point operations as `1.57 zettaFLOP`, in steps of a thousand."""
    for size, name in ((1e21, "zetta"), (1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"), (1e6, "mega")):
        if count >= size:
            return f"{count / size:.3g} {name}FLOP"
    return f"{count:.3g} FLOP"


def format_seconds(seconds: float) -> str:
    """`8.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
