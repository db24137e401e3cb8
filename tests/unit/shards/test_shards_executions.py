"""Two executions of one shard, to which the web answers otherwise: tar, index and record are of one of them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import parse_config
from pipeline.config.shard import Shard
from pipeline.core.errors import InfrastructureError
from pipeline.core.storage import Storage
from pipeline.shards.executions import find_mixed
from pipeline.shards.fill import STAGE, Filling, fill_shard
from pipeline.shards.job import dataset_fingerprint, make_dataset
from pipeline.shards.plan import Header, Planner
from pipeline.shards.shuffle import Earlier
from pipeline.shards.sources import open_source
from pipeline.shards.table import ShardRecord, ShardTable
from pipeline.shards.verify import verify
from pipeline.shards.work import clear, place_of

NAME, ROWS, WAIT = "train-00000.tar", 6, 30.0


class Web:
    """Gives each URL another image each time it is asked for. The first URL's answers of a number in `held` wait until they are let go."""

    def __init__(self, images: list[bytes]) -> None:
        self.images, self.times, self.held = images, Counter[str](), dict[int, threading.Event]()
        self.lock, self.asked = threading.Lock(), threading.Semaphore(0)

    def answer(self, path: str) -> bytes:
        with self.lock:
            turn = self.times[path]
            self.times[path] += 1
        if path == "/0":
            self.asked.release()
            if turn in self.held:
                assert self.held[turn].wait(WAIT)
        return self.images[turn]


@pytest.fixture
def web(encoded: Callable[..., bytes], photo: Callable[..., Image.Image]) -> Iterator[tuple[Web, str]]:
    web = Web([encoded(photo(40, 32, seed), "PNG") for seed in range(5)])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = web.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield web, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Stalls(Storage):
    """Stands still before it writes an index: leaves the file `reached`, and goes on when there is one `go`."""

    def __init__(self, directory: Storage, folder: Path) -> None:
        super().__init__(directory.url, directory.endpoint)
        self.reached, self.go = folder / "reached", folder / "go"

    def write(self, key: str, data: bytes) -> None:
        if key.endswith(".index.parquet"):
            self.reached.touch()
            await_file(self.go)
        super().write(key, data)


def await_file(path: Path) -> None:
    end = time.monotonic() + WAIT
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)


def execute(arguments: tuple[Any, ...], filling: Filling, place: Storage, directory: Storage) -> dict[str, Any]:
    """As tasks do, with a record."""
    result = fill_shard(*arguments, filling, place, directory)
    place.write(f"{STAGE}/{NAME}.json", json.dumps(result).encode())
    return result


