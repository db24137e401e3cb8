"""DeepSpeed ZeRO behind three verbs: forward, backward, step; and its state as fragments (`state.py`). Its setup is in `library.py`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint.fragments import Fragment
from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError
from pipeline.core.world import World
from pipeline.models import Model
from pipeline.models.blockwise import compile_blocks, recompute_blocks
from pipeline.plan.workload import stage_of
from pipeline.train.heap import keep_memory
from pipeline.train.library import import_deepspeed
from pipeline.train.overlap import OverlappedSum
from pipeline.train.settings import settings
from pipeline.train.state import State
from pipeline.train.statistics import Statistics
from pipeline.train.watch import STEP, beat

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's loss scaler
OWN_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's: each rank has those of its own micro-batches
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """One rank's model under ZeRO. `rounds` micro-batches make a step; calls of all ranks must match."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, config: Pretrain, rounds: int, world: World) -> None:
        self.world, self.dtype, self.stage = world, _DTYPES[config.precision], config.zero.stage
        self.is_plain = self.stage == 0 and self.dtype == torch.float32  # the parameters are whole, and in fp32
        self._norm: torch.Tensor | None = None
        self._clip = config.optimizer.clip
        self.is_left_out = False  # whether the last update was, on all ranks, for a gradient that is not finite
        self._flags: list[torch.Tensor] = []  # whether the loss was finite, of each backward since the last update
        self._last_flags: list[torch.Tensor] = []  # of the last update
        self._sound: dict[int, torch.Tensor] = {}  # which samples were, by number of the backward, where that is known
        self._last_sound: dict[int, torch.Tensor] = {}
        self._scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
        for name in self._scalars:  # DeepSpeed cannot broadcast what has no dimension
            scalar = model.get_parameter(name)
            scalar.data = scalar.data.view(1)
        self._limits = [(parameter, *model.limits[name]) for name, parameter in model.named_parameters() if name in model.limits]
        if world.size % config.zero.hpz:
            raise ConfigError(f"pretrain.zero.hpz: {config.zero.hpz} does not divide the number of workers, which is {world.size}")
        how = settings(config, rounds, world.size, model.parameter_count)
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, self.optimizer, _, _ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=how)
        self._sum: OverlappedSum | None = None
        if self.is_plain and "communication_data_type" not in config.deepspeed:
            # DeepSpeed would copy all gradients to one tensor, and back, once the backward pass is done: alone a tenth of a small step.
            self.engine.enable_backward_allreduce = False
            if world.size > 1:
                self._sum = OverlappedSum(model.parameters(), is_early=world.device.type == "cuda" and not config.recompute)
        if config.compile:
            compile_blocks(model)
        if config.recompute:
            recompute_blocks(model)
        self.state = State(self.engine, stage_of(config), world)
        self._decay = config.average.decay if config.average else None
        self.updates = 0  # that changed the parameters, ever
        if config.average:
            self.state.start_average()
        self.statistics = Statistics(self.state, world)
        # BatchNorm's, as they were after the last update: a forward pass moves them before it is known to be bad.
        self._statistics = [(b, b.clone()) for name, b in model.named_buffers() if name.endswith(OWN_BUFFERS)]
        if self.dtype == torch.float16:  # the guard says when it is enough
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._is_first = True  # of the updates to come: what stays is made before it

    @property
    def module(self) -> nn.Module:
        """The model to call; gathers partitioned parameters where stage 3 keeps them apart."""
        return self.engine

    @property
    def model(self) -> Model:
        """The model itself. What of it is called by another way than `module` finds no parameters at stage 3."""
        return self.engine.module

    @contextlib.contextmanager
    def answering(self, function: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Inside, `module` does what `function`, a method of the model, does. For evaluation; at stage 3 all ranks together."""
        model, gathered = self.engine.module, contextlib.nullcontext()
        if self.stage == 3:
            # Such a method may go past a tower's own `forward`, before which its tokens and positions would be gathered; DeepSpeed would
            # see that and from then on gather them before every step, too.
            inner = [p for each in model.modules() if next(each.children(), None) is not None for p in each.parameters(recurse=False)]
            apart = [p for p in inner if p.ds_status.name == "NOT_AVAILABLE"]
            gathered = import_deepspeed().zero.GatheredParameters(apart, enabled=bool(apart))
        with gathered:
            model.forward = function
            try:
                yield
            finally:
                del model.forward

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def backward(self, loss: torch.Tensor, sound: torch.Tensor | None = None) -> None:
        """Accumulate the gradient of `loss`, which DeepSpeed divides by rounds and averages over the ranks. `sound` (b,): which of the
        samples gave finite numbers, where the loss is one of all together and tells nothing of each."""
        beat(STEP)
        if sound is not None:
            self._sound[len(self._flags)] = sound
        finite = loss.detach().isfinite()
        self._flags.append(finite)
        share = 1.0
        if self._sum is not None:
            share = 1 / self.world.size
            if self.engine.is_gradient_accumulation_boundary():
                self._sum.begin()
        # A loss that is no finite number need not have such a gradient. Now it has: by their sum all ranks know of it, and take no update.
        self.engine.backward(loss * torch.where(finite, share, torch.nan).to(loss.dtype))

    def step(self) -> None:
        """To be called after each backward; every `rounds`th call updates the parameters, and brings back what left its limits."""
        is_update, is_finite = self.engine.is_gradient_accumulation_boundary(), True
        if self._sum is not None and is_update:
            self._sum.finish()
        if self.is_plain and is_update:  # here DeepSpeed keeps no norm, and would take any update
            parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
            for parameter in parameters:
                if parameter.grad is None:  # it decays as under every other stage and world size
                    parameter.grad = torch.zeros_like(parameter)
            self._norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not (is_finite := bool(self._norm.isfinite())):
                self.engine.zero_grad()  # the optimiser passes over what has no gradient
            elif self._clip:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, self._norm)
        before = self.engine.skipped_steps
        self.engine.step()
        if is_update:
            self.is_left_out = not is_finite or self.engine.skipped_steps > before
            self._last_flags, self._flags = self._flags, []
            self._last_sound, self._sound = self._sound, {}
            if self._is_first and not torch.cuda.is_available():
                keep_memory()
            self._is_first = False
            for parameter, low, high in self._limits:
                self._clamp(parameter, low, high)
            for buffer, kept in self._statistics:
                buffer.copy_(kept) if self.is_left_out else kept.copy_(buffer)
            if not self.is_left_out:
                self._average()

    def _average(self) -> None:
        """Polyak averaging; over the first updates a shorter memory, so that where they begin is soon forgotten (as TensorFlow's
        ExponentialMovingAverage with num_updates)."""
        self.updates += 1
        if self._decay is not None:
            self.state.average(min(self._decay, (1 + self.updates) / (10 + self.updates)))

    def turns_not_finite(self) -> list[int]:
        """Those backwards of the last update, from 0, whose loss on this rank was no finite number."""
        return [turn for turn, flag in enumerate(self._last_flags) if not flag]

    def samples_not_finite(self) -> list[tuple[int, int]]:
        """Of the last update, those samples of this rank that are known to have given no finite numbers: backward and place in it."""
        return [(turn, place) for turn, sound in self._last_sound.items() for place, is_sound in enumerate(sound.tolist()) if not is_sound]

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

    @property
    def norm(self) -> torch.Tensor:
        """Of the gradient of the last update, over all parameters and ranks, before clipping: a scalar, which may still be computed; no
        number where the update was left out."""
        norm = self._norm if self.is_plain else self.engine.get_global_grad_norm()
        return torch.as_tensor(torch.nan if norm is None or self.is_left_out else norm)

    def gradient_norm(self) -> float:
        return float(self.norm)

    def fragments(self) -> list[Fragment]:
        """This rank's part of parameters and optimiser, as views; the same names and places each time."""
        return self.state.owned()

    def numbers(self) -> dict[str, Any]:
        """What of the state is neither large nor element-wise; the same on every rank."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None) if self.dtype == torch.float16 else None
        return {
            "optimizer": self.state.scalars,
            "updates": self.updates,
            "scaler": {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)},
            "shapes": {name: [] if name in self._scalars else shape for name, shape in self.state.shapes.items()},
        }

    def restored(self, numbers: dict[str, Any]) -> None:
        """To be called by all ranks after each has written its `fragments`: brings the state to wherever else it is kept."""
        self.state.set_scalars(numbers["optimizer"])
        self.updates = numbers.get("updates", round(max(numbers["optimizer"].values(), default=0)))  # the first versions did not count
        self.state.spread()
        for buffer, kept in self._statistics:
            kept.copy_(buffer)
        if self.dtype == torch.float16:
            for key, value in numbers["scaler"].items():
                setattr(self.engine.optimizer.loss_scaler, key, value)

    def copies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What every rank has a copy of between two steps, by name: the parameters, at stage 3 those that are small enough to stay whole;
        and buffers, but for BatchNorm's, which each has of its own micro-batches."""
        for name, parameter in self.engine.module.named_parameters():
            if self.stage < 3 or parameter.data.numel() == parameter.ds_numel:
                yield name, parameter.data
        yield from ((n, b) for n, b in self.engine.module.named_buffers() if not n.endswith(OWN_BUFFERS))

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
        for buffer, kept in self._statistics:
            kept.copy_(buffer)
