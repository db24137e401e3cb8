from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.checkpoint import ModelCard
from pipeline.predict import main
from pipeline.stream.palette import Palette
from pipeline.stream.text import Tokenizer
from tests.checkpoints import commit_model

HALF = (0.5, 0.5, 0.5)
TOKENIZER = Tokenizer.train(["a photo of a cat. a drawing of a dog."] * 2, 560)
CLIP: dict[str, Any] = {
    "pixels": 8, "embed": 8, "vocabulary": TOKENIZER.size, "context": 12,
    "vision": {"kind": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2},
    "text": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip


def commit(directory: Path, card: ModelCard) -> str:
    commit_model(str(directory), card, card.make(seed=0).state_dict())
    return str(directory)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    card = ModelCard("clip", CLIP, "contrastive", ["sun", "moon"], HALF, HALF, "hash", "tiny", 5, tokenizer=TOKENIZER.to_json())
    return commit(tmp_path_factory.mktemp("clip"), card)


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def classes_of(*words: str) -> dict[str, float]:
    result = call(*words, "--json", "--top", "9")
    assert result.exit_code == 0, result.output
    return {c["class"]: c["probability"] for c in json.loads(result.stdout)["classes"]}


def test_the_classes_that_are_asked_for(clip: str, image: str) -> None:
    found = classes_of(clip, image, "--classes", "cat, dog,cow")
    assert set(found) == {"cat", "dog", "cow"}
    assert sum(found.values()) == pytest.approx(1)
    drawn = classes_of(clip, image, "--classes", "cat,dog,cow", "--template", "a drawing of a {}.")
    assert set(drawn) == set(found)
    assert drawn["cat"] != found["cat"]
    both = classes_of(clip, image, "--classes", "cat,dog,cow", "--template", "a drawing of a {}.", "--template", "a photo of a {}.")
    assert both["cat"] not in (drawn["cat"], found["cat"])


def test_the_classes_of_its_data_by_default(clip: str, image: str) -> None:
    assert set(classes_of(clip, image)) == {"sun", "moon"}


def test_mistakes_end_in_one_sentence(clip: str, image: str, tmp_path: Path) -> None:
    result = call(clip, image, "--template", "a photo")
    assert result.exit_code == 3
    assert result.stderr == "error: --template: 'a photo' should hold {} once, where the name of the class belongs\n"
    bare = commit(
        tmp_path / "bare", ModelCard("clip", CLIP, "contrastive", [], HALF, HALF, "hash", "tiny", 5, tokenizer=TOKENIZER.to_json())
    )
    result = call(bare, image)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: --classes: is missing")
    options = {"pixels": 8, "width": 16, "depth": 1, "heads": 2, "colors": 512}
    igpt = commit(
        tmp_path / "igpt",
        ModelCard("igpt", options, "next-pixel", ["a", "b"], HALF, HALF, "hash", "tiny", 5, Palette.three_bit().colors.tolist()),
    )
    result = call(igpt, image)
    assert (result.exit_code, "has no head of classes" in result.stderr) == (3, True)
    vit = {"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2}
    own = commit(tmp_path / "vit", ModelCard("vit", vit, "classify", ["a", "b"], HALF, HALF, "hash", "tiny", 5))
    result = call(own, image, "--classes", "cat,dog")
    assert (result.exit_code, "has a head of its own, of 2 classes" in result.stderr) == (3, True)
    assert set(classes_of(own, image)) == {"a", "b"}
