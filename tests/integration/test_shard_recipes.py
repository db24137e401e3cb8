"""The shipped recipes of datasets: each is sound, says what it is, and of those of folders one makes a dataset."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Config, load_config
from pipeline.core.errors import UserError
from pipeline.core.storage import Storage
from pipeline.preflight import check_config
from pipeline.shards.job import make_dataset
from pipeline.shards.sources import check_source

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "shard"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FORMATS = {"folder", "urls", "table", "tars"}


def load(name: str, *overrides: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


def test_every_kind_of_source_has_a_recipe_and_every_recipe_a_line_in_the_table() -> None:
    shards = [load(name).shard for name in NAMES]
    assert {shard.source.format for shard in shards if shard} == FORMATS
    assert re.findall(r"^\| `([\w-]+)\.yaml`", (RECIPES / "README.md").read_text(), re.MULTILINE) != []
    assert set(re.findall(r"^\| `([\w-]+)\.yaml`", (RECIPES / "README.md").read_text(), re.MULTILINE)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_sound_and_says_which_source_is_not_there(name: str) -> None:
    config = load(name)
    check_config(config)
    assert config.name == name and config.shard and not (config.pretrain or config.evaluate or config.data)
    with pytest.raises(UserError, match=r"^shard\.source\."):
        check_source(config.shard)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    header = re.match(r"(# .*\n)+", (RECIPES / f"{name}.yaml").read_text())
    assert header, "a recipe begins with its header"
    said = re.findall(r"^# (\w+): +(\S.*)$", header[0], re.MULTILINE)
    assert [key for key, _ in said if key != "Differs"] == ["What", "Data", "Command", "Cost", "Expect"]
    assert dict(said)["Command"].startswith(f"python launch/submit.py configs/shard/{name}.yaml shard.source.url=URL storage=URL ")


@pytest.mark.parametrize("name", NAMES)
def test_the_hours_in_a_header_are_those_of_its_rows(name: str) -> None:
    """At 1.5 to 2 ms an image."""
    text = (RECIPES / f"{name}.yaml").read_text()
    for hours, images in {
        "laion": [("172 to 229", 413e6)],
        "coyo": [("311 to 415", 747e6)],
        "datacomp": [("5 to 7", 12.8e6), ("533 to 711", 1.28e9)],
    }.get(name, []):
        assert hours in text
        low, high = map(int, hours.split(" to "))
        assert (low, high) == (round(images * 1.5e-3 / 3600), round(images * 2e-3 / 3600))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ["imagenet", "folder-captions"])
def test_a_recipe_of_folders_makes_a_dataset(name: str, tmp_path: Path) -> None:
    for n in range(300):
        folder = tmp_path / "source" / (f"n0144{n % 3}" if name == "imagenet" else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 48, 3), n % 256, np.uint8)).save(folder / f"{n}.jpg")
        (folder / f"{n}.txt").write_text(f"shade {n}")
    config = load(name, f"shard.source.url={tmp_path}/source")
    assert config.shard
    manifest, _ = make_dataset(config, Storage(str(tmp_path / "shards")))
    assert manifest.written == 300 and set(manifest.splits) == set(config.shard.splits)
    assert len(manifest.classes) == (3 if name == "imagenet" else 0)
