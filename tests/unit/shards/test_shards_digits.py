from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.core.errors import ExitCode
from pipeline.shards.digits import main
from pipeline.shards.sources import FolderSource


def test_digits_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    first = CliRunner().invoke(main, [str(folder)])
    assert first.output == f"1,797 scanned digits in {folder} (3,594 files written)\n"
    survey = FolderSource(str(folder)).survey()
    assert (survey.rows, survey.classes, survey.exact) == (1797, 10, True)
    with Image.open(folder / "7" / "0007.png") as image:
        assert (image.mode, image.size) == ("L", (8, 8))
        assert (np.asarray(image) == 255 - np.round(load_digits().images[7] * 255 / 16)).all()
    assert (folder / "7" / "0007.txt").read_text() == "a scan of the digit seven"

    (folder / "7" / "0007.png").write_bytes(b"half of i")
    (folder / "3" / "0003.txt").unlink()
    assert CliRunner().invoke(main, [str(folder)]).output.endswith("(2 files written)\n")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, [str(tmp_path / "file")])
    assert result.exit_code == ExitCode.PREFLIGHT and result.output.startswith("digits: cannot write ")
