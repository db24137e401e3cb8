"""The page of a run that only made a dataset: images with captions, some of them dropped, scores, deny-lists."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import Config, parse_config
from pipeline.core.storage import Storage
from pipeline.report import build_joint_report, build_report
from pipeline.report.dataset import _in_turn, describe_dataset
from pipeline.report.distribution import draw_distribution, ratio_text
from pipeline.report.view import Shown
from pipeline.shards.job import make_dataset
from pipeline.shards.manifest import Manifest, read_manifest, read_shards
from pipeline.shards.statistics import Quantity, Statistics, keep_statistics
from tests.unit.report.test_report_page import COMMAND, read

EVIL = "<script>alert('x')</script> a temple & <b>more</b>"


def png(width: int, height: int, seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """30 images of several shapes, most with a caption; one is cut, two are no images, one has a damaged caption."""
    source = tmp_path_factory.mktemp("captions") / "images"
    source.mkdir()
    for n in range(30):
        (source / f"{n:02d}.png").write_bytes(png(20 + 4 * n, 40, n))
        if n % 3:
            (source / f"{n:02d}.txt").write_text(EVIL if n % 3 == 1 else f"number {n}")
    (source / "cut.png").write_bytes(png(9, 9, 0)[:80])
    for name in ("page.jpg", "<i>.jpg"):
        (source / name).write_bytes(b"<!DOCTYPE html>")
    (source / "letters.png").write_bytes(png(30, 30, 1))
    (source / "letters.txt").write_bytes(b"\xff\xfe\x00")
    return parse_config(
        {
            "name": "captions",
            "storage": str(source.parent / "runs"),
            "cluster": "local",
            "shard": {"source": {"url": str(source)}, "size": "40 KiB"},
        }
    )


@pytest.fixture(scope="module")
def shards(config: Config, cluster: None) -> Storage:
    directory = Storage(config.storage.url) / config.name / "shards"
    manifest, _ = make_dataset(config, directory)
    assert len(read_shards(directory, "train")) > 1
    for number, record in enumerate(read_shards(directory, "train")):
        table = pq.read_table(io.BytesIO(directory.read(record.index_name)))
        scores = pa.array(np.linspace(0.1, 0.4, len(table)) + number / 100)
        sink = io.BytesIO()
        pq.write_table(table.append_column("similarity <b>", scores), sink)
        directory.write(record.index_name, sink.getvalue())
    for name, count in (("duplicates", 3), ("takedown", 1)):
        sink = io.BytesIO()
        keys = [
            row
            for r in read_shards(directory, "train")
            for row in pq.read_table(io.BytesIO(directory.read(r.index_name)))["key"].to_pylist()
        ]
        pq.write_table(pa.table({"key": sorted(keys)[:count]}), sink)
        directory.write(f"deny/{name}.parquet", sink.getvalue())
    keep_statistics(directory, manifest)
    return directory


@pytest.fixture(scope="module")
def page(config: Config, shards: Storage) -> str:
    return build_report(Storage(config.storage.url) / config.name, config, shards.url, COMMAND)


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table that follows a heading, by the row's own."""
    table = page[page.index(f">{heading}<") :].partition("<table")[2].partition("</table>")[0]
    found = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', table, re.DOTALL)
    return {name: [cell.strip() for cell in re.findall(r"<td[^>]*>([^<]*)</td>", cells)] for name, cells in found}


def test_a_run_that_only_shards_has_a_page_that_stands_alone(page: str) -> None:
    reader = read(page)
    assert reader.foreign == [] and not re.search(r"@import|url\((?!#)", page)
    assert 'id="data"' in page and 'id="curves"' not in page and 'id="scores"' not in page


def test_captions_and_names_are_text_not_markup(page: str) -> None:
    assert "<script" not in page and "<i>.jpg" not in page and "similarity <b>" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; a temple &amp; &lt;b&gt;more&lt;/b&gt;" in page
    assert "&lt;i&gt;.jpg" in page and "similarity &lt;b&gt;" in page


