"""One page of several runs: a classifier, a model of pixels with what it drew, and a run without results."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Config
from pipeline.core.storage import Storage
from pipeline.evaluate.drawn import COMPLETIONS, SAMPLES, write_pictures
from pipeline.evaluate.results import make_result, write_result
from pipeline.evaluate.tasks import Task
from pipeline.report import Shown, build_joint_report, build_report, write_joint_report
from tests.unit.report.test_report_page import read

COMMAND = "python launch/submit.py configs/tiny.yaml configs/pixels.yaml"
LAYERS = [{"layer": n, "held_out_top1": t + 0.01, "top1": t, "lambda": 1.0, "converged": True} for n, t in enumerate((0.5, 0.8125, 0.75))]


def png(grey: int) -> bytes:
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def pixels(config: Config, dataset_url: str, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A run with the curve of a probe, zero-shot and pictures, and no checkpoint."""
    run = Storage(str(tmp_path_factory.mktemp("pixels")))
    task = Task("squares", dataset_url, "train", "test", ["<b>dark", "light"])
    write_result(run, make_result("layers", task, [13], 16, seconds=1, fingerprint="f", details={"layers": LAYERS, "best": 1}))
    test = task.open("test")
    kept = {"key": [s.key for s in test], "label": [s.label for s in test], "predicted": [0] * len(test), "probability": [0.75] * len(test)}
    details = {"data": dataset_url, "split": "test", "templates": ["a {}", "one {}"], "names": ["dark", "light"], "predictions": kept}
    write_result(run, make_result("zero-shot", task, [8], len(test), seconds=1, fingerprint="f", details=details))
    write_pictures(run, {COMPLETIONS: png(1), SAMPLES: png(2)}, "f", task, 4)
    return Shown(run, config.model_copy(update={"name": "pixels"}), dataset_url)


@pytest.fixture(scope="module")
def runs(run: Storage, config: Config, dataset_url: str, pixels: Shown, tmp_path_factory: pytest.TempPathFactory) -> list[Shown]:
    bare = config.model_copy(update={"name": "bare", "pretrain": None, "evaluate": None})
    return [Shown(run, config, dataset_url), pixels, Shown(Storage(str(tmp_path_factory.mktemp("bare"))), bare, None)]


@pytest.fixture(scope="module")
def page(runs: list[Shown]) -> str:
    return build_joint_report(runs, COMMAND)


def test_every_run_has_its_section_and_ids_are_used_once(page: str) -> None:
    reader = read(page)
    assert reader.foreign == []
    for name in ("tiny", "pixels", "bare"):
        assert f'<h2 id="{name}">{name}</h2>' in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert sorted(ids) == sorted(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page)
    assert set(targets) <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= set(ids)
    assert COMMAND in page


def test_all_scores_are_in_one_table_with_their_run(page: str) -> None:
    assert page.count("<caption>squares") == 1
    table = page[page.index("<caption>squares") : page.index("</table>")]
    rows = [re.sub(r"<[^>]+>|\s+", " ", row) for row in table.split("<tr>")[2:]]
    assert [row.split()[0] for row in rows] == ["tiny", "5-shot", "pixels", "probe"]
    assert "81.25%" in rows[3]
    assert "on the last one it gets 75.0%" in rows[3]
    assert "the mean of 2 captions" in rows[2]


def test_pictures_and_the_curve_of_layers_are_shown(page: str, pixels: Shown) -> None:
    single = build_report(*pixels, COMMAND)
    for shown in (page, single):
        assert "What the model draws" in shown
        assert len([image for image in read(shown).images if "completions of it" in str(image["alt"])]) == 1
        assert "Layer 1 is the best on held-out images, and gets 81.25% of the test images." in shown
        assert "Predictions by zero-shot" in shown
    assert "are classified rightly by zero-shot" in single


def test_data_that_is_shared_is_shown_once(page: str) -> None:
    assert page.count("light/broken.png") == 1
    assert 'Its data is that of <a href="#tiny-data">tiny</a>' in page


def test_it_lies_where_the_first_ones_page_lay(runs: list[Shown], page: str) -> None:
    url = write_joint_report(runs, COMMAND)
    assert url == f"{runs[0].run.url}/report/index.html"
    assert Path(url).read_text() == page
