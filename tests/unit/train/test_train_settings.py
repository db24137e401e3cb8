"""From a config to DeepSpeed's own, and what of it is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError
from pipeline.preflight import check_config
from pipeline.train.library import check_deepspeed
from pipeline.train.settings import settings

MODEL = {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}


def config(cluster: dict[str, Any] | None = None, **pretrain: Any) -> Config:
    values = {"model": MODEL, "image": {"pixels": 8}, "batch": 24, "micro_batch": 4, "duration": "5 steps", **pretrain}
    return parse_config({"name": "a", "storage": "runs", "data": "data", "pretrain": values, "cluster": cluster or {}})


def deepspeed(**pretrain: Any) -> dict[str, Any]:
    p = config(**pretrain).pretrain
    assert p is not None
    return settings(p, 3, 2)


def test_batches() -> None:
    found = deepspeed()
    assert [found[k] for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")] == [4, 3, 24]


@pytest.mark.parametrize(("precision", "stage", "runs"), [("fp32", 0, 0), ("bf16", 0, 1), ("bf16", 2, 2), ("fp16", 3, 3)])
def test_stages(precision: str, stage: int, runs: int) -> None:
    found = deepspeed(precision=precision, zero={"stage": stage})
    assert found["zero_optimization"]["stage"] == runs
    assert (found["bf16"]["enabled"], found["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")


def test_a_small_model_has_a_small_bucket() -> None:
    p = config().pretrain
    assert p is not None
    assert [settings(p, 3, 2, n)["zero_optimization"]["reduce_bucket_size"] for n in (1000, 10**9)] == [1000, 500_000_000]


def test_where_states_lie() -> None:
    found = deepspeed(zero={"stage": 3, "offload": "all", "hpz": 8})["zero_optimization"]
    assert found["offload_optimizer"]["device"] == found["offload_param"]["device"] == "cpu" and found["zero_hpz_partition_size"] == 8
    assert "offload_param" not in deepspeed(zero={"stage": 2, "offload": "optimizer"})["zero_optimization"]


def test_raw_keys_are_merged_section_by_section() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 1000}, "bf16": {"immediate_grad_update": True}, "steps_per_print": 7}
    found = deepspeed(zero={"stage": 2}, deepspeed=raw)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000} and found["steps_per_print"] == 7
    assert found["bf16"] == {"enabled": True, "immediate_grad_update": True}
    merged = config(zero={"stage": 2}, deepspeed=raw)
    check_config(merged)
    assert merged.pretrain is not None
    check_deepspeed(merged.pretrain)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train_batch_size": 7}, r"pretrain\.deepspeed\.train_batch_size: is said by pretrain\.batch"),
        ({"optimizer": {"type": "Adam"}}, r"pretrain\.deepspeed\.optimizer: is said by pretrain\.optimizer"),
        ({"zero_optimization": {"stage": 2}}, r"pretrain\.deepspeed\.zero_optimization\.stage: is said by pretrain\.zero\.stage"),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"compute_grad_norm: is said by pretrain\.guard, which goes by the norm"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, r"pretrain\.deepspeed: 'data_types' is not known"),
        ({"bf16": {"enabled": True}}, r"pretrain\.deepspeed\.bf16\.enabled: is said by pretrain\.precision"),
        ({"comms_loger": {}}, r"pretrain\.deepspeed: 'comms_loger' is not known, did you mean 'comms_logger'"),
        (
            {"zero_optimization": {"reduce_buckt_size": 1}},
            r"pretrain\.deepspeed\.zero_optimization: 'reduce_buckt_size'.*reduce_bucket_size",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"pretrain\.deepspeed\.zero_optimization\.reduce_bucket_size: -1 is not taken"),
        (
            {"zero_optimization": {"zenflow": {"topk_raio": 0.1}}},
            r"pretrain\.deepspeed\.zero_optimization\.zenflow: 'topk_raio'.*'topk_ratio'",
        ),
        ({"comms_logger": {"enabld": True}}, r"pretrain\.deepspeed\.comms_logger: 'enabld' is not known, did you mean 'enabled'"),
        ({"flops_profiler": {"module_dept": 1}}, r"pretrain\.deepspeed\.flops_profiler: 'module_dept'.*did you mean 'module_depth'"),
        ({"bf16": True}, r"pretrain\.deepspeed\.bf16: True is no section of keys and values"),
        ({"fp16": {"loss_scale": "much"}}, r"pretrain\.deepspeed\.fp16\.loss_scale: 'much' is not taken by DeepSpeed"),
    ],
)
def test_wrong_raw_keys_are_refused_before_anything_starts(raw: dict[str, Any], message: str) -> None:
    p = config().pretrain
    assert p is not None
    with pytest.raises(ConfigError, match=message):
        check_config(config(deepspeed=raw))
        check_deepspeed(p.model_copy(update={"deepspeed": raw}))


def test_nothing_raw_asks_for_no_engine() -> None:
    p = config().pretrain
    assert p is not None
    check_deepspeed(p)


@pytest.mark.parametrize(
    ("pretrain", "message"),
    [
        ({"zero": {"stage": 0, "offload": "optimizer"}}, r"offload: 'optimizer' needs a stage of 1, 2 or 3"),
        ({"zero": {"stage": 2, "offload": "all"}}, r"offload: all: needs stage 3, which shares the parameters; this is stage 2"),
        ({"zero": {"stage": 1, "hpz": 2}}, r"hpz: 2: needs stage 3"),
        ({"zero": {"stage": "auto", "hpz": 2}}, r"hpz: 2: needs stage 3, .* this is stage auto"),
        ({"optimizer": {"name": "adafacto"}}, r"pretrain\.optimizer\.name: 'adafacto'.*adafactor"),
        ({"average": {"decay": 1.0}}, r"pretrain\.average\.decay"),
        ({"model": {"name": "resnet", "depths": [1, 1, 1, 1]}, "image": {"pixels": 32}, "recompute": True},
         r"pretrain\.recompute: is done to each Transformer block, and resnet has none"),
        ({"model": {"name": "resnet", "depths": [1, 1, 1, 1]}, "image": {"pixels": 32}, "optimizer": {"layer_decay": 0.8}},
         r"pretrain\.optimizer\.layer_decay: goes by Transformer blocks, resnet has convolutions"),
        ({"schedule": {"name": "cosine", "cooldown": "3 steps"}}, r"cooldown: is of the schedule rsqrt alone, and this is cosine"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_are_refused(pretrain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**pretrain))


@pytest.mark.parametrize(
    ("cluster", "has"),
    [
        ({"workers": 6}, "6 workers"),
        ({"gpus": 9}, "9 workers"),
        ({"workers": 4, "gpus": 8, "min_gpus": 2}, "2 to 4 workers"),
        ({"gpus": 8, "min_gpus": 4}, "4 to 8 workers"),
        ({"workers": 8, "min_workers": 4}, "4 to 8 workers"),
        ({"min_workers": 4}, "4 workers or more"),
        ({}, "as many workers as there is room for"),
    ],
)
def test_hierarchical_partitioning_is_refused_where_some_group_could_not_have_it(cluster: dict[str, Any], has: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^pretrain\.zero\.hpz: 4 must divide every number .*, and cluster allows {has} \(allowed: 1, or"
    ):
        check_config(config(cluster, zero={"stage": 3, "hpz": 4}))
    check_config(config(cluster, zero={"stage": 3}))


@pytest.mark.parametrize("cluster", [{"workers": 8}, {"gpus": 4}, {"workers": 4, "min_workers": 4}, {"gpus": 12, "min_gpus": 12}])
def test_a_group_of_one_size_that_it_divides_can(cluster: dict[str, Any]) -> None:
    check_config(config(cluster, zero={"stage": 3, "hpz": 4}))
