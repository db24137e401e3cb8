from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import ModelCard
from pipeline.checkpoint.goodput import FAILED, FINISHED, Job, key_of
from pipeline.config import Config, parse_config
from pipeline.config.schema import Tracking
from pipeline.core.storage import Storage
from pipeline.evaluate.results import make_result, write_result
from pipeline.evaluate.supervised import evaluate_supervised
from pipeline.evaluate.tasks import Task
from pipeline.shards.job import make_dataset
from tests.checkpoints import commit_model

CLASSES = ["<b>dark", "light"]
MODEL = {"width": 16, "depth": 1, "heads": 2, "patch": 4}
HISTORY = [
    {"step": s, "samples": 8 * s, "train/loss": 2.0 / s, "train/top1": 1 - 0.5 / s, "train/lr": 1e-3, "train/grad_norm": 1.0}
    for s in range(1, 6)
]

# The first job died in step 5 with three steps committed; the second went on from there.
JOBS = [
    Job(
        "id", 1, 1_780_000_000.0, 70.0, workers=4, gpus=4, starting=10.0, productive=40.0, waiting=6.0, saving=4.0, steps=5, first=0, step=4,
        commits=[(3, 30.0)], end=FAILED, reason="<i>peer</i> gone", price=9.0, currency="EUR",
    ),
    Job(
        "id", 2, 1_780_000_080.0, 40.0, workers=2, gpus=2, starting=15.0, productive=22.0, waiting=1.0, saving=2.0, steps=5, first=3, origin=1,
        step=5, commits=[(5, 22.0)], end=FINISHED, price=9.0, currency="EUR",
    ),
]  # fmt: skip


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light squares, 24 of each, of 8 x 8 pixels; a damaged image and a file that is none."""
    folder = tmp_path_factory.mktemp("report") / "tree"
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for n in range(24):
            Image.fromarray(np.full((8, 8, 3), 30 + 150 * label + n, np.uint8)).save(folder / name / f"{n:02d}.png")
    (folder / "light" / "broken.png").write_bytes((folder / "light" / "00.png").read_bytes()[:50])
    (folder / "light" / "notes.md").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def config(tree: Path) -> Config:
    return parse_config(
        {
            "name": "tiny",
            "storage": str(tree.parent / "runs"),
            "cluster": "local",
            "shard": {"source": {"url": str(tree)}, "splits": {"train": 0.7, "test": 0.3}},
            "pretrain": {"model": {"name": "vit", **MODEL}, "image": {"pixels": 8}, "duration": "5 steps", "batch": 8, "micro_batch": 8},
            "evaluate": {"suites": ["squares"]},
        }
    ).model_copy(update={"tracking": Tracking(uri="http://me:secret@mlflow:5000")})  # which no config file may hold


@pytest.fixture(scope="session")
def dataset_url(tree: Path, config: Config, cluster: None) -> str:
    directory = Storage(str(tree.parent / "dataset"))
    make_dataset(config, directory)
    return directory.url


@pytest.fixture(scope="session")
def run(config: Config, dataset_url: str) -> Storage:
    """A run with a committed checkpoint, results, timings and the ledgers of two jobs. Its head tells by brightness and is sometimes wrong."""
    run = Storage(config.storage.url) / config.name
    data = Task("squares", dataset_url, "train", "test", [])
    task = Task("squares", dataset_url, "train", "test", data.open("test").classes)
    card = ModelCard(
        "vit", {**MODEL, "pixels": 8, "classes": 2}, "classify", task.classes, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "hash", "tiny", 5
    )
    model = card.make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    commit_model(run, card, model.state_dict(), history=HISTORY)
    write_result(run, evaluate_supervised(card, model.state_dict(), task, "f"))
    write_result(run, make_result("few-shot/5", task, [9, 10, 12], 14, seconds=1, fingerprint="f", details={"shots": 5}))
    timings = [{"stage": "shard", "part": "", "seconds": 3.0}, {"stage": "pretrain", "part": "steps", "seconds": 9.0}]
    run.write("timings.json", json.dumps(timings).encode())
    for job in JOBS:
        run.write(key_of(job.generation), job.to_json())
    return run
