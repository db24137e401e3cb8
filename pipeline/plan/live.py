"""What one forward and backward pass keep in memory, counted on tensors without numbers: the model itself runs, on the meta device.

Every storage is counted from when an operation makes it until nothing holds it. Attention is taken to be one of the fused kernels, which
keep queries, keys, values, their mix and a number a row, and never the N x N matrix. Gradients of parameters are counted apart.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pipeline.models import Model
from pipeline.models.blocks import Attention, Block, Mlp
from pipeline.models.blockwise import blocks_of
from pipeline.models.caption import CrossAttention, DecoderBlock

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (Attention, "attention"),
    (CrossAttention, "attention"),
    (Mlp, "mlp"),
    (nn.LayerNorm, "norms"),
    (nn.RMSNorm, "norms"),
    (nn.BatchNorm2d, "norms"),
    (Block, "residual"),
    (DecoderBlock, "residual"),
    (nn.Conv2d, "convolutions"),
)
BACKWARD, REST = "backward", "embeddings and heads"


@dataclass(frozen=True)
class Live:
    """Bytes of one micro-batch. `kept` is what the forward pass leaves for the backward pass, by the kind of layer; `most` is the most
    that there is at any time, without the gradients of parameters, and `most_with_gradients` with them, where they begin at nothing.
    `forward` is the most during the forward pass alone."""

    kept: dict[str, int] = field(default_factory=dict)
    forward: int = 0
    most: int = 0
    most_with_gradients: int = 0

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())


class _Fused(torch.autograd.Function):
    """The shapes of a fused attention kernel: it keeps q, k, v, the result and the logarithm of each row's sum (arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, _, _, bias = ctx.saved_tensors
        bias_grad = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), bias_grad


class _FusedNorm(torch.autograd.Function):
    """The shapes of a fused RMS norm: it keeps what it sees and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, gain, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, gain, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(gain)


class _Kernels(TorchFunctionMode):
    """Puts those in place of what on the meta device would be plain formulas."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.norms = norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3], kwargs.get("attn_mask"))
        if func is F.rms_norm and self.norms:
            return _FusedNorm.apply(args[0], kwargs["weight"] if "weight" in kwargs else args[2])
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live, by the kind of layer that made them."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.kind = REST
        self.live: Counter[str] = Counter()
        self.gradients = 0
        self.forward = self.most = self.most_with_gradients = 0
        self._known = known  # of parameters and inputs, which others count
        self._held: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, torch.Tensor):
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held or key in self._known:
            return
        self._held[key] = self.kind, storage.nbytes()
        self.live[self.kind] += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.measure()

    def _free(self, key: int) -> None:
        if key in self._held:
            kind, size = self._held.pop(key)
            self.live[kind] -= size

    def take_gradient(self, gradient: torch.Tensor) -> None:
        """A gradient of a parameter is finished, and from now on none of ours."""
        self._free(gradient.untyped_storage()._cdata)
        self.gradients += gradient.numel() * gradient.element_size()
        self.measure()

    def measure(self) -> None:
        now = self.live.total()
        self.most = max(self.most, now)
        self.most_with_gradients = max(self.most_with_gradients, now + self.gradients)


def count_live(
    model: Model, dtype: torch.dtype, batch: int, loss: Callable[[Any], torch.Tensor], recompute: bool = False, on_cpu: bool = False
) -> Live:
    """Of one training pass of `batch` samples through `model`, which is changed and must be of no use any more; `loss` makes a scalar of
    what it gives. `recompute`: blocks keep what they see alone, and run again for the backward pass."""
    model = model.to("meta", dtype).train()
    kernels = partial(_Kernels, norms=not (on_cpu and dtype.itemsize < 4))  # a CPU has none of RMS norm in 16 bits (models/fused.py)
    if recompute:
        for block in blocks_of(model):
            block.forward = partial(checkpoint, _with(kernels, block.forward), use_reentrant=False, preserve_rng_state=False)
    inputs = model.example(batch)
    counter = _Counter({tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *inputs)})
    with _kinds(model, counter), _taken(model, counter), kernels(), counter:
        given = model(*inputs)
        counter.kind = "logits"
        value = loss(given)
        del given
        kept, forward = Counter(counter.live), counter.most
        counter.kind = BACKWARD
        value.backward()
    return Live({kind: size for kind, size in kept.items() if size}, forward, counter.most, counter.most_with_gradients)


def _with(mode: Callable[[], TorchFunctionMode], forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`forward` under a mode of its own: in the backward pass those from outside do not hold."""

    def inner(*args: Any, **kwargs: Any) -> torch.Tensor:
        with mode():
            return forward(*args, **kwargs)

    return inner


@contextmanager
def _kinds(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """While a module of a kind runs, what it makes is of that kind; in the backward pass all is BACKWARD."""
    handles, stack = [], list[str]()

    def enter(kind: str, *_: object) -> None:
        stack.append(counter.kind)
        if counter.kind != BACKWARD:
            counter.kind = kind

    def leave(*_: object) -> None:
        counter.kind = stack.pop()

    for module in model.modules():
        kind = next((name for cls, name in _KINDS if isinstance(module, cls)), None)
        if kind:
            handles.append(module.register_forward_pre_hook(partial(enter, kind)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _taken(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """Each parameter's gradient is taken away as it is finished."""

    def take(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            counter.take_gradient(parameter.grad)
            parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
