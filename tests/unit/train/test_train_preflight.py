"""What torchrun's ranks refuse before they start, as `launch/submit.py` does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.core.errors import ConfigError
from pipeline.core.world import World
from pipeline.train.worker import checked

SECTION = {
    "model": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}, "image": {"pixels": 8}, "batch": 4, "micro_batch": 4,
    "duration": "3 steps", "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    values = {"name": "t", "storage": str(tmp_path), "cluster": "local", "data": str(tmp_path / "data"), "pretrain": SECTION}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.optimizer.name=adamwx", "pretrain.optimizer.name: 'adamwx' is not known"),
        ("pretrain.schedule.name=cosin", "pretrain.schedule.name: 'cosin' is not known"),
        ("pretrain.schedule.warmup=4 steps", "pretrain.schedule: warmup"),
        ("pretrain.deepspeed={nonsense: 1}", "pretrain.deepspeed: 'nonsense'"),
        (
            "pretrain.deepspeed={zero_optimization: {stage: 3}}",
            "pretrain.deepspeed.zero_optimization.stage: is said by pretrain.zero.stage",
        ),
        ("pretrain.deepspeed={zero_optimization: {bucket: 3}}", "pretrain.deepspeed.zero_optimization: 'bucket'"),
    ],
)
def test_refused(config: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        checked(load_config(config, [override]), World())


def test_what_is_right_is_let_through(config: str) -> None:
    given = load_config(config, ["pretrain.deepspeed={zero_optimization: {overlap_comm: true}}"])
    assert checked(given, World()) == given
