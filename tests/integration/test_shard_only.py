"""A run that only makes a dataset: its page, its statistics and what MLflow has of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import parse_config
from pipeline.core.storage import Storage
from pipeline.shards.manifest import read_manifest
from pipeline.shards.statistics import find_statistics
from pipeline.stages import run_stages


@pytest.mark.usefixtures("cluster")
def test_a_run_that_only_shards_is_told_in_full(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    source = tmp_path / "images"
    source.mkdir()
    for n in range(40):
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (24, 16 + n, 3), np.uint8)).save(sink, "PNG")
        (source / f"{n:02d}.png").write_bytes(sink.getvalue() if n % 8 else sink.getvalue()[:70])
        (source / f"{n:02d}.txt").write_text(f"noise, number {n}")
    (source / "page.jpg").write_bytes(b"<!DOCTYPE html>")
    config = parse_config(
        {"name": "only", "storage": str(tmp_path / "runs"), "cluster": "local", "shard": {"source": {"url": str(source)}}}
    )

    outcome = run_stages(config, command="python launch/submit.py only.yaml")
    shards = Storage(str(tmp_path / "runs" / "only" / "shards"))
    manifest = read_manifest(shards)
    assert (manifest.read, manifest.written, manifest.dropped) == (41, 35, {"corrupt": 5, "not-an-image": 1})
    statistics = find_statistics(shards, manifest)
    assert statistics is not None and statistics.samples == manifest.written
    assert outcome.page is not None
    page = Path(outcome.page).read_text()
    assert "41 read = 35 written + 6 dropped." in page and "Length of a caption" in page and "noise, number " in page

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == config.tracking.experiment]
    [stage] = [run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["mlflow.runName"] == "only/shard"]
    metrics = stage.data.metrics
    wanted = {"read": 41, "written": 35, "dropped": 6, "dropped/corrupt": 5, "dropped/not-an-image": 1, "bytes": manifest.bytes}
    assert {name: metrics[f"shard/{name}"] for name in wanted} == wanted
    assert metrics["shard/success_rate"] == pytest.approx(35 / 41)
    assert metrics["shard/mb_per_s"] > 0 and metrics["shard/images_per_s"] > 0
    [artifact] = client.list_artifacts(stage.info.run_id, "shard")
    assert json.loads(Path(client.download_artifacts(stage.info.run_id, artifact.path)).read_text())["dataset"] == manifest.hash

    before = shards.read("statistics.json")
    run_stages(config, command="python launch/submit.py only.yaml")
    assert shards.read("statistics.json") == before, "once is enough"
