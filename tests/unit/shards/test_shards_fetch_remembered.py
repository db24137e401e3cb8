"""What lasts from one list of URLs to the next, and what does not outlive its list."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.storage import Storage
from pipeline.shards import fill
from pipeline.shards.fetch import Fetched, Fetcher, fetcher_of, hosts, names
from pipeline.shards.fill import Filling
from pipeline.shards.images import Dropped
from pipeline.shards.samples import Recipe, Sample
from pipeline.shards.sources import Item, UrlSource
from tests.hostile import Hostile, hostile_server
from tests.unit.shards.fetching import IMAGE, LONGEST, config


def _reasons(fetcher: Fetcher, *urls: str) -> list[str]:
    results = sorted(fetcher.fetch(urls), key=lambda r: r[0])
    return [r.reason if isinstance(r, Dropped) else "ok" for _, r in results]


def test_a_host_that_was_given_up_costs_the_next_list_nothing(web: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_GIVEN_UP", 3600.0)
    monkeypatch.setattr(hosts, "_GIVEN_UP_MOST", 3600.0)
    with socket.create_server(("127.0.0.3", 0)) as taken:
        port = taken.getsockname()[1]
    dead = [f"http://127.0.0.3:{port}/good/{n}" for n in range(20)]
    with Fetcher(config(allow=["127.0.0.0/8"], robots=False), LONGEST) as fetcher:
        assert _reasons(fetcher, *dead, web.url("good/a")) == ["refused"] * 20 + ["ok"]
        with hostile_server(IMAGE, address="127.0.0.3", port=port) as risen:
            assert _reasons(fetcher, *dead, web.url("good/b")) == ["refused"] * 20 + ["ok"]
            assert _reasons(fetcher, *dead) == ["refused"] * 20 and risen.seen == []
            assert _reasons(fetcher, *dead) == ["ok"] * 20  # nobody answered the list before: it may have been the network


def test_a_host_keeps_its_rate_and_its_pauses_across_lists(web: Hostile) -> None:
    with Fetcher(config(robots=False, rate=4, retries=0), LONGEST) as fetcher:
        for n in range(5):
            assert _reasons(fetcher, web.url(f"good/{n}")) == ["ok"]
        assert _reasons(fetcher, web.url("busy/1/1/a")) == ["http-429"]
        assert _reasons(fetcher, web.url("good/5")) == ["ok"]
    times = [s.when for s in web.seen]
    assert times[4] - times[0] >= 4 / 4 - 0.1 and times[6] - times[5] >= 0.9


def test_names_are_asked_for_once_and_those_that_were_not_found_by_each_list(web: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = Counter[str](), socket.getaddrinfo

    def answer(host: Any, port: Any, **options: Any) -> Any:
        asked[host] += 1
        if host == "gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with Fetcher(config(robots=False), LONGEST) as fetcher:
        for n in range(3):
            urls = [web.url(f"good/{n}-{m}", host) for m in range(5) for host in ("here.example", "gone.example")]
            assert _reasons(fetcher, *urls) == ["ok", "dns"] * 5
    assert asked == {"here.example": 1, "gone.example": 3}


def test_names_that_wait_for_slow_ones_are_late_and_not_lost(web: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one thread, and a query in it that takes longer than any query may."""
    monkeypatch.setattr(names, "_THREADS", 1)
    monkeypatch.setattr(names, "_LONGEST", 1.5)
    real, goes_on = socket.getaddrinfo, threading.Event()

    def answer(host: Any, port: Any, **options: Any) -> Any:
        if host == "slow.example":
            goes_on.wait()
        return real("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    try:
        with Fetcher(config(robots=False), LONGEST) as fetcher:
            results = fetcher.fetch([web.url("good/a", "slow.example"), web.url("good/b", "quick.example")])
            index, lost = next(results)
            assert index == 0 and isinstance(lost, Dropped) and lost.reason == "dns"
            time.sleep(1.6)
            goes_on.set()
            assert [(index, isinstance(result, Fetched)) for index, result in results] == [(1, True)]
    finally:
        goes_on.set()


def test_one_fetcher_serves_all_shards_of_a_process(web: Hostile) -> None:
    first = fetcher_of(config(agent="one"), LONGEST, 1)
    assert _reasons(first, web.url("good/a"), web.url("good/b")) == ["ok", "ok"]
    assert fetcher_of(config(agent="one"), LONGEST, 1) is first
    other = fetcher_of(config(agent="two"), LONGEST, 1)
    assert other is not first and not first._thread.is_alive()
    assert _reasons(other, web.url("good/c")) == ["ok"]


def test_a_process_that_ends_in_the_middle_of_a_list_ends_quietly(web: Hostile) -> None:
    program = f"""
from pipeline.config.shard import Fetch
from pipeline.shards.fetch import fetcher_of
results = fetcher_of(Fetch(allow=["127.0.0.1"]), 1 << 20, 1).fetch([f"{web.url("good")}/{{n}}" for n in range(9000)])
next(results)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (7, "") and 0 < len(web.seen) < 9000


def test_a_shard_that_fails_leaves_no_downloads_under_way(
    web: Hostile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: Callable[..., Any], encoded: Callable[..., bytes]
) -> None:
    web.image = encoded(photo(), "JPEG")
    rows = [(f"{n:020x}", Item(web.url(f"good/{n}"), 0)) for n in range(5000)]

    def breaks(directory: Storage, name: str, split: str, samples: Iterator[Sample], hashed: bool) -> None:
        next(samples)
        raise OSError("no space left")

    monkeypatch.setattr(fill, "planned_rows", lambda *_: rows)
    monkeypatch.setattr(fill, "write_shard", breaks)
    filling, place = Filling(UrlSource("list.csv", {}), Recipe(), config(robots=False), [], 1), Storage(str(tmp_path))
    with pytest.raises(OSError, match="no space") as caught:  # and holds, as long as it lives, all that the shard's frames hold
        fill.fill_shard("train-00000.tar", "train", 0, 0, filling, place, place)
    asked = -1
    while asked != (asked := len(web.seen)):
        time.sleep(0.3)
    assert 0 < asked < 5000 and caught.tb is not None
