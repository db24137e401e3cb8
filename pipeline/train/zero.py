"""DeepSpeed ZeRO behind five verbs: forward, backward, step, save, load. The only user of deepspeed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.schema import Pretrain
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.world import World
from pipeline.models import Model

_TAG = "engine"  # DeepSpeed's name for the folder of one checkpoint
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _import_deepspeed() -> Any:
    """DeepSpeed, without what it says while it is imported, and without the shared-memory operator that it would
    otherwise compile for half a minute at the first start (it serves only `inference_all_reduce`)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_group(world: World) -> None:
    """Join the process group of all ranks: the one that Ray Train made, or one of our own under torchrun or alone."""
    deepspeed = _import_deepspeed()
    # DeepSpeed calls collectives by names that torch 2.13 has begun to replace.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.cuda.is_available():
        torch.cuda.set_device(world.device)
    if not dist.is_initialized() and world.size == 1:
        # Alone: a store in memory needs no port, which a second run on this machine could hold.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def check_precision(precision: str) -> None:
    """Raises ConfigError for a precision that this machine's device cannot train in."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("pretrain.precision: 'fp16' needs a GPU (allowed on a CPU: bf16, fp32)")


class Engine:
    """One rank's model under ZeRO. `rounds` micro-batches make a step; calls of all ranks must match."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, config: Pretrain, rounds: int, world: World) -> None:
        self.world, self.dtype, self.stage = world, _DTYPES[config.precision], config.zero.stage
        self.is_plain = self.stage == 0 and self.dtype == torch.float32  # the parameters are whole, and in fp32
        self._norm: torch.Tensor | None = None
        self._scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
        for name in self._scalars:  # DeepSpeed cannot broadcast what has no dimension
            scalar = model.get_parameter(name)
            scalar.data = scalar.data.view(1)
        self._limits = [(parameter, *model.limits[name]) for name, parameter in model.named_parameters() if name in model.limits]
        # In 16 bits DeepSpeed's stage 0 takes a step of its own before the first (it decays weights and counts in Adam's
        # bias correction), and does not give out fp32 weights. Stage 1 sends as many bytes and does neither.
        stage = config.zero.stage if self.dtype == torch.float32 else max(1, config.zero.stage)
        settings = {
            "train_micro_batch_size_per_gpu": config.micro_batch,
            "gradient_accumulation_steps": rounds,
            "train_batch_size": config.micro_batch * rounds * world.size,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": config.optimizer.clip or 0.0,
            "bf16": {"enabled": config.precision == "bf16"},
            "fp16": {"enabled": config.precision == "fp16"},
            "steps_per_print": 10**12,
            "wall_clock_breakdown": False,
        }
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, self.optimizer, _, _ = _import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)

    @property
    def module(self) -> nn.Module:
        """The model to call; gathers partitioned parameters where stage 3 keeps them apart."""
        return self.engine

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, which DeepSpeed divides by rounds and averages over the ranks."""
        self.engine.backward(loss)

    def step(self) -> None:
        """To be called after each backward; every `rounds`th call updates the parameters, and brings back what left its limits."""
        is_update = self.engine.is_gradient_accumulation_boundary()
        if self.is_plain and is_update:  # here DeepSpeed keeps no norm
            self._norm = nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
        self.engine.step()
        if is_update:
            for parameter, low, high in self._limits:
                self._clamp(parameter, low, high)

    def _clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """In all the forms that ZeRO keeps: the parameter or this rank's part of it, and the fp32 values behind that."""
        with torch.no_grad():
            parameter.data.clamp_(low, high)  # nothing where stage 3 holds no whole one
            if self.stage == 3:
                from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

                parameter.ds_tensor.data.clamp_(low, high)  # type: ignore[attr-defined]
                safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))
            elif getattr(parameter, "_hp_mapping", None) is not None:  # this rank keeps it
                parameter._hp_mapping.get_hp_fragment().clamp_(low, high)  # type: ignore[attr-defined]

    def gradient_norm(self) -> float:
        """Of the last update, over all parameters and ranks, before clipping."""
        norm = self._norm if self.is_plain else self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save(self, directory: Path) -> None:
        """Write this rank's part of the training state, and nothing else, below `directory`."""
        (directory / _TAG).mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            self.engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        for script in directory.glob("*.py"):  # DeepSpeed adds its recovery scripts; the weights are saved in fp32 anyway
            script.unlink()

    def load(self, directory: Path) -> None:
        """Take up a state that the same number of ranks saved at the same stage.

        Raises:
            CheckpointError: DeepSpeed found nothing that it could use.
        """
        with contextlib.redirect_stdout(sys.stderr):
            path, _ = self.engine.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise CheckpointError(f"checkpoint {directory}: DeepSpeed found no training state in it")

    def agree_on_buffers(self, has_samples: bool) -> None:
        """Average what each rank keeps for itself beside parameters: BatchNorm's running statistics, of its own micro-batches. A rank
        that gets fillers alone has none."""
        if self.world.size == 1:
            return
        for name, buffer in self.engine.module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                sums = torch.cat([buffer.float().flatten(), torch.ones(1, device=buffer.device)]) * has_samples
                dist.all_reduce(sums)
                buffer.copy_((sums[:-1] / sums[-1]).view(buffer.shape))

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters in fp32 on the CPU, gathered from their partitions, and the buffers that a state holds; empty on every rank
        but the first."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: dict[str, torch.Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            # Under ZeRO the parameter itself is a 16-bit copy or a part: the whole fp32 value is gathered from all ranks.
            value = parameter if self.is_plain else safe_get_full_fp32_param(parameter)
            if self.world.is_main:
                shape = parameter.ds_shape if self.stage == 3 else parameter.shape
                full[name] = value.detach().float().cpu().clone().view(() if name in self._scalars else shape).contiguous()
        if self.world.is_main:
            kept = self.engine.module.state_dict()
            for name, buffer in self.engine.module.named_buffers():
                if name in kept:
                    full[name] = (buffer.float() if buffer.is_floating_point() else buffer).cpu().clone().contiguous()
        return full
