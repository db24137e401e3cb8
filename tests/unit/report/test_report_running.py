from __future__ import annotations

import re
from pathlib import Path

from pipeline.checkpoint import ModelCard
from pipeline.config import Config
from pipeline.core.storage import Storage
from pipeline.report.page import build_report
from pipeline.report.running import draw_running
from tests.checkpoints import commit_model

SHARES = {"input": 0.1, "compute": 0.6, "communication": 0.15, "checkpoint": 0.05, "validation": 0.1, "other": 0.0}


def row(step: int, seconds: float = 2.0) -> dict[str, float]:
    times = {f"time/{kind}": share * seconds for kind, share in SHARES.items()}
    return {"step": step, "train/loss": 1.0, "time/step": seconds, **times, "memory/host_peak": (2 + step / 1000) * 2**30}


def parameters(step: int, ratio: float) -> dict[str, float]:
    values = {
        f"layers/blocks.{n}.weight/{what}": ratio * (n + 1) for n in range(30) for what in ("update_ratio", "grad_norm", "weight_norm")
    }
    return {**row(step), **values}


def test_where_the_time_goes_is_weighed_by_steps() -> None:
    odd = row(11) | {"time/compute": 0.0, "time/input": 1.4}  # one step
    plot = draw_running([row(10), odd])[0]
    assert plot.title == "Where the time goes: 54.5% compute"
    assert "input 15.5%" in plot.caption and "communication 15.0%" in plot.caption and "other" not in plot.caption
    assert all(f"var(--{name})" in plot.svg for name in ("accent", "second", "right", "wrong", "muted")) and "#0" not in plot.svg


def test_pictures_of_long_runs_stay_small() -> None:
    """Half of the rows tell of each parameter."""
    history = [parameters(s, 10 ** (-1 - s / 3000)) if s % 20 else row(s) for s in range(10, 30001, 10)]
    time, memory, *maps = draw_running(history)
    assert [plot.title for plot in maps] == [
        "Update-to-weight ratio by parameter",
        "Gradient norm by parameter",
        "Weight norm by parameter",
    ]
    assert "At the end: host 32 GiB." in memory.caption
    assert "of 30 parameters, at" in maps[0].caption
    assert all(len(plot.svg) < 150_000 for plot in (time, memory, *maps))
    names = re.findall(r"blocks\.\d+\.weight", maps[0].svg)
    assert len(set(names)) == 16 and {"blocks.0.weight", "blocks.29.weight"} <= set(names)


def test_what_is_not_recorded_is_not_drawn() -> None:
    assert draw_running([]) == [] and draw_running([{"step": 1, "train/loss": 2.0}]) == []
    zeros = {"step": 1, "layers/head.weight/weight_norm": 0.0, "layers/head.weight/grad_norm": 2.0}
    [only] = draw_running([zeros])
    assert only.title == "Gradient norm by parameter"


def test_the_page_shows_them(config: Config, tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    options = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "pixels": 8, "classes": 2}
    card = ModelCard("vit", options, "classify", ["a", "b"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "hash", "tiny", 5)
    commit_model(run, card, card.make().state_dict(), history=[row(1), parameters(5, 1e-3)])
    page = build_report(run, config, None, "again")
    for title in ("Where the time goes: 60.0% compute", "Peak memory of a worker", "Update-to-weight ratio by parameter"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://mlflow:5000', "", page.split("<svg", 1)[1].split("</svg>", 1)[0])
