"""DeepSpeed ZeRO behind three verbs: forward, backward, step; and its state as fragments (`state.py`). The only user of deepspeed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint.fragments import Fragment
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError
from pipeline.core.world import World
from pipeline.models import Model
from pipeline.train.state import State

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's loss scaler
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _import_deepspeed() -> Any:
    """DeepSpeed, without what it says while it is imported, without the shared-memory operator that it would otherwise compile for half a
    minute at the first start (it serves only `inference_all_reduce`), and without MLflow, which its autotuner would import: two seconds of
    every rank's start."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), _hidden("mlflow"):
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """In this block, this thread cannot import the module `name`, unless it was imported before. Other threads can."""
    thread = threading.get_ident()

    class Hidden(MetaPathFinder):
        def find_spec(self, wanted: str, *_: Any) -> None:
            if wanted == name and threading.get_ident() == thread:
                raise ModuleNotFoundError(f"{name} is hidden here", name=name)

    finder = Hidden()
    # Other threads may be going through the list: they keep theirs.
    sys.meta_path = [finder, *sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path = [each for each in sys.meta_path if each is not finder]


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
        self.skipped = 0  # updates in a row that DeepSpeed left out, on all ranks, for a gradient that was not finite
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
            "zero_optimization": {
                "stage": stage,
                **({"offload_optimizer": {"device": "cpu"}} if config.zero.offload == "optimizer" else {}),
            },
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
        if self.is_plain and world.size == 1:  # here DeepSpeed would copy all gradients to one tensor, and back: a tenth of a small step
            self.engine.enable_backward_allreduce = False
        self.state = State(self.engine, stage, world)

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
        if self.is_plain and is_update:
            for p in self.engine.module.parameters():
                if p.grad is None and p.requires_grad:  # it decays as under every other stage and world size
                    p.grad = torch.zeros_like(p)
            # Here DeepSpeed keeps no norm.
            self._norm = nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
        before = self.engine.skipped_steps
        self.engine.step()
        if is_update:
            self.skipped = self.skipped + 1 if self.engine.skipped_steps > before else 0
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

    def fragments(self) -> list[Fragment]:
        """This rank's part of parameters and optimiser, as views; the same names and places each time."""
        return self.state.owned()

    def numbers(self) -> dict[str, Any]:
        """What of the state is neither large nor element-wise; the same on every rank."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None) if self.dtype == torch.float16 else None
        return {
            "optimizer": self.state.scalars,
            "scaler": {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)},
            "shapes": {name: [] if name in self._scalars else shape for name, shape in self.state.shapes.items()},
        }

    def restored(self, numbers: dict[str, Any]) -> None:
        """To be called by all ranks after each has written its `fragments`: brings the state to wherever else it is kept."""
        self.state.set_scalars(numbers["optimizer"])
        self.state.spread()
        for key, value in numbers["scaler"].items():
            setattr(self.engine.optimizer.loss_scaler, key, value)

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
