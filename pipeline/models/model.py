"""What every model can do beside its `forward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Model(nn.Module):
    """Base of all families. B batch, D the width of `features`.

    `unpenalised` are the ends of names of parameters that weight decay leaves alone, beside those of one dimension; `limits` names scalar
    parameters that are kept within bounds after each step; `head_names` those of the classifier, which fine-tuning makes anew.
    """

    options: Any  # the family's
    unpenalised: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    head_names: ClassVar[frozenset[str]] = frozenset({"head.weight", "head.bias"})

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What a linear probe sees of each image, (B, D): of normalised images, or of an iGPT's tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for `batch` samples, on the device and in the type of the parameters; their values mean nothing."""
        raise NotImplementedError

    def activations(self) -> float:
        """Numbers that a training step keeps of one sample, about; attention weights are not kept."""
        raise NotImplementedError

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state of the same family, made for other pixels or classes, as this model can load it.

        Positions are interpolated; a head of another shape is left zero. What else differs is left as it is, for the caller to see.
        """
        return dict(state)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Fp32Buffers(nn.Module):
    """Buffers that stay in fp32 where the rest of a module goes to 16 bits."""

    fp32: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.fp32}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, value.to(now.device, torch.float32))
        return self


def flops(model: Model) -> float:
    """Floating-point operations of one forward pass of one sample, two a multiply-add; norms and activations left out, causal
    attention counted as a full square, which is how MFU is commonly stated. By torch's own counter, on the meta device."""
    return _count(model, backward=False)


def training_flops(model: Model) -> float:
    """Of one forward and backward pass of one sample, counted likewise: three forward passes, less the gradients by what the model is
    given, pixels, which nobody works out: a third of the first layer (0.9% of ViT-B/32, 0.2% of B/16). Recomputation is not counted."""
    return _count(model, backward=True)


def _count(model: Model, backward: bool) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        twin = type(model)(model.options)
    twin.eval().requires_grad_(backward)
    # With attention's plain formula: of a fused kernel the counter takes the backward pass to compute the logits again.
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        given = twin(*twin.example(1))
        if backward:
            ends = [each for each in (given if isinstance(given, tuple) else (given,)) if each is not None and each.requires_grad]
            torch.autograd.backward(ends, [torch.empty_like(each) for each in ends])
    return float(counter.get_total_flops())
