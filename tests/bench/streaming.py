"""How fast shards become batches, against peers and against the bare work.

    python -m tests.bench.streaming [--pairs 5] [--peer NAME='COMMAND with {shards}'] [--evaluation-peer NAME='COMMAND']

Makes 3,000 JPEGs of 304 x 256 pixels from real photographs, about 35 kB each, in three shards, and races, each in a process of its own, in turn:
the training loader (2 workers, random-resized crops of 224 pixels, micro-batches of 64); the bare decode and resize of the
same crops from memory on two threads; each peer; the same shards on an S3 server on this machine; and evaluation
preprocessing. A peer's command prints one JSON line with `images_per_s`; `{shards}` becomes the shards' brace pattern.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path

import click
import numpy as np
from PIL import Image as Picture

from tests.bench.pairs import machine, median, race, ratios

WIDTH, HEIGHT, SHARDS, EACH, SIZE, MICRO, WORKERS = 304, 256, 3, 1000, 224, 64, 2


def photograph(seed: int) -> bytes:
    """A part of one of scikit-learn's two photographs (427 x 640), scaled down where it is larger, as a JPEG of quality 95."""
    random = np.random.default_rng(seed)
    whole = photographs()[int(random.integers(2))]
    scale = random.uniform(1.0, 1.6)
    height, width = round(HEIGHT * scale), round(WIDTH * scale)
    top, left = int(random.integers(whole.shape[0] - height + 1)), int(random.integers(whole.shape[1] - width + 1))
    part = Picture.fromarray(whole[top : top + height, left : left + width]).resize((WIDTH, HEIGHT), Picture.Resampling.BICUBIC)
    if random.random() < 0.5:
        part = part.transpose(Picture.Transpose.FLIP_LEFT_RIGHT)
    part.save(data := io.BytesIO(), "JPEG", quality=95)
    return data.getvalue()


@lru_cache
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def make_shards(folder: Path, each: int = EACH) -> None:
    from pipeline.core.storage import Storage
    from pipeline.shards.images import Checked
    from pipeline.shards.manifest import Manifest, dataset_hash, publish
    from pipeline.shards.samples import Sample
    from pipeline.shards.writer import write_shard

    directory, records = Storage(str(folder)), []
    for shard in range(SHARDS):
        samples = (
            Sample(f"{n:020x}", Checked(photograph(n), "jpg", WIDTH, HEIGHT), n % 10, f"photograph {n}".encode(), b"{}")
            for n in range(shard * each, (shard + 1) * each)
        )
        written = write_shard(directory, f"train-{shard:05d}.tar", "train", samples)
        assert written is not None
        records.append(written.record)
    count = SHARDS * each
    publish(directory, records, Manifest(
        hash=dataset_hash(records), config="bench", source="made", classes=[str(n) for n in range(10)], splits={"train": count},
        bytes=sum(r.bytes for r in records), read=count, written=count, ignored=0, dropped={}, dropped_samples=[], smallest=(WIDTH, HEIGHT),
    ))  # fmt: skip


@contextmanager
def s3_server(folder: Path, port: int) -> Iterator[tuple[str, str]]:
    """(URL, endpoint) of a copy of the shards on an S3 server in a process of its own."""
    from pipeline.core.storage import Storage

    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)], **quiet)  # type: ignore[call-overload]
    try:
        endpoint = f"http://127.0.0.1:{port}"
        store = Storage("s3://bench/data", endpoint)
        for _ in range(100):
            try:
                store.fs.mkdir("bench")
                break
            except Exception:  # noqa: BLE001  whatever the client says until the server listens
                time.sleep(0.2)
        for file in sorted(folder.iterdir()):
            store.put(file, file.name)
        yield store.url, endpoint
    finally:
        server.kill()
        server.wait()


# What runs in a process of its own


def loader(url: str, endpoint: str | None, batches: int, cache: str | None) -> dict[str, float]:
    import torch

    from pipeline.config.inputs import Cache
    from pipeline.stream import open_stream

    torch.set_num_threads(1)
    began = time.perf_counter()
    stream = open_stream(
        url,
        global_batch=MICRO,
        micro_batch=MICRO,
        workers=WORKERS,
        size=SIZE,
        endpoint=endpoint,
        cache=Cache(path=cache) if cache else None,
    )
    made = iter(stream)
    next(made)
    first = time.perf_counter() - began
    for _ in range(3):
        next(made)
    began = time.perf_counter()
    images = sum(len(b.images) for b in islice(made, batches))
    rate = images / (time.perf_counter() - began)
    made.close()  # type: ignore[attr-defined]
    return {"images_per_s": rate, "first_batch_s": first, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def bound(url: str, batches: int, evaluate: bool) -> dict[str, float]:
    """Decode and resize alone: bytes in memory, crops known, two threads, nothing collated."""
    import simplejpeg
    import torch
    import torch.nn.functional as F

    from pipeline.config.inputs import Image
    from pipeline.stream import open_dataset
    from pipeline.stream.augment import _resized_crop
    from pipeline.stream.random import Random

    torch.set_num_threads(1)
    dataset, how = open_dataset(url), Image(pixels=SIZE)
    images = [dataset[n].image for n in range(512)]
    boxes = [(0, 0, HEIGHT, WIDTH) if evaluate else _resized_crop(HEIGHT, WIDTH, how, Random(n)) for n in range(512)]
    target = (SIZE, round(SIZE * WIDTH / HEIGHT)) if evaluate else (SIZE, SIZE)

    def work(n: int) -> None:
        top, left, height, width = boxes[n % 512]
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(images[n % 512], colorspace="RGB"))
        part = pixels[top : top + height, left : left + width].permute(2, 0, 1).unsqueeze(0)
        F.interpolate(part, size=target, mode="bicubic", antialias=True)

    count = batches * MICRO
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(128)))
        began = time.perf_counter()
        list(pool.map(work, range(count)))
    return {"images_per_s": count / (time.perf_counter() - began)}


