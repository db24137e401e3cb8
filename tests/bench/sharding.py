"""How fast collections become shards, against peers.

    python -m tests.bench.sharding urls [--pairs 5] [--peers DIR --python PY] [--peer NAME='COMMAND with {urls} and {out}']

`urls`: 10,000 URLs of a server on this machine, of 3,000 photographs of 300 to 800 pixels, become shards of images whose shorter side is
256 pixels: ours by `launch/submit.py`, and each peer's by its command, in turn, each into an empty folder, on the same cores. `DIR` holds
the peers' scripts (`shard_*.py`, given the list and the folder), `PY` is a Python that has their packages. Rates are from the first image
that is asked for to the end of the last shard, by the server's clock and the shards' own times, the same for all; JPEGs are encoded with
quality 95 and 4:2:0, as img2dataset's are.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from tests.bench.pairs import machine, median, ratios
from tests.bench.web import make_photographs, serving, times

PHOTOGRAPHS, URLS, PIXELS, PER_SHARD, CORES = 3000, 10_000, 256, 1000, 2


@dataclass(frozen=True)
class Taken:
    """Of one run: seconds until the first image was asked for, from then to the end of the last shard, and of the whole command."""

    samples: int
    start_up: float
    busy: float
    total: float

    @property
    def rate(self) -> float:
        return self.samples / self.busy


def write_urls(path: Path, port: int, count: int) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["url", "caption"])
        table.writerows([f"http://127.0.0.1:{port}/{n:06d}.jpg", f"photograph {n}"] for n in range(count))


def write_config(path: Path, urls: Path, out: Path) -> None:
    """The same work as the peers': workers, connections, sizes, quality; a host is given as many connections as they give it."""
    path.write_text(
        yaml.safe_dump(
            {
                "name": "bench",
                "storage": str(out),
                "shard": {
                    "source": {"format": "urls", "url": str(urls)},
                    "images": {"resize": {"side": "shorter", "pixels": PIXELS}, "quality": 95, "subsampling": "420"},
                    "workers": CORES,
                    "samples": PER_SHARD,
                    "fetch": {"per_host": 64, "allow": ["127.0.0.1"]},
                },
            }
        )
    )


def take(command: list[str], out: Path, port: int) -> Taken:
    """Run `command`, which writes tars somewhere in `out`."""
    times(port)
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    total = time.time() - began
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    first, asked = times(port)
    tars = list(out.rglob("*.tar"))
    if not asked or not tars:
        raise SystemExit(f"{shlex.join(command)} asked for {asked} images and wrote {len(tars)} tars")
    return Taken(sum(map(images_in, tars)), first - began, max(tar.stat().st_mtime for tar in tars) - first, total)


def images_in(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        return sum(name.endswith(".jpg") for name in opened.getnames())


def race(ours: str, peers: dict[str, str], pairs: int, port: int, count: int) -> dict[str, list[Taken]]:
    found: dict[str, list[Taken]] = {name: [] for name in ("ours", *peers)}
    for n in range(pairs):
        for name, command in {"ours": ours, **peers}.items():
            with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
                out, urls, config = Path(folder, "out"), Path(folder, "urls.csv"), Path(folder, "config.yaml")
                write_urls(urls, port, count)
                write_config(config, urls, out)
                words = {"urls": str(urls), "out": str(out), "config": str(config)}
                taken = take([word.format(**words) for word in shlex.split(command)], out, port)
            print(f"  pair {n + 1}: {name} {taken.rate:,.0f} images/s, {taken}", file=sys.stderr, flush=True)
            found[name].append(taken)
    return found


def told(found: dict[str, list[Taken]]) -> None:
    print(
        "\n| what | samples | images/s, first to last | start-up, s | total, s | ours over it: least, median, most |\n|---|---|---|---|---|---|"
    )
    rates = {name: [t.rate for t in takes] for name, takes in found.items()}
    for name, takes in found.items():
        over = "" if name == "ours" else "{:.2f}, **{:.2f}**, {:.2f}".format(*ratios(rates, name))
        start_up, total = median([t.start_up for t in takes]), median([t.total for t in takes])
        print(f"| {name} | {takes[-1].samples:,} | {median(rates[name]):,.0f} | {start_up:.1f} | {total:.1f} | {over} |", flush=True)


@click.group()
def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # for all that is started from here, the server too


@main.command("urls")
@click.option("--pairs", default=5, show_default=True)
@click.option("--count", default=URLS, show_default=True, help="URLs")
@click.option("--peers", type=click.Path(exists=True, file_okay=False, path_type=Path), help="folder of the peers' scripts")
@click.option("--python", default=sys.executable, help="a Python with the peers' packages")
@click.option("--peer", "given", multiple=True, help="NAME=COMMAND")
@click.option("--data", type=click.Path(path_type=Path), help="where the photographs are kept; default: a temporary folder")
def race_urls(pairs: int, count: int, peers: Path | None, python: str, given: tuple[str, ...], data: Path | None) -> None:
    """From a list of URLs to shards."""
    commands = {name: command for name, _, command in (one.partition("=") for one in given)}
    for script in sorted(peers.glob("shard_*.py")) if peers else ():
        commands[script.stem.removeprefix("shard_")] = shlex.join([python, str(script)]) + " {urls} {out}"
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as temporary:
        folder = data or Path(temporary)
        if len(list(folder.glob("*.jpg"))) != PHOTOGRAPHS:
            make_photographs(folder, PHOTOGRAPHS)
        size = sum(file.stat().st_size for file in folder.glob("*.jpg")) / PHOTOGRAPHS
        print(f"{machine()}\n{pairs} pairs of {count:,} URLs of photographs, {size / 1e3:.0f} kB each, on {CORES} cores")
        with serving(folder) as port:
            told(race(shlex.join([sys.executable, "launch/submit.py"]) + " {config} --local", commands, pairs, port, count))


if __name__ == "__main__":
    main()
