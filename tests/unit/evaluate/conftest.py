from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import ModelCard
from pipeline.config import Config, parse_config
from pipeline.core.storage import Storage
from pipeline.evaluate.tasks import Task
from pipeline.models import create
from pipeline.shards.job import make_dataset

CLASSES = ["blue", "green", "red"]
MODEL = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "pool": "gap"}
OPTIONS = {**MODEL, "pixels": 8, "classes": len(CLASSES)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tree/<colour>/NN.png`, 40 noisy images a class of 8 x 8 pixels, in which one colour is the brightest."""
    folder = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / "tree" / name).mkdir(parents=True)
        for n in range(40):
            pixels = random.integers(0, 160, (8, 8, 3))
            pixels[..., 2 - label] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "tree" / name / f"{n:02d}.png")
    return folder


@pytest.fixture(scope="session")
def config(root: Path) -> Config:
    return parse_config(
        {
            "name": "tiny",
            "storage": str(root / "runs"),
            "cluster": "local",
            "shard": {"source": {"url": str(root / "tree")}, "splits": {"train": 0.7, "test": 0.3}},
            "pretrain": {
                "model": {"name": "vit", **MODEL},
                "image": {"pixels": 8, "crop": "none", "flip": False},
                "duration": "1 epoch",
                "batch": 16,
                "micro_batch": 8,
            },
            "evaluate": {
                "suites": [{"name": "colours"}],
                "seeds": 2,
                "shots": [1, 5],
                "fine_tune": {"steps": 12, "batch": 16, "lr": [0.01, 0.03], "warmup": 2},
            },
        }
    )


@pytest.fixture(scope="session")
def dataset_url(root: Path, config: Config, cluster: None) -> str:
    directory = Storage(str(root / "dataset"))
    manifest, _ = make_dataset(config, directory)
    assert manifest.classes == CLASSES
    return directory.url


@pytest.fixture
def task(dataset_url: str) -> Task:
    return Task("colours", dataset_url, "train", "test", CLASSES, "hash")


@pytest.fixture
def card() -> ModelCard:
    return ModelCard("vit", OPTIONS, "classify", CLASSES, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "hash", "tiny", 7)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Untrained weights with a head that is not zero."""
    model = create("vit", seed=1, **OPTIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight, std=0.1)  # type: ignore[arg-type]
    return model.state_dict()
