"""What a config means to DeepSpeed: its JSON, as a dictionary. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError, choose
from pipeline.plan.setup import REDUCE_BUCKET
from pipeline.plan.workload import stage_of

WHERE = "pretrain.deepspeed"
# What the config says elsewhere, or Tessera does itself.
_OURS = {
    "train_batch_size": "pretrain.batch",
    "train_micro_batch_size_per_gpu": "pretrain.micro_batch",
    "gradient_accumulation_steps": "pretrain.batch",
    "gradient_clipping": "pretrain.optimizer.clip",
    "optimizer": "pretrain.optimizer",
    "scheduler": "pretrain.schedule",
    "bf16.enabled": "pretrain.precision",
    "fp16.enabled": "pretrain.precision",
    "zero_optimization.compute_grad_norm": "pretrain.guard, which goes by the norm",
    "zero_optimization.stage": "pretrain.zero.stage",
    "zero_optimization.offload_optimizer": "pretrain.zero.offload",
    "zero_optimization.offload_param": "pretrain.zero.offload",
    "zero_optimization.zero_hpz_partition_size": "pretrain.zero.hpz",
}
# What DeepSpeed reads at the top beside that, and a training of ours can have.
SECTIONS = ("zero_optimization", "bf16", "fp16", "comms_logger", "flops_profiler")
_RAW = frozenset({
    *SECTIONS, "communication_data_type", "disable_allgather", "disable_python_gc", "dump_state", "wall_clock_breakdown",
    "memory_breakdown", "steps_per_print", "zero_force_ds_cpu_optimizer",
})  # fmt: skip


def settings(config: Pretrain, rounds: int, world_size: int, parameters: int = REDUCE_BUCKET) -> dict[str, Any]:
    """DeepSpeed's configuration of a model of so many `parameters`; `rounds` micro-batches of each of `world_size` ranks make a step."""
    zero = config.zero
    host = {"device": "cpu", "pin_memory": True}
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": rounds,
        "train_batch_size": config.micro_batch * rounds * world_size,
        "zero_optimization": {
            "stage": stage_of(config),
            "reduce_bucket_size": min(REDUCE_BUCKET, parameters),  # it is made anew each step, however little of it is filled
            **({"offload_optimizer": host} if zero.offload != "none" else {}),
            **({"offload_param": host} if zero.offload == "all" else {}),
            **({"zero_hpz_partition_size": zero.hpz} if zero.hpz > 1 else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # At stage 0 the engine clips itself: DeepSpeed would take an update that is not finite.
        "gradient_clipping": (config.optimizer.clip if stage_of(config) else None) or 0.0,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    return _merge(ours, config.deepspeed)


def check_raw(raw: Mapping[str, Any]) -> None:
    """Raises ConfigError for a raw key that is ours to say, or that DeepSpeed does not have at the top; or is a section there and not
    here."""
    for key, value in raw.items():
        if key in SECTIONS and not isinstance(value, Mapping):
            raise ConfigError(f"{WHERE}.{key}: {value!r} is no section of keys and values, which it must be")
        for name in (key, *(f"{key}.{inner}" for inner in value)) if isinstance(value, Mapping) else (key,):
            if name in _OURS:
                raise ConfigError(f"{WHERE}.{name}: is said by {_OURS[name]}")
        choose(WHERE, key, _RAW)


def _merge(ours: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` over `ours`, section by section."""
    both = {key: _merge(ours[key], raw[key]) for key in ours.keys() & raw.keys() if isinstance(ours[key], Mapping)}
    return {**ours, **raw, **both}
