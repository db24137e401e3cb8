"""`launch/submit.py CONFIG --plan --json` in a process of its own, as others call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_what_does_not_fit_is_said_with_the_smallest_change() -> None:
    code, out, err = submit(
        "configs/pretrain/vit-h14-jft.yaml", "--plan", "cluster.gpus=8", "cluster.device=h100", "pretrain.micro_batch=512"
    )
    assert code == 0, err
    assert "does not fit: " in out and "smallest change that fits: pretrain.micro_batch=128" in out