def test_the_ledger_is_told_by_reason(page: str, shards: Storage) -> None:
    manifest = read_manifest(shards)
    assert (manifest.read, manifest.written) == (34, 30)
    assert "34 read = 30 written + 4 dropped." in page
    rows = rows_of(page, "Dropped")
    assert {reason: int(cells[0]) for reason, cells in rows.items()} == manifest.dropped == {"not-an-image": 2, "corrupt": 1, "bad-txt": 1}
    assert next(iter(rows)) == "not-an-image", "the most frequent comes first"
    assert all(sample["reason"] in page for sample in manifest.dropped_samples) and "cut.png" in page


def test_every_reason_is_exemplified() -> None:
    samples = [{"file": f"{n:03d}", "reason": "corrupt", "detail": ""} for n in range(50)]
    samples += [{"file": name, "reason": reason, "detail": ""} for name, reason in (("x", "empty"), ("y", "bad-txt"), ("z", "empty"))]
    named = _in_turn(samples, ["corrupt", "empty", "bad-txt", "named-nowhere"])
    assert [s["reason"] for s in named] == ["corrupt"] * 9 + ["empty"] * 2 + ["bad-txt"]
    assert [s["file"] for s in named] == [f"{n:03d}" for n in range(9)] + ["x", "z", "y"]


def test_deny_lists_are_counted(page: str) -> None:
    assert {name: cells[0] for name, cells in rows_of(page, "On deny-lists").items()} == {"duplicates": "3", "takedown": "1"}


def test_histograms_and_their_numbers_are_shown(page: str) -> None:
    titles = re.findall(r"<figcaption>([^<]+)</figcaption><svg", page)
    assert titles == ["Width and height", "Shape", "Size of an image file", "Length of a caption", "similarity &lt;b&gt;"]
    rows = rows_of(page, "Distribution")
    assert rows["width, pixels"][0] == "20" and rows["width, pixels"][5] == "136" and rows["height, pixels"][:6] == ["40"] * 6
    assert rows["caption, bytes"][0] == "8" and rows["caption, bytes"][6] == "10", "ten have none"
    assert rows["width : height"] == ["1 : 2", *rows["width : height"][1:5], "3.4 : 1", ""]
    assert "Of all 30 images" in page


def test_the_contact_sheet_has_pictures_and_captions(page: str) -> None:
    sheet = page[page.index("Samples of train") : page.index(">Written<")]
    assert sheet.count("<img") == 24 and sheet.count("<figcaption>") == 24
    assert "number " in sheet and "data:image/" in sheet


def test_the_page_is_the_same_each_time(page: str, config: Config, shards: Storage) -> None:
    assert build_report(Storage(config.storage.url) / config.name, config, shards.url, COMMAND) == page


def test_several_runs_fit_in_one_page(config: Config, shards: Storage) -> None:
    shown = Shown(Storage(config.storage.url) / config.name, config, shards.url)
    joint = build_joint_report([shown, shown._replace(config=config.model_copy(update={"name": "again"}))], COMMAND)
    read(joint)
    assert joint.count("34 read = 30 written") == 1, "data that both share is shown once"


def test_without_statistics_the_rest_is_there(config: Config, shards: Storage) -> None:
    kept = shards.read("statistics.json")
    shards.remove("statistics.json")
    try:
        bare = build_report(Storage(config.storage.url) / config.name, config, shards.url, COMMAND)
    finally:
        shards.write("statistics.json", kept)
    read(bare)
    assert ">Distribution<" not in bare and "34 read = 30 written" in bare


def test_a_damaged_sample_is_marked(config: Config, shards: Storage, tmp_path: Path) -> None:
    copy = Storage(str(tmp_path))
    for name in shards.names():
        if name not in ("deny", ".plan"):
            copy.write(name, shards.read(name))
    name = read_shards(copy, "train")[0].name
    data = bytearray(copy.read(name))
    data[2000:2100] = bytes(100)
    copy.write(name, bytes(data))
    found = describe_dataset(copy.url, "train", None)
    assert [s.mark for s in found.samples if not s.source] == ["checksum"]
    read(build_report(Storage(config.storage.url) / config.name, config, copy.url, COMMAND))


