"""How fast a folder of JPEGs becomes shards where nothing has to be done to their pixels.

    python -m tests.bench.sharding_folder [--pairs 5] [--images 18000] [--workers 1] [--scaling]

Makes photographs of 300 to 800 pixels a side, 3,000 different ones under several names, and races, each in a process of its
own, in turn, the page cache warm: a whole job on Ray with `images.check: ends`, against webdataset's TarWriter, which writes
the same members of the same files and neither hashes, indexes nor syncs them; and one with `check: decode`, against libjpeg
alone decoding the same files at full size in as many threads as there are workers. Counted is the time from the first sample
written to the last shard published; `--only` prints that of the whole job, Ray being there already, beside it. `--scaling` races two
workers that have two cores against one that has one: a worker counts as one core for Ray, and one that has two uses more than that.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
from PIL import Image as Picture

from tests.bench.pairs import machine, median, race, ratios
from tests.bench.streaming import photographs

DIFFERENT, CLASSES, SHARD = 3000, 10, 1 << 28  # bytes, the default


def make_folder(folder: Path, images: int) -> None:
    """`images` JPEGs of quality 90 in class folders; beyond the first 3,000 they are the same files under further names."""
    for n in range(images):
        path = folder / f"class{n % CLASSES}" / f"{n:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if n >= DIFFERENT:
            os.link(folder / f"class{n % DIFFERENT % CLASSES}" / f"{n % DIFFERENT:06d}.jpg", path)
            continue
        random = np.random.default_rng(n)
        whole, height, width = photographs()[n % 2], int(random.integers(300, 428)), int(random.integers(300, 641))
        top, left = int(random.integers(whole.shape[0] - height + 1)), int(random.integers(whole.shape[1] - width + 1))
        part = Picture.fromarray(whole[top : top + height, left : left + width])
        if n % 3 == 0:
            part = part.resize((part.width * 5 // 4, part.height * 5 // 4), Picture.Resampling.BICUBIC)
        part.save(data := io.BytesIO(), "JPEG", quality=90)
        path.write_bytes(data.getvalue())


# What runs in a process of its own


def shard(folder: Path, out: Path, check: str, workers: int) -> dict[str, float]:
    import ray

    from pipeline.config import Config
    from pipeline.core.storage import Storage
    from pipeline.shards.job import make_dataset

    section = {"source": {"format": "folder", "url": str(folder)}, "images": {"check": check}, "size": SHARD, "workers": workers}
    config = Config.model_validate({"name": "bench", "storage": str(out), "shard": section})
    ray.init(num_cpus=max(2, workers), include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    _wake(workers)
    start, spent = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    with _watched(out) as written:
        manifest, _ = make_dataset(config, Storage(str(out)))
    seconds = time.perf_counter() - start
    assert not manifest.dropped, manifest.dropped
    count, busy = manifest.written, written[-1] - written[0]
    return {"images_per_s": count / busy, "whole_job_images_per_s": count / seconds, "driver_cpu_s": _cpu(resource.RUSAGE_SELF) - spent}


def _wake(workers: int) -> None:
    """Ray starts a worker's process with its first task: a second, which is none of ours."""
    import ray

    def imports() -> None:
        import pipeline.shards.writer

        time.sleep(0.5)
        assert pipeline.shards.writer

    ray.get([ray.remote(imports).remote() for _ in range(workers)])


@contextmanager
def _watched(out: Path) -> Iterator[list[float]]:
    """When something was seen to change in the directory of shards, from the first file that is written there."""
    changes, seen, ended = list[float](), set[str](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            now = (
                {entry.name for entry in os.scandir(out) if "shard" in entry.name or entry.name.endswith(".parquet")}
                if out.exists()
                else set()
            )
            now -= {"shards.parquet"}
            if now - seen:
                changes.append(time.perf_counter())
                seen.update(now)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield changes
    finally:
        ended.set()
        thread.join()


def tarwriter(folder: Path, out: Path) -> dict[str, float]:
    from webdataset import TarWriter

    paths = sorted(folder.glob("*/*.jpg"))
    out.mkdir()
    start, room, tar, shards = time.perf_counter(), 0, None, 0
    for path in paths:
        data = path.read_bytes()
        if tar is None or room < len(data):
            if tar is not None:
                tar.close()
            tar, room, shards = TarWriter(str(out / f"{shards:05d}.tar"), mtime=0, encoder=False), SHARD, shards + 1
        label = path.parent.name.removeprefix("class").encode()
        tar.write({"__key__": path.stem, "jpg": data, "cls": label, "json": b'{"source": "%s"}' % path.name.encode()})
        room -= len(data) + 5 * 512
    if tar is not None:
        tar.close()
    return {"images_per_s": len(paths) / (time.perf_counter() - start)}


def decode(folder: Path, workers: int) -> dict[str, float]:
    import simplejpeg

    paths = sorted(folder.glob("*/*.jpg"))
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        pixels = sum(pool.map(lambda path: simplejpeg.decode_jpeg(path.read_bytes()).size, paths))
    assert pixels
    return {"images_per_s": len(paths) / (time.perf_counter() - start)}


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def report(name: str, found: dict[str, list[float]], bound: str, goal: float) -> None:
    low, middle, high = ratios(found, bound)
    print(
        f"{name}: {median(found['ours']):,.0f} images/s; {bound} {median(found[bound]):,.0f}; ratio {middle:.2f} ({low:.2f} to {high:.2f}), goal {goal}"
    )


@click.command()
@click.option("--pairs", default=5, show_default=True)
@click.option("--images", default=18_000, show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--check", type=click.Choice(["ends", "decode"]), help="Race this one alone.")
@click.option("--only", help="One of these, in this process: ends, decode, tarwriter, bound.")
@click.option("--scaling", is_flag=True, help="Two workers on two cores against one on one.")
@click.option("--cores", type=int, help="How many this process may use.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the images are, or are made and stay.")
def main(
    pairs: int, images: int, workers: int, check: str | None, only: str | None, scaling: bool, cores: int | None, folder: Path | None
) -> None:
    """See the head of this file."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
        folder = folder or Path(scratch, "images")
        if not folder.exists():
            make_folder(folder, images)
        out = Path(scratch, "out")
        if only:
            runs = {
                "ends": lambda: shard(folder, out, "ends", workers),
                "decode": lambda: shard(folder, out, "decode", workers),
                "tarwriter": lambda: tarwriter(folder, out),
                "bound": lambda: decode(folder, workers),
            }
            print(json.dumps(runs[only]()))
            shutil.rmtree(out, ignore_errors=True)
            return
        size = sum(path.stat().st_size for path in folder.glob("*/*.jpg"))
        print(f"{machine()}; {images:,} files, {size / 1e6:,.0f} MB, {workers} of Ray's workers")
        module = [sys.executable, "-m", "tests.bench.sharding_folder", "--folder", str(folder)]
        if scaling:
            for how in ("ends", "decode") if check is None else (check,):
                one, two = ([*module, "--workers", n, "--cores", n, "--only", how] for n in ("1", "2"))
                report(f"check: {how}, two workers", race(two, {"one worker": one}, pairs), "one worker", 1.8)
            return
        each = [*module, "--workers", str(workers), "--only"]
        for how, other, command, goal in (("ends", "TarWriter", "tarwriter", 0.70), ("decode", "libjpeg", "bound", 0.85)):
            if check in (None, how):
                report(f"check: {how}", race([*each, how], {other: [*each, command]}, pairs), other, goal)


if __name__ == "__main__":
    main()
