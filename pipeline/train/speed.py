"""How fast training is: samples, floating-point operations, and waiting, by the wall clock."""

from __future__ import annotations

import time

Row = dict[str, float]


class Clock:
    """Throughput since it was last read, with pauses (validation, saving) left out; `waited`: seconds waited for data, ever."""

    def __init__(self) -> None:
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0
        self.waited = 0.0

    def count(self, samples: int) -> None:
        self._samples += samples

    def waiting(self) -> _Span:
        return _Span(self, is_wait=True)

    def paused(self) -> _Span:
        return _Span(self, is_wait=False)

    def add(self, seconds: float, is_wait: bool) -> None:
        if is_wait:
            self._waited += seconds
            self.waited += seconds
        else:
            self._start += seconds

    def read(self, flops_a_sample: float) -> Row:
        """Samples a second and floating-point operations a second of all ranks together; seconds waited for data."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._samples / seconds
        row = {
            "train/images_per_s": rate,
            "train/tflops_per_s": rate * flops_a_sample / 1e12,
            "train/data_wait_fraction": self._waited / seconds,
        }
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0
        return row


class _Span:
    def __init__(self, clock: Clock, is_wait: bool) -> None:
        self._clock, self._is_wait = clock, is_wait

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.add(time.perf_counter() - self._began, self._is_wait)