def quantity(edges: list[float], counts: list[int], **other: Any) -> Quantity:
    return Quantity(edges, counts, other.get("missing", 0), edges[0], edges[0], edges[-1])


def drawn(**changed: Any) -> dict[str, str]:
    """Figures of 100 images by title: their texts, joined."""
    one = {"edges": [256.0, 304.4], "counts": [100]}
    measures = {name: quantity(**one) for name in ("width", "height", "image_bytes")}
    measures |= {"aspect_ratio": quantity([0.957, 1.044], [100]), "caption_bytes": Quantity([], [], 100, None, None, None)}
    statistics = Statistics(
        "", "", 1, 1, 100, measures | changed.pop("measures", {}), changed.pop("columns", {}), changed.pop("labels", []), 0
    )
    plots = draw_distribution(statistics, changed.pop("classes", []))
    return {p.title: "|".join(e.text or "" for e in ET.fromstring(p.svg).iter() if e.tag.endswith("text")) + "#" + p.caption for p in plots}


def test_one_value_alone_still_has_an_axis() -> None:
    figures = drawn()
    assert set(figures) == {"Width and height", "Shape", "Size of an image file"}, "nobody has a caption, a label or a score"
    assert "256|512|side, pixels" in figures["Width and height"] and "width and height" in figures["Width and height"]
    assert "1:1" in figures["Shape"] and "256 B" in figures["Size of an image file"]


def test_a_few_far_ones_do_not_press_the_others_together() -> None:
    far = quantity([2.0**-15, 2.0**-14.8, 0.957, 1.044, 2.0**14, 2.0**14.1], [2, 0, 996, 0, 2])
    shape = drawn(measures={"aspect_ratio": far})["Shape"]
    assert "4:3" in shape and "16384" not in shape and shape.endswith("4 more extreme ones lie beyond the picture.")
    wide = quantity([2.0**-15, 2.0**-14.8, 0.957, 1.044, 2.0**14, 2.0**14.1], [200, 0, 600, 0, 200])
    assert {"1:1", "1:16"} & set(drawn(measures={"aspect_ratio": wide})["Shape"].split("|"))


def test_few_classes_are_named_and_many_are_ranked() -> None:
    few = drawn(labels=[3, 9, 0], classes=["<b>$x^2$", "a dog whose name is far too long to stand here", "none"])["Images of a class"]
    assert few.startswith("a dog whose name is fa..|<b>$x^2$|none|") or "a dog whose name is fa..|<b>$x^2$|none" in few
    assert "9 (a dog whose name is far too long to stand here) to 0 (none), median 3" in few
    many = drawn(labels=list(range(1, 101)), classes=[str(n) for n in range(100)])["Images of a class"]
    assert "classes, the largest first" in many and "100 (99) to 1 (0), median 50" in many


def test_scores_are_drawn_in_few_bars_whatever_their_size() -> None:
    for scale in (1e-9, 1.0, 1e12):
        edges = [scale * n for n in range(257)]
        figures = drawn(columns={"score": quantity(edges, [1] * 256)})
        assert "images" in figures["score"] and f"{edges[0]:.3g} to {edges[-1]:.3g}" in figures["score"]


def test_shapes_are_spelt_as_ratios() -> None:
    assert [ratio_text(r) for r in (1, 16 / 9, 0.5, 1 / 1500)] == ["1 : 1", "1.78 : 1", "1 : 2", "1 : 1,500"]


def test_of_many_shards_the_page_says_how_many_were_looked_at(config: Config, shards: Storage) -> None:
    manifest: Manifest = read_manifest(shards)
    kept = keep_statistics(shards, manifest)
    shards.write("statistics.json", json.dumps(asdict(replace(kept, shards=1_000_000, read=4096))).encode())
    try:
        page = build_report(Storage(config.storage.url) / config.name, config, shards.url, COMMAND)
    finally:
        shards.write("statistics.json", json.dumps(asdict(kept)).encode())
    assert "the 30 images of 4,096 shards, evenly spread over the 1,000,000 there are" in page