@pytest.fixture(scope="module")
def elsewhere(cluster: None) -> Iterator[ProcessPoolExecutor]:
    """Another process, as a task has it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


class Job:
    """The plan of one shard, and executions of its task: the first in another process, further ones in a thread of this one."""

    def __init__(self, url: str, folder: Path, directory: Storage, elsewhere: ProcessPoolExecutor) -> None:
        pq.write_table(pa.table({"url": [f"{url}/{n}" for n in range(ROWS)]}), folder / "in.parquet")
        fetch = {"allow": ["127.0.0.1"], "robots": False, "retries": 0, "timeout": "60 seconds"}
        section = {"source": {"format": "urls", "url": str(folder / "in.parquet")}, "samples": ROWS, "fetch": fetch}
        self.config = parse_config({"name": "t", "storage": "runs", "shard": section})
        self.shard, self.directory, self.place = self.config.shard or Shard(source={"url": "x"}), directory, place_of(directory, 1)
        source = open_source(self.shard.source)
        survey = source.survey()
        header = Header(1, dataset_fingerprint(self.shard), self.shard.source.url, survey.stamp, [])
        self.plan = Planner(self.shard, source, header, survey.rows, Earlier(), self.place, 1).plan({})
        clear(directory, self.place, is_first=True)
        self.filling = Filling.of(source, self.shard, [], 1)
        self.elsewhere, self.here = elsewhere, ThreadPoolExecutor(1)

    def begin(self, directory: Storage | None = None) -> Future[dict[str, Any]]:
        [(_, arguments)] = self.plan.jobs()
        return self.elsewhere.submit(execute, arguments, self.filling, self.place, directory or self.directory)

    def begin_again(self) -> Future[dict[str, Any]]:
        [(_, arguments)] = self.plan.jobs()
        return self.here.submit(execute, arguments, self.filling, self.place, self.directory)

    def mixed(self, result: dict[str, Any]) -> list[str]:
        return find_mixed(self.place, self.directory, {NAME: ShardRecord(**result["record"])})


@pytest.fixture
def job(web: tuple[Web, str], tmp_path: Path, store: Storage, elsewhere: ProcessPoolExecutor) -> Iterator[Job]:
    made = Job(web[1], tmp_path, store, elsewhere)
    yield made
    made.here.shutdown()


def test_one_that_still_downloads_takes_the_record_of_the_other(web: tuple[Web, str], job: Job) -> None:
    web[0].held[0] = threading.Event()
    first = job.begin()
    assert web[0].asked.acquire(timeout=WAIT)
    second = job.begin_again().result(WAIT)
    web[0].held[0].set()
    assert first.result(WAIT) == second and job.mixed(second) == [] and job.place.names("doubtful") == [NAME]
    assert web[0].images[1] in job.directory.read(NAME)
    asked = web[0].times.total()
    # A result that was lost on its way is made again by nobody.
    assert job.begin_again().result(WAIT) == second and web[0].times.total() == asked


def test_one_that_still_downloads_gives_up_for_one_that_has_begun(web: tuple[Web, str], job: Job) -> None:
    web[0].held |= {0: threading.Event(), 1: threading.Event()}
    first = job.begin()
    assert web[0].asked.acquire(timeout=WAIT)
    second = job.begin_again()
    assert web[0].asked.acquire(timeout=WAIT)
    web[0].held[0].set()
    with pytest.raises(InfrastructureError, match="this task was presumed dead"):
        first.result(WAIT)
    assert not job.directory.exists(NAME)
    web[0].held[1].set()
    assert job.mixed(second.result(WAIT)) == []


def test_one_that_has_outlived_its_plan_publishes_nothing(web: tuple[Web, str], job: Job) -> None:
    web[0].held[0] = threading.Event()
    late = job.begin()
    assert web[0].asked.acquire(timeout=WAIT)
    job.place.remove()
    web[0].held[0].set()
    with pytest.raises(InfrastructureError, match="this task was presumed dead"):
        late.result(WAIT)
    assert not job.directory.exists(NAME)


@pytest.mark.parametrize("last", ["first", "second"])
def test_tar_of_one_and_index_of_the_other_are_made_anew(web: tuple[Web, str], job: Job, last: str, tmp_path: Path) -> None:
    """The first stands still between tar and index until the second has both; whoever's record stays, the job notices."""
    stalls = Stalls(job.directory, tmp_path)
    first = job.begin(stalls)
    await_file(stalls.reached)
    second = job.begin_again().result(WAIT)
    assert job.mixed(second) == []
    stalls.go.touch()
    results = {"first": first.result(WAIT), "second": second}
    job.place.write(f"{STAGE}/{NAME}.json", json.dumps(results[last]).encode())
    assert web[0].images[1] in job.directory.read(NAME) and job.mixed(results["first"]) == job.mixed(results["second"]) == [NAME]

    manifest, _ = make_dataset(job.config, job.directory)
    assert manifest.written == ROWS and list(verify(job.directory)) == []
    assert job.directory.read(NAME).count(web[0].images[2]) == ROWS and [r.name for r in ShardTable(job.directory)] == [NAME]
    assert job.place.names() == ["known", "state.json"]
