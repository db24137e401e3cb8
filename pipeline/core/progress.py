"""Progress on everything longer than a few seconds: how far, how fast, how long still.

A worker on another machine has no terminal: it hands its events to a sink (see `set_sink`), and the process that the
person looks at renders them. On a terminal one line is rewritten; in a log a line is printed now and then.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm

from pipeline.core.units import format_seconds

_LOG_EVERY = 5.0  # seconds between lines where there is no terminal
_SHOW_EVERY = 0.2
_WIDE = 100  # columns; where there are fewer, figures matter more than a bar
_WITHOUT_BAR = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LONG = 10_000_000  # of a total from here on millions are shown as 12.3M: whole numbers would push the rest off the line


@dataclass(frozen=True)
class Event:
    """`text` alone is a message; with a label it is the state of one piece of work."""

    text: str = ""
    label: str = ""
    done: float = 0
    first: float = 0
    total: float = 0
    unit: str = ""
    elapsed: float = 0
    finished: bool = False


class _Terminal:
    """Renders events on standard error, so that standard output stays for results."""

    def __init__(self) -> None:
        self._last = 0.0
        self._open = False

    def __call__(self, event: Event) -> None:
        if not event.label:
            self._print(event.text)
            return
        now, tty = time.monotonic(), sys.stderr.isatty()
        if not event.finished and now - self._last < (_SHOW_EVERY if tty else _LOG_EVERY):
            return
        self._last = now
        if event.finished:
            rate = event.done / event.elapsed if event.elapsed > 0 else 0.0
            self._print(
                f"{event.label:<12} {event.done:,.0f} {event.unit} in {format_seconds(event.elapsed)}, "
                f"{rate:,.1f} {event.unit}/s {event.text}"
            )
            return
        columns = min(120, shutil.get_terminal_size().columns - 1) if tty else 120
        is_narrow = columns < _WIDE
        meter = tqdm.format_meter(
            event.done,
            event.total,
            event.elapsed,
            ncols=columns,
            prefix=event.label if is_narrow else f"{event.label:<12}",
            bar_format=_WITHOUT_BAR if is_narrow else None,
            unit=f" {event.unit}",
            postfix=event.text,
            initial=event.first,
            unit_scale=event.total >= _LONG,
        )[:columns]
        if tty:
            sys.stderr.write(f"\r\033[K{meter}")
            sys.stderr.flush()
            self._open = True
        else:
            self._print(meter)

    def _print(self, text: str) -> None:
        sys.stderr.write(("\r\033[K" if self._open else "") + text.rstrip() + "\n")
        sys.stderr.flush()
        self._open = False


_sink: Callable[[Event], None] = _Terminal()


def set_sink(sink: Callable[[Event], None] | None) -> None:
    """Send this process's events to `sink`; None gives them back to the terminal."""
    global _sink
    _sink = sink or _Terminal()


def emit(event: Event) -> None:
    _sink(event)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    emit(Event(text=text))


class Progress:
    """`with Progress("shard", total=1797, unit="images") as p: p.update(64, "0 dropped")`."""

    def __init__(self, label: str, total: float, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.first = done, done
        self.text = ""
        self._start = time.monotonic()
        self._sent = 0.0

    def update(self, count: float = 1, text: str | None = None) -> None:
        self.done += count
        self.text = self.text if text is None else text
        now = time.monotonic()
        if now - self._sent >= _SHOW_EVERY:  # a remote sink costs a message
            self._sent = now
            self._emit(False)

    def _emit(self, finished: bool) -> None:
        done = self.done - self.first if finished else self.done
        elapsed = time.monotonic() - self._start
        emit(Event(self.text, self.label, done, 0 if finished else self.first, self.total, self.unit, elapsed, finished))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._emit(True)


class Tally:
    """What is told beside the progress of work that moves bytes, and parts of which may come to nothing.

    `tally.add(98, {"http-404": 2}, size=10**7); tally.told()` gives `8.3 MB/s, 98.0% kept, 2 http-404`: the megabytes kept a second since
    it was made, what share of the parts was kept, and the most frequent reason why others were not. What an earlier job did is added with
    `is_new=False`: it counts for the share, and not for the rate.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self.kept, self.bytes = 0, 0
        self.dropped: Counter[str] = Counter()

    def add(self, kept: int, dropped: Mapping[str, int], size: int, is_new: bool = True) -> None:
        """Count `kept` parts of `size` bytes together, and those that were not kept, by reason."""
        self.kept += kept
        self.dropped.update(dropped)
        self.bytes += size if is_new else 0

    def told(self) -> str:
        elapsed, lost = self._clock() - self._start, self.dropped.total()
        texts = [f"{self.bytes / 1e6 / elapsed if elapsed > 0 else 0:,.1f} MB/s"]
        if self.kept + lost:
            share = 100 * self.kept / (self.kept + lost)
            texts.append(f"{min(share, 99.9) if lost else share:.1f}% kept")  # all is what nothing was lost of
        if lost:
            reason, count = min(self.dropped.items(), key=lambda item: (-item[1], item[0]))
            texts.append(f"{count:,} {reason}")
        return ", ".join(texts)
