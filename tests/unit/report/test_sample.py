from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.checkpoint import ModelCard
from pipeline.core.storage import Storage
from pipeline.evaluate.drawn import BLANK
from pipeline.sample import main
from pipeline.stream.palette import Palette
from tests.checkpoints import commit_model

HALF = (0.5, 0.5, 0.5)
IGPT: dict[str, Any] = {"pixels": 8, "width": 16, "depth": 1, "heads": 2, "colors": 512}
SIDE = 130  # a picture of 8 x 8, enlarged sixteen times, and a border of 2


def commit(directory: Path, card: ModelCard) -> str:
    model = card.make(seed=0)
    if hasattr(model, "head"):  # fresh heads are zero, which draws all colours alike
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    commit_model(str(directory), card, model.state_dict())
    return str(directory)


@pytest.fixture(scope="module")
def igpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    card = ModelCard("igpt", IGPT, "next-pixel", [], HALF, HALF, "hash", "tiny", 5, Palette.three_bit().colors.tolist())
    return commit(tmp_path_factory.mktemp("igpt"), card)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_a_grid_of_samples(igpt: str, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    result = call(igpt, str(out), "--count", "6", "--columns", "4", "--step", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert "pixels/s" in result.stderr, "progress is shown"
    assert Image.open(out).size == (4 * SIDE + 2, 2 * SIDE + 2)
    call(igpt, str(tmp_path / "same.png"), "--count", "6", "--columns", "4")
    assert (tmp_path / "same.png").read_bytes() == out.read_bytes()
    call(igpt, str(tmp_path / "other.png"), "--count", "6", "--columns", "4", "--seed", "1")
    assert (tmp_path / "other.png").read_bytes() != out.read_bytes()


def test_temperature_and_top_k_count(igpt: str, tmp_path: Path) -> None:
    def colours(*words: str) -> int:
        assert call(igpt, str(tmp_path / "x.png"), "--count", "8", *words).exit_code == 0
        return len(np.unique(np.array(Image.open(tmp_path / "x.png")).reshape(-1, 3), axis=0))

    usual, cold, two = colours(), colours("--temperature", "0.05"), colours("--top-k", "2")
    assert cold < usual
    assert two < usual


def test_images_are_completed(igpt: str, tmp_path: Path) -> None:
    files = []
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        files += ["--complete", str(tmp_path / f"{n}.png")]
    result = call(igpt, str(tmp_path / "out.png"), *files, "--count", "2")
    assert result.exit_code == 0, result.output
    sheet = np.array(Image.open(tmp_path / "out.png"))
    assert sheet.shape == (2 * SIDE + 2, 4 * SIDE + 2, 3)
    tiles = [[sheet[2 + r * SIDE : 130 + r * SIDE : 16, 2 + c * SIDE : 130 + c * SIDE : 16] for c in range(4)] for r in range(2)]
    for n, (image, given, *completions) in enumerate(tiles):
        assert np.array_equal(image, np.array(Image.open(tmp_path / f"{n}.png")))
        assert (given[4:] == BLANK).all()
        for picture in (given, *completions):
            assert np.abs(picture[:4].astype(int) - image[:4]).max() <= 16, "the upper half, in the palette's colours"
        assert not np.array_equal(completions[0][4:], completions[1][4:])


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--top-k", "600"], 3, "error: --top-k: 600 is more than the colours of the model (allowed: 1 to 512)"),
        (["--step", "6"], 3, "committed steps: 5"),
        (["--complete", "none.png"], 3, "error: none.png: there is no such file"),
        (["--temperature", "0"], 2, "--temperature"),
    ],
)
def test_mistakes_end_in_one_sentence(igpt: str, tmp_path: Path, words: list[str], code: int, sentence: str) -> None:
    result = call(igpt, str(tmp_path / "out.png"), *words)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.png").exists()


def test_a_run_that_draws_nothing(tmp_path: Path) -> None:
    assert call(str(tmp_path / "nowhere"), str(tmp_path / "x.png")).exit_code == 102
    vit = commit(
        tmp_path / "vit",
        ModelCard(
            "vit",
            {"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2},
            "classify",
            ["a", "b"],
            HALF,
            HALF,
            "hash",
            "tiny",
            5,
        ),
    )
    result = call(vit, str(tmp_path / "x.png"))
    assert (result.exit_code, "vit draws no pixels" in result.stderr) == (3, True)
    bert = commit(
        tmp_path / "bert",
        ModelCard("igpt", {**IGPT, "masked": True}, "bert-pixels", [], HALF, HALF, "hash", "tiny", 5, Palette.three_bit().colors.tolist()),
    )
    result = call(bert, str(tmp_path / "x.png"))
    assert (result.exit_code, "BERT objective" in result.stderr) == (3, True)


def test_a_store_of_objects(igpt: str, s3: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    result = call(igpt, f"{bucket}/out.png", "--count", "1")
    assert result.exit_code != 0
    remote = Storage(bucket, endpoint)
    local = Storage(igpt)
    for path in sorted(Path(igpt).rglob("*")):
        if path.is_file():
            name = str(path.relative_to(igpt))
            remote.write(f"run/{name}", local.read(name))
    result = call(f"{bucket}/run", f"{bucket}/out.png", "--count", "1", "--endpoint", endpoint)
    assert result.exit_code == 0, result.output
    assert Image.open(io.BytesIO(remote.read("out.png"))).size == (SIDE + 2, SIDE + 2)
