from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.predict import main, read_view


def test_each_image_gets_a_line(run: Storage, tree: Path) -> None:
    paths = [str(tree / "light" / f"0{n}.png") for n in (0, 1)]
    result = CliRunner().invoke(main, [run.url, *paths, "--top", "2"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split("   ")[0] for line in lines] == paths
    assert all("light" in line and "<b>dark" in line and "%" in line for line in lines)


def test_json_sums_to_one(run: Storage, tree: Path) -> None:
    result = CliRunner().invoke(main, [run.url, str(tree / "light" / "00.png"), "--json", "--step", "5"])
    row = json.loads(result.stdout)
    assert row["step"] == 5
    assert sum(c["probability"] for c in row["classes"]) == pytest.approx(1)


def test_a_bad_image_does_not_stop_the_others(run: Storage, tree: Path, tmp_path: Path) -> None:
    good = str(tree / "light" / "00.png")
    bad = [str(tmp_path / "none.png"), str(tree / "light" / "broken.png"), str(tree / "light" / "notes.md"), str(tmp_path)]
    result = CliRunner().invoke(main, [run.url, *bad, good])
    assert result.exit_code == 3
    assert result.stdout.startswith(good)
    errors = result.stderr.splitlines()
    assert len(errors) == 4
    assert errors[0] == f"error: {bad[0]}: there is no such file"
    assert "corrupt" in errors[1]
    assert "not an image" in errors[2]


def test_no_such_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "nowhere"), "x.png"])
    assert result.exit_code == 102
    assert result.stderr.startswith("error: run ")


def test_no_such_step(run: Storage) -> None:
    result = CliRunner().invoke(main, [run.url, "x.png", "--step", "6"])
    assert result.exit_code == 3
    assert "committed steps: 5" in result.stderr


def test_a_phone_picture_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: up becomes right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    view = read_view(str(tmp_path / "turned.jpg"), 8)
    assert view.shape == (8, 8, 3)
    assert view.dtype == torch.uint8
    assert view[:, 6:].min() > 200
    assert view[:, :2].max() < 50
