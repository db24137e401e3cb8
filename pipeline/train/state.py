"""The state of training as fragments by parameter name, at every ZeRO stage: what a rank holds of each parameter in fp32 and of the
optimiser's tensors, as views of DeepSpeed's own memory.

    stage 0        every rank holds all of it; each saves a share, and a resume reads a share, which the others then get from it
    stages 1, 2    the parameters of a group lie end to end in a flat tensor, of which rank r holds the r-th part
    stage 3        rank r holds the numbers [r n, (r + 1) n) of each flattened parameter, n = ceil(numel / ranks)

What is not element-wise is named apart: the optimiser's count of steps in `scalars`; a factored second moment as fragments of its own,
which every rank has whole and saves a share of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint.fragments import AVERAGE, BUFFER, WEIGHT, Fragment, own_share
from pipeline.core.world import World
from pipeline.train.layout import Layout, Slice, Whole
from pipeline.train.optimizers import Extra, ShardedOptimizer


@dataclass(frozen=True)
class Part:
    """What this rank holds of the parameter `name`: its `numel` numbers from `start` on are those of `flat`, a tensor of the engine in
    fp32, from `offset` on. The optimiser keeps its own tensors by `flat`."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int


class State:
    """The training state of one rank, in place. `engine` is DeepSpeed's; `stage` the one it runs at, 0 meaning whole parameters in fp32."""

    def __init__(self, engine: Any, stage: int, world: World) -> None:
        self.engine, self.stage, self.world = engine, stage, world
        self.names: dict[Any, str] = {  # a parameter under ZeRO-3 carries ds_ attributes
            parameter: name for name, parameter in engine.module.named_parameters()
        }
        self.base: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        self.parts = list({0: self._parts_0, 1: self._parts_12, 2: self._parts_12, 3: self._parts_3}[stage]())
        self._make_optimizer_state()
        if isinstance(self.base, ShardedOptimizer):
            self.base.bind(self.layouts(), is_replicated=self.stage == 0 and self.world.size > 1)
        self.averages: dict[torch.Tensor, torch.Tensor] = {}  # of each flat tensor, where one is kept
        self._shares: list[Fragment] = []
        self._where: list[int] = []  # the memory of each tensor that `_shares` are views of

    # Where everything lies

    def _parts_0(self) -> Iterator[Part]:
        for parameter, name in self.names.items():
            yield Part(name, 0, parameter.numel(), parameter, 0)

    def _parts_12(self) -> Iterator[Part]:
        zero = self.engine.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # some of it is this rank's
                    here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                    yield Part(self.names[parameter], here.start, here.numel, flat, there.start)

    def _parts_3(self) -> Iterator[Part]:
        zero = self.engine.optimizer
        for parameter, name in self.names.items():
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = self.world.rank * numel
            own = min(numel, parameter.ds_numel - start)  # the last ranks' parts may be padding
            if own > 0:
                yield Part(name, start, own, zero.fp32_partitioned_groups_flat[group], offset)

    def layouts(self) -> dict[torch.Tensor, Layout]:
        """How each flat tensor is made of parameters."""
        places: dict[torch.Tensor, list[Part]] = {}
        for part in self.parts:
            places.setdefault(part.flat, []).append(part)
        found = {}
        for flat, members in self._members():
            wholes = [Whole(self.names[p], tuple(getattr(p, "ds_shape", p.shape))) for p in members]
            index = {whole.name: i for i, whole in enumerate(wholes)}
            slices = [Slice(index[part.name], part.start, part.numel, part.offset) for part in places.get(flat, [])]
            found[flat] = Layout(wholes, slices, is_shared=self.stage > 0)
        return found

    def _members(self) -> Iterator[tuple[torch.Tensor, list[nn.Parameter]]]:
        """Each flat tensor, and the parameters that all ranks' together are made of, in an order that all ranks have."""
        zero = self.engine.optimizer
        if self.stage == 0:
            yield from ((parameter, [parameter]) for parameter in self.names)
        elif self.stage < 3:
            yield from zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        else:
            groups: dict[int, list[nn.Parameter]] = {}
            for parameter in self.names:
                groups.setdefault(zero.grad_position[zero.get_param_id(parameter)][0], []).append(parameter)
            yield from ((flat, groups.get(i, [])) for i, flat in enumerate(zero.fp32_partitioned_groups_flat))

    def start_average(self) -> None:
        """Keep an average of the parameters too, which begins as they are."""
        self.averages = {flat: flat.detach().clone() for flat in self._flats()}

    @torch.no_grad()
    def average(self, decay: float) -> None:
        for flat, average in self.averages.items():
            average.lerp_(flat.detach(), 1 - decay)

    def _make_optimizer_state(self) -> None:
        """Make what the optimiser makes at its first step, where it is not there: all zeros, as it would begin."""
        for flat in self._flats():
            if flat.numel() and not self.base.state.get(flat):
                self.base.state[flat] = _new_state(self.base, self._group_of(flat), flat)

    def _flats(self) -> list[torch.Tensor]:
        """The tensors by which the optimiser keeps its own, also those of which this rank has padding alone."""
        zero = self.engine.optimizer
        if self.stage == 0:
            return list(self.names)
        return list(zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat)

    def _group_of(self, flat: torch.Tensor) -> dict[str, Any]:
        for group in self.base.param_groups:
            if any(each is flat for each in group["params"]):
                return group
        return self.base.param_groups[0]  # at stage 3 DeepSpeed shows the optimiser a flat tensor only while it steps it

    # Fragments

    def held(self) -> list[Fragment]:
        """All that this rank holds of parameters and the optimiser's element-wise tensors."""
        found = []
        for part in self.parts:
            tensors = {WEIGHT: part.flat, **self._elementwise(part.flat)}
            if part.flat in self.averages:
                tensors[AVERAGE] = self.averages[part.flat]
            for key, tensor in tensors.items():
                numbers = tensor.detach().view(-1)[part.offset : part.offset + part.numel]
                found.append(Fragment(key, part.name, part.start, numbers))
        return found + [Fragment(e.key, e.name, e.start, e.tensor) for e in self._extras() if e.start is not None]

    def replicated(self) -> list[Fragment]:
        """What every rank holds whole."""
        if self.stage == 0:
            return self.held() + [Fragment(e.key, e.name, 0, e.tensor) for e in self._extras() if e.start is None]
        return [Fragment(e.key, e.name, 0, e.tensor) for e in self._extras() if e.start is None]

    def _extras(self) -> list[Extra]:
        return [each for flat in self._flats() for each in self.base.extras(flat)] if isinstance(self.base, ShardedOptimizer) else []

    def owned(self) -> list[Fragment]:
        """What this rank saves, and reads again: what it holds, or its share where all hold the same; rank 0 the buffers as well.

        They are looked up again only where a tensor has moved: of hundreds that takes a tenth of the time that copying them does.
        """
        where = [each.data_ptr() for flat in self._flats() for each in (flat, *self.base.state[flat].values()) if torch.is_tensor(each)]
        if where != self._where:
            self._shares, self._where = self._look_up(), where
        return self._shares + (self._buffers() if self.world.is_main else [])

    def _look_up(self) -> list[Fragment]:
        shares = (own_share(f.key, f.name, f.tensor, self.world.rank, self.world.size) for f in self.replicated())
        return (self.held() if self.stage > 0 else []) + [share for share in shares if share is not None]

    def _buffers(self) -> list[Fragment]:
        persistent = _persistent_names(self.engine.module)
        return [Fragment(BUFFER, name, 0, b.detach().view(-1)) for name, b in self.engine.module.named_buffers() if name in persistent]

    def _elementwise(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.base.state[flat].items() if torch.is_tensor(value) and value.shape == flat.shape}

    @property
    def scalars(self) -> dict[str, float]:
        """The optimiser's numbers that are not element-wise; the same on all ranks and for all parameters."""
        found: dict[str, float] = {}
        for flat in self._flats():
            for key, value in self.base.state[flat].items():
                if torch.is_tensor(value) and value.ndim == 0:
                    found[key] = max(found.get(key, 0.0), float(value))  # a parameter that never had a gradient was never stepped
        return found

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of every parameter and buffer that a state holds."""
        module, persistent = self.engine.module, _persistent_names(self.engine.module)
        shapes = {name: list(p.ds_shape if self.stage == 3 else p.shape) for p, name in self.names.items()}
        return {**shapes, **{name: list(b.shape) for name, b in module.named_buffers() if name in persistent}}

    # After the fragments were written

    def set_scalars(self, scalars: dict[str, float]) -> None:
        for flat in self._flats():
            for key, value in scalars.items():
                if torch.is_tensor(self.base.state[flat].get(key)):
                    self.base.state[flat][key].fill_(value)

    def spread(self) -> None:
        """Bring what was written into the fragments to where else it is kept: to other ranks, and into 16 bits. All ranks together."""
        zero = self.engine.optimizer
        self._exchange_shares()
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            if zero.persistent_parameters:  # kept whole on every rank: give up the old ones
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        if self.world.size > 1:
            for buffer in self.engine.module.buffers():
                dist.broadcast(buffer, src=0)

    def _exchange_shares(self) -> None:
        """Each rank has read its share of what all hold."""
        if self.world.size == 1:
            return
        for f in self.replicated():
            for rank in range(self.world.size):
                share = own_share(f.key, f.name, f.tensor, rank, self.world.size)
                if share is not None:
                    on = share.tensor.cuda() if torch.cuda.is_available() else share.tensor  # what is offloaded is in host memory
                    dist.broadcast(on, src=rank)
                    share.tensor.copy_(on)


def _persistent_names(module: nn.Module) -> set[str]:
    """Of the buffers that belong to a state."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules()
        for name in each._buffers
        if name not in each._non_persistent_buffers_set
    }


def _new_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `optimizer` keeps for `flat`, all zeros; a step of one of its kind on a single number tells which tensors there are."""
    probe = torch.zeros(1, device=flat.device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    options = {key: value for key, value in group.items() if key != "params"}
    twin = type(optimizer)([{**options, "params": [probe]}], lr=options["lr"])  # type: ignore[call-arg]
    twin.step()
    tensors = {key: value for key, value in twin.state[probe].items() if torch.is_tensor(value)}
    like = {key: flat if value.shape == probe.shape else value for key, value in tensors.items()}
    return {
        key: torch.zeros_like(each, dtype=tensors[key].dtype, memory_format=torch.contiguous_format).detach() for key, each in like.items()
    }
