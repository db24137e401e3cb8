from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Config
from pipeline.core.storage import Storage
from pipeline.evaluate import read_results
from pipeline.report import build_report, write_report
from pipeline.report.page import _percent
from pipeline.report.pictures import choose_right, choose_wrong
from pipeline.report.view import _facts

COMMAND = "python launch/submit.py configs/tiny.yaml"


class Reader(HTMLParser):
    """Collects what a page asks for from elsewhere, and its pictures; checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.foreign: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        values = dict(attrs)
        self.images += [values] if tag == "img" else []
        links = [values.get(name) for name in ("src", "href", "xlink:href", "action") if values.get(name)]
        self.foreign += [str(link) for link in links if not str(link).startswith(("data:", "#"))]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "img", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_what_the_guard_did_is_among_the_facts(config: Config) -> None:
    rows = [{"step": 3, "samples": 24, "guard/skipped_steps": 4, "guard/rewinds": 0}, {"step": 9, "samples": 72, "train/loss": 1.0}]
    facts = dict(_facts(config, None, None, rows))
    assert facts["updates left out"] == "4" and "went back" not in facts and facts["steps"] == "9"


@pytest.fixture(scope="module")
def page(run: Storage, config: Config, dataset_url: str) -> str:
    return build_report(run, config, dataset_url, COMMAND)


def test_page_stands_alone(page: str) -> None:
    reader = read(page)
    assert reader.foreign == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page


def test_names_of_the_data_are_text_not_markup(page: str) -> None:
    assert "<b>dark" not in page
    assert "&lt;b&gt;dark" in page


def test_pictures_are_the_samples_and_are_described(page: str, run: Storage) -> None:
    images = read(page).images
    assert len(images) >= 12
    assert all(image["alt"] for image in images)
    sizes = [Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2]))).size for image in images]
    predicted = [image.get("class") == "tiny" for image in images]
    assert sizes == [(8, 8) if is_predicted else (152, 152) for is_predicted in predicted]  # samples are enlarged by whole factors
    assert any(predicted) and not all(predicted)


def test_scores_have_intervals(page: str, run: Storage) -> None:
    for result in read_results(run):
        assert f"{100 * result.value:.2f}%" in page
        assert f"{_percent(result.low)} to {_percent(result.high)}" in page
    assert "5-shot" in page
    assert "chance 50.0%" in page


def test_data_time_config_and_command_are_there(page: str) -> None:
    assert "corrupt" in page
    assert "light/broken.png" in page
    assert re.search(r"1 file\s+that is no image was ignored", page)
    assert "12.0 s in all" in page
    assert COMMAND in page
    assert "duration: 5 steps" in page
    assert "me:secret" not in page


def test_goodput_is_told_in_words_a_bar_and_a_table(page: str) -> None:
    section = page[page.index('id="goodput"') : page.index('id="time"')]
    assert "43.3% of 2 min 00 s was training that counts; 2 jobs, 1 failure; 0.90 EUR, of which 0.41 EUR went into it." in section
    widths = dict(re.findall(r'<i class="([a-z-]+)" style="width:([0-9.]+)%">', section))
    assert sum(map(float, widths.values())) == pytest.approx(100)
    seconds = {"productive": 52.0, "input-wait": 7.0, "save": 6.0, "lost": 20.0, "restart": 25.0, "idle": 10.0}
    assert {kind: float(width) * 1.2 for kind, width in widths.items()} == pytest.approx(seconds)
    rows = {
        kind: re.findall(r'right">([^<]*)</td>', row) for kind, row in re.findall(r'<th scope="row"><i class="([a-z-]+)"></i>(.*)', section)
    }
    assert rows["lost"] == ["20.0 s", "16.7%", "0.20 EUR"] and rows["idle"] == ["10.0 s", "8.3%", "0.00 EUR"]
    assert list(rows) == list(seconds)
    assert "Its 2 jobs" in section and "3 to 5" in section and "2026-05-28 20:26 UTC" in section
    assert "&lt;i&gt;peer&lt;/i&gt; gone" in section, "text, not markup"


def test_ledgers_of_a_run_that_was_there_before_are_not_shown(run: Storage, config: Config, dataset_url: str, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "tiny")
    record = {"id": "another", "owner": "ada", "config": config.model_dump(mode="json", by_alias=True)}
    (tmp_path / "tiny" / "run.yaml").write_text(json.dumps(record))
    assert 'id="goodput"' not in build_report(Storage(str(tmp_path / "tiny")), config, dataset_url, COMMAND)


def test_curves_take_the_colours_of_the_page(page: str) -> None:
    assert page.count('<svg role="img"') == 4  # loss, accuracy, learning rate, gradient norm
    assert "var(--accent)" in page
    assert "#040404" not in page


def test_the_same_run_gives_the_same_page(page: str, run: Storage, config: Config, dataset_url: str) -> None:
    assert build_report(run, config, dataset_url, COMMAND) == page


def test_parts_without_data_are_left_out(config: Config, tmp_path: Path) -> None:
    bare = config.model_copy(update={"pretrain": None, "evaluate": None})
    page = build_report(Storage(str(tmp_path)), bare, None, COMMAND)
    read(page)
    for heading in ("scores", "predictions", "curves", "data", "goodput", "time"):
        assert f'id="{heading}"' not in page
    assert COMMAND in page


def test_a_dataset_that_has_gone_is_left_out(run: Storage, config: Config, tmp_path: Path) -> None:
    page = build_report(run, config, str(tmp_path / "gone"), COMMAND)
    assert 'id="data"' not in page
    assert 'id="scores"' in page


def test_write_report_publishes_one_file(run: Storage, config: Config, dataset_url: str, page: str) -> None:
    url = write_report(run, config, dataset_url, COMMAND)
    assert url == f"{run.url}/report/index.html"
    assert Path(url).read_text() == page
    assert run.names("report") == ["index.html"]


def test_wrong_ones_are_the_surest_first_and_right_ones_of_each_class() -> None:
    kept = {"label": [0, 0, 1, 1, 0, 2], "predicted": [0, 1, 1, 0, 0, 2], "probability": [0.9, 0.6, 0.8, 0.7, 0.5, 1.0]}
    assert choose_wrong(kept, 9) == [3, 1]
    assert choose_right(kept, 4) == [0, 2, 5, 4]


def test_percent_tells_nearly_all_from_all() -> None:
    assert [_percent(v) for v in (1.0, 0.9, 0.99961, 0.99996)] == ["100.0%", "90.0%", "99.96%", "99.996%"]


def test_a_store_without_conditions_is_told_of(run: Storage, config: Config, dataset_url: str, page: str) -> None:
    sentence = "takes no conditions: two jobs of this run could collide"
    weaker = config.model_copy(update={"storage": config.storage.model_copy(update={"conditional": False})})
    assert sentence not in page and sentence in build_report(run, weaker, dataset_url, COMMAND)
