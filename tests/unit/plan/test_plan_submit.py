"""`launch/submit.py CONFIG --plan --json` in a process of its own, as others call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.submit import main
from pipeline.config import parse_config
from pipeline.preflight import plan_config

ROOT = Path(__file__).parents[3]
ENGINES = ("deepspeed", "ray", "mlflow")
NEEDED = {"parameters", "flops_per_sample", "memory_bytes_per_worker", "checkpoint_bytes", "steps", "samples", "hours", "gpu_hours", "cost"}
# Runs the command, and then tells on standard error which engines it imported.
RUN = f"""
import sys
from launch.submit import main
try:
    main(sys.argv[1:])
finally:
    print("engines", [name for name in {ENGINES} if name in sys.modules], file=sys.stderr)
"""


def submit(*words: str) -> tuple[int, str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, Any], str]:
    code, out, err = submit("configs/pretrain/vit-h14-jft.yaml", "--plan", "--json", "cluster.gpus=8", "cluster.device=h100")
    assert code == 0, err
    return json.loads(out), err


def test_standard_output_is_one_object_with_what_others_rely_on(planned: tuple[dict[str, Any], str]) -> None:
    facts, _ = planned
    assert set(facts) >= NEEDED
    memory = facts["memory_bytes_per_worker"]
    items = {"parameters", "gradients", "optimizer", "averages", "activations", "logits", "buffers", "temporaries"}
    assert items <= set(memory) and memory["peak"] == max(memory["moments"].values())
    assert memory["peak"] == sum(memory["at_peak"].values()) < sum(memory[item] for item in [*items, "runtime"])
    assert facts["parameters"] == 655_835_251 and facts["samples"] == facts["steps"] * 4096
    assert facts["gpu_hours"] == pytest.approx(8 * facts["hours"]) and facts["cost"] == pytest.approx(3.0 * facts["gpu_hours"])
    assert facts["checkpoint_bytes"] == 12 * facts["parameters"]
    assert facts["hours"] == pytest.approx(facts["steps"] * facts["step_seconds"]["step"] / 3600)


def test_a_plan_imports_no_engine(planned: tuple[dict[str, Any], str]) -> None:
    assert "engines []" in planned[1]


TOWER = {"width": 32, "depth": 1, "heads": 2}


def test_calibrate_measures_both_passes_of_a_loss_of_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = {
        "name": "t", "storage": str(tmp_path), "data": {"samples": 100}, "cluster": {"name": "local", "workers": 1, "device": "cpu"},
        "pretrain": {
            "model": {"name": "clip", "embed": 16, "vision": {"kind": "vit", "patch": 4, **TOWER}, "text": {"kind": "transformer", **TOWER}},
            "objective": "contrastive", "image": {"pixels": 16}, "text": {"size": 520, "length": 8}, "batch": 24, "micro_batch": 8,
            "duration": "10 steps", "precision": "fp32",
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for _ in range(3):  # steps of milliseconds: where the machine stalls in one of them, it is measured again
        code, out, err = submit(str(tmp_path / "config.yaml"), "--plan", "--calibrate", "--json")
        assert code == 0, err
        facts, [kept] = json.loads(out), json.loads((tmp_path / "tessera" / "calibration.json").read_text()).values()
        assert facts["calibrated"] and "engines []" in err, "the steps are another process's"
        back, forward = kept["micro_batch_seconds"], kept["first_pass_seconds"]
        if 0 < forward < back:
            break
    assert 0 < forward < back, "a pass without a graph, and one with it and back"
    assert facts["step_seconds"]["compute"] == pytest.approx(3 * (back + forward), rel=1e-3)
    single = parse_config({**config, "pretrain": {**config["pretrain"], "batch": 8}})  # type: ignore[dict-item]
    plan, _, _ = plan_config(single)
    assert plan is not None and plan.pace.compute == pytest.approx(back), "one micro-batch passes once"
    alone = CliRunner().invoke(main, [str(tmp_path / "config.yaml"), "--calibrate"])
    assert alone.exit_code == 2 and "--calibrate goes with --plan" in alone.output


def test_what_does_not_fit_is_said_with_the_smallest_change() -> None:
    code, out, err = submit(
        "configs/pretrain/vit-h14-jft.yaml", "--plan", "cluster.gpus=8", "cluster.device=h100", "pretrain.micro_batch=512"
    )
    assert code == 0, err
    assert "does not fit: " in out and "smallest change that fits: pretrain.micro_batch=128" in out
