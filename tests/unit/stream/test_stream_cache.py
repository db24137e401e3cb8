"""The cache of a machine: shared, limited, safe under kill -9, trusted by nobody."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.stream.cache import Cache


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir() if not p.name.startswith("."))


def test_a_part_is_fetched_once(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path / "c", 1 << 20), []

    def fetch() -> bytes:
        fetched.append(1)
        return b"0123456789"

    assert cache.read("a", fetch) == b"0123456789" and cache.read("a", fetch, 3, 4) == b"3456" and cache.read("a", fetch, 8, 9) == b"89"
    assert len(fetched) == 1 and cache.has("a") and not cache.has("b")
    cache.drop("a")
    assert cache.read("a", fetch, 1, 1) == b"1" and len(fetched) == 2


def test_threads_that_want_the_same_part_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched, got = Cache(tmp_path / "c", 1 << 20), [], []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.2)
        return b"part"

    threads = [threading.Thread(target=lambda: got.append(cache.read("a", fetch))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [b"part"] * 8 and len(fetched) == 1


def test_the_limit_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    limit, part = 1 << 20, bytes(1 << 14)
    cache = Cache(tmp_path / "c", limit)
    for n in range(200):
        cache.read(f"p{n}", lambda: part)
        cache.read("p0", lambda: part)  # in use all the time
        os.utime(cache.path / f"p{n}", (n, n)) if n else None  # clocks of file systems are coarse
        assert size_of(cache.path) <= limit * (1 + 1 / 32) + len(part)
    kept = sorted(int(p.name[1:]) for p in cache.path.iterdir() if not p.name.startswith("."))
    assert kept[0] == 0 and kept[1:] == list(range(kept[1], 200)) and len(kept) > 50


def work(path: Path, is_steady: bool, log: Path) -> None:
    """Read parts without end, and end with 1 where one holds anything else than it should."""
    cache, n = Cache(path, 1 << 20), 0

    def fetch() -> bytes:
        with log.open("a") as f:
            f.write("x")
        return content(n)

    while cache.read(f"part-{n}", fetch) == content(n):
        n = (n + 1) % 400 if is_steady else n + 1
    os._exit(1)


def content(number: int) -> bytes:
    return bytes([number % 256]) * 5000


def start(path: Path, is_steady: bool, log: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, args=(path, is_steady, log), daemon=True)
    process.start()
    return process


def end(process: BaseProcess) -> None:
    assert process.is_alive(), f"ended by itself with {process.exitcode}"
    process.kill()  # SIGKILL
    process.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """Processes that share the cache are killed while they fetch, write and trim: others go on, and find only whole parts."""
    path, log = tmp_path / "c", tmp_path / "log"
    steady = start(path, True, log)
    for n in range(30):
        victim = start(path, n % 2 == 0, log)
        time.sleep(0.02 + 0.007 * n)
        end(victim)
    end(steady)
    parts = [p for p in path.iterdir() if p.name.startswith("part-")]
    assert len(parts) > 100 and all(p.read_bytes() == content(int(p.name[5:])) for p in parts)
    assert size_of(path) <= (1 << 20) * (1 + 32 / 32)  # each of those killed may have written its 1/32 unseen
    cache = Cache(path, 1 << 20)
    left = path / ".tmp-left"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    cache.trim()
    assert not left.exists() and size_of(path) <= 1 << 20
    assert cache.read("new", lambda: b"part") == b"part"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_share(tmp_path: Path) -> None:
    """Two that want the same 150 parts, which fit, fetch each of them once between them."""
    path, log = tmp_path / "c", tmp_path / "log"
    for n in range(150):
        Cache(path, 1 << 20).read(f"part-{n}", lambda n=n: content(n))  # type: ignore[misc]
    both = [start(path, False, log) for _ in range(2)]
    time.sleep(1.5)
    for process in both:
        end(process)
    fetched, highest = log.stat().st_size, max(int(p.name[5:]) for p in path.iterdir() if p.name.startswith("part-"))
    assert highest > 200 and fetched <= highest - 150 + 20  # what one has pushed out before the other came is fetched again


def test_somebody_else_s_directory_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    path = tmp_path / "c"
    path.mkdir()
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match=r"pretrain.loader.cache.path: .*/c belongs to somebody else"):
        Cache(path, 1)


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"pretrain.loader.cache.path: cannot make .*/file/c \(Not a directory\)"):
        Cache(tmp_path / "file" / "c", 1)
