"""A job that is killed with -9 at any moment, and run again: what was finished stays, and the result is that of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipeline.config import parse_config
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards import plan
from pipeline.shards.job import find_made, make_dataset
from pipeline.shards.manifest import read_manifest
from pipeline.stream import open_dataset

_JOB = """
import json, sys
import ray
from pipeline.config import parse_config
from pipeline.core.storage import Storage
from pipeline.shards import division, plan
from pipeline.shards.job import make_dataset

address, section, out = sys.argv[1:]
ray.init(**({"address": address} if address else {"num_cpus": 2, "include_dashboard": False}), log_to_driver=False)
plan.GROUP_ROWS, plan.CHUNK, plan.SPILL_BYTES, division.FAN = 70, 40, 9000, 2  # five ranges, in two passes
print("begun", flush=True)
make_dataset(parse_config(json.loads(section)), Storage(out))
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, encoded: Callable[..., bytes]) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    for n in range(300):
        path = root / f"class-{n % 7}" / f"{n}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(np.roll(noise, n, axis=1)), "JPEG"))
        path.with_suffix(".txt").write_text(f"number {n}")
    return root


class Jobs:
    """Runs of one job in processes of their own, each with a Ray of its own where `address` is empty."""

    def __init__(self, source: Path, out: Path, address: str, **shard: object) -> None:
        section = {
            "source": {"url": str(source)},
            "samples": 8,
            "images": {"resize": {"pixels": 200}},
            "splits": {"train": 0.9, "test": 0.1},
            **shard,
        }
        self.config = {"name": "t", "storage": "runs", "shard": section}
        self.command = [sys.executable, "-c", _JOB, address, json.dumps(self.config), str(out)]
        self.out = out

    def run(self, kill: Callable[[], bool] | None = None) -> bool:
        """Tells whether it came to its end, before `kill` said that its time is up."""
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout is not None and process.stderr is not None
            begun = process.stdout.readline()
            assert begun == "begun\n", process.stderr.read()
            while kill is not None and process.poll() is None:
                if kill():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return False
                time.sleep(0.002)
            output, errors = process.communicate()
            assert process.returncode == 0 and output == "done\n", errors
            return True

    def finished(self) -> dict[str, int]:
        """Shards that have a record, and when each was written."""
        records = self.out / ".plan" / "v1" / "fill"
        names = [p.stem for p in records.glob("*.json")] if records.is_dir() else []
        return {name: (self.out / name).stat().st_mtime_ns for name in names if (self.out / name).exists()}

    def contents(self) -> dict[str, bytes]:
        directory = Storage(str(self.out))
        return {name: directory.read(name) for name in directory.names() if name != ".plan"}


def some_moment(jobs: Jobs, dice: random.Random) -> Callable[[], bool]:
    """Says when a random part of the shards that are left is finished, or of the planning, and a random while after that."""
    work = jobs.out / ".plan" / "v1"
    planned = dice.random() < 0.3
    target = dice.randint(0, 9) if planned else len(jobs.finished()) + dice.randint(0, 12)
    pause = dice.uniform(0, 0.1)
    reached: list[float] = []

    def is_now() -> bool:
        done = sum(1 for p in work.glob("*/*") if "fill" not in p.parts) if planned else len(jobs.finished())
        if (done >= target or (jobs.out / "manifest.json").exists()) and not reached:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + pause

    return is_now


def break_and_resume(photographs: Path, tmp_path: Path, address: str, kills: int, seed: int, whole: Callable[[Jobs], object]) -> None:
    unbroken = Jobs(photographs, tmp_path / "whole", address)
    whole(unbroken)
    dice, killed, rounds = random.Random(seed), 0, 0
    expected = unbroken.contents()
    assert len([n for n in expected if n.endswith(".tar")]) >= 38
    while killed < kills:
        rounds += 1
        jobs = Jobs(photographs, tmp_path / f"broken-{rounds}", address)
        done: dict[str, int] = {}
        for _ in range(3):
            if killed == kills or jobs.run(some_moment(jobs, dice)):
                break
            killed += 1
            before, done = done, jobs.finished()
            assert (jobs.out / "manifest.json").exists() or before.items() <= done.items()  # finished work is not repeated
        jobs.run()
        assert all((jobs.out / name).stat().st_mtime_ns == at for name, at in done.items())
        assert jobs.contents() == expected
        assert {p.name for p in (jobs.out / ".plan" / "v1").iterdir()} == {"state.json", "known"}
        assert rounds < 10 * kills


@pytest.mark.slow
def test_killed_at_some_moments(photographs: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GROUP_ROWS", 70)
    monkeypatch.setattr(plan, "CHUNK", 40)

    def whole(job: Jobs) -> None:
        make_dataset(parse_config(job.config), Storage(str(job.out)))

    break_and_resume(photographs, tmp_path, ray.get_runtime_context().gcs_address, 2, 1, whole)


def test_a_filter_that_was_changed_meanwhile_is_another_dataset(
    photographs: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of before and after are not mixed; and what was made by the one stays until its own config asks for the other."""
    module = tmp_path / "own" / "own_filter_changed.py"
    module.parent.mkdir()
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.chdir(module.parent)  # Ray has its workers look there too
    jobs = Jobs(photographs, tmp_path / "out", ray.get_runtime_context().gcs_address, filter="own_filter_changed.keep", images={})
    module.write_text("def keep(sample):\n    return sample['label'] != 3\n")
    assert not jobs.run(lambda: len(jobs.finished()) >= 4)
    before = jobs.finished()
    module.write_text("def keep(sample):\n    return sample['label'] == 3\n")
    assert jobs.run()
    directory, config = Storage(str(jobs.out)), parse_config(jobs.config)
    manifest = read_manifest(directory)
    expected = len(list((photographs / "class-3").glob("*.jpg")))
    assert (manifest.read, manifest.written, manifest.dropped) == (300, expected, {"filtered": 300 - expected})
    assert before and {label for split in ("train", "test") for label in open_dataset(directory.url, split).labels()} == {3}

    assert config.shard is not None and find_made(config.shard, directory) == manifest
    module.write_text("def keep(sample):\n    return True\n")
    assert find_made(config.shard, directory) is None
    with pytest.raises(DataError, match=r"the run has trained on the dataset in .*, or the source code of shard.filter, was another"):
        make_dataset(config, directory, grow=False)
    assert read_manifest(directory) == manifest


@pytest.mark.chaos
def test_killed_with_its_ray_at_twenty_moments(photographs: Path, tmp_path: Path) -> None:
    break_and_resume(photographs, tmp_path, "", 20, 2, Jobs.run)