def evaluation(url: str) -> dict[str, float]:
    import torch

    from pipeline.stream import open_dataset
    from pipeline.stream.batches import evaluation_batches

    torch.set_num_threads(1)
    made = evaluation_batches(open_dataset(url), SIZE, MICRO, workers=WORKERS)
    for _ in range(4):
        next(made)
    began = time.perf_counter()
    images = sum(len(b.images) for b in islice(made, 40))
    return {"images_per_s": images / (time.perf_counter() - began)}


def memory(url: str, endpoint: str | None, cache: str, batches: int) -> dict[str, list[int]]:
    """Resident MiB, ten times in `batches` micro-batches, over many epochs."""
    from pipeline.config.inputs import Cache
    from pipeline.stream import open_stream

    stream = open_stream(url, global_batch=MICRO, micro_batch=MICRO, workers=WORKERS, size=SIZE, endpoint=endpoint, cache=Cache(path=cache))
    made, seen = iter(stream), []
    for _ in range(10):
        for _ in range(batches // 10):
            next(made)
        status = Path("/proc/self/status").read_text()
        seen.append(int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024)
    return {"mib": seen}


def child(*what: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.streaming", "--child", json.dumps(what)]


def run_child(what: list[str]) -> None:
    kind, url, endpoint, batches = what[0], what[1], what[2] or None, int(what[3])
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as fresh:  # nothing fetched before
        match kind:
            case "loader":
                print(json.dumps(loader(url, endpoint, batches, fresh)))
            case "bound":
                print(json.dumps(bound(url, batches, evaluate=False)))
            case "evaluation-bound":
                print(json.dumps(bound(url, batches, evaluate=True)))
            case "evaluation":
                print(json.dumps(evaluation(url)))
            case "memory":
                print(json.dumps(memory(url, endpoint, fresh, batches)))


@click.command()
@click.option("--pairs", default=5, show_default=True)
@click.option("--batches", default=40, show_default=True, help="of 64 images, in each run")
@click.option("--peer", "peers", multiple=True, help="NAME=COMMAND of a training loader")
@click.option("--evaluation-peer", "evaluation_peers", multiple=True, help="NAME=COMMAND of evaluation preprocessing")
@click.option("--data", type=click.Path(path_type=Path), help="where the shards are kept; default: a temporary folder")
@click.option("--port", default=5871, show_default=True, help="of the S3 server")
@click.option("--long", default=1000, show_default=True, help="batches of the run whose memory is watched; 0 for none")
@click.option("--child", "what", hidden=True)
def main(
    pairs: int,
    batches: int,
    peers: tuple[str, ...],
    evaluation_peers: tuple[str, ...],
    data: Path | None,
    port: int,
    long: int,
    what: str | None,
) -> None:
    if what:
        run_child(json.loads(what))
        return
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as temporary:
        folder = data or Path(temporary)
        if not (folder / "manifest.json").exists():
            make_shards(folder)
        race_all(folder, pairs, batches, peers, evaluation_peers, port, long)


def race_all(
    folder: Path, pairs: int, batches: int, peers: tuple[str, ...], evaluation_peers: tuple[str, ...], port: int, long: int
) -> None:
    url, pattern = str(folder), f"{folder}/train-{{00000..{SHARDS - 1:05d}}}.tar"
    print(
        f"{machine()}\n{pairs} pairs of {batches} x {MICRO} images\n\n| what | images/s, median | ours over it: least, median, most |\n|---|---|---|"
    )

    def rows(label: str, found: dict[str, list[float]]) -> None:
        print(f"| {label} | {median(found['ours']):,.0f} | |")
        for other in (name for name in found if name != "ours"):
            low, middle, high = ratios(found, other)
            print(f"| {other} | {median(found[other]):,.0f} | {low:.2f}, **{middle:.2f}**, {high:.2f} |", flush=True)

    def commands(given: tuple[str, ...]) -> dict[str, str]:
        return {name: command.replace("{shards}", pattern) for name, _, command in (g.partition("=") for g in given)}

    ours = child("loader", url, "", str(batches))
    rows("training, local shards", race(ours, {"bare decode and resize": child("bound", url, "", str(batches)), **commands(peers)}, pairs))
    whole = child("evaluation", url, "", "40")
    bare = {"bare decode and resize, evaluation": child("evaluation-bound", url, "", "40")}
    rows("evaluation, local shards", race(whole, {**bare, **commands(evaluation_peers)}, pairs))
    with s3_server(folder, port) as (remote, endpoint):
        s3 = child("loader", remote, endpoint, str(batches))
        rows("training, S3 on this machine, nothing cached", race(s3, {"training, local shards": ours}, pairs))
        for name in ("first_batch_s", "peak_mib"):
            values = race(s3, {}, 1, name)["ours"]
            print(f"\n{name}, S3, nothing cached: {values[0]:,.2f}")
        print(f"first_batch_s, local: {race(ours, {}, 1, 'first_batch_s')['ours'][0]:,.2f}")
        if long:
            for label, where, at in (("local", url, ""), ("S3", remote, endpoint)):
                text = subprocess.run(child("memory", where, at, str(long)), capture_output=True, text=True, check=True).stdout
                print(f"resident MiB over {long} batches, {label}: {json.loads(text.splitlines()[-1])['mib']}", flush=True)


if __name__ == "__main__":
    main()
