from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError
from pipeline.plan import calibration
from pipeline.preflight import plan_config


def config(device: str, workers: int = 1, **changes: Any) -> Config:
    section = {
        "model": {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 4}, "image": {"pixels": 16}, "batch": 16, "micro_batch": 4,
        "duration": "10 steps", "precision": "fp32", "zero": {"stage": 1}, **changes,
    }  # fmt: skip
    return parse_config({
        "name": "t", "storage": "runs", "data": {"samples": 100, "classes": 3}, "pretrain": section,
        "cluster": {"name": "local", "workers": workers, "device": device},
    })  # fmt: skip


def test_a_few_real_steps_correct_this_plan_and_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan, _, _ = plan_config(config("cpu"))
    assert plan is not None and plan.measured is None
    measured = calibration.calibrate(config("cpu"), plan.load, plan.device)
    assert measured.micro_batch > 0 and measured.update > 0 and 0.2 < measured.memory < 5
    later, _, _ = plan_config(config("cpu"))
    assert later is not None and later.measured == measured
    assert later.pace.compute == pytest.approx(4 * measured.micro_batch) and later.peak == round(later.memory.peak * measured.memory)
    shared, _, _ = plan_config(config("cpu", workers=2))
    assert shared is not None and shared.measured is not None and shared.measured.update == pytest.approx(measured.update / 2)
    for other in (config("cpu", micro_batch=8), config("cpu", precision="bf16"), config("h100")):
        found, _, _ = plan_config(other)
        assert found is not None and found.measured is None, "of another kind"
    elsewhere, _, _ = plan_config(config("h100"))
    assert elsewhere is not None
    with pytest.raises(ConfigError, match="--calibrate: this machine has 'cpu', and the plan is for h100"):
        calibration.calibrate(config("h100"), elsewhere.load, elsewhere.device)


def test_a_damaged_file_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    calibration.calibration_file().parent.mkdir(parents=True)
    calibration.calibration_file().write_text("{")
    plan, _, _ = plan_config(config("cpu"))
    assert plan is not None and plan.measured is None
