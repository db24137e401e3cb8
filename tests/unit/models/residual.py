"""What the tests of the ResNets share: random parameters, and a comparison of values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

torch.set_num_threads(1)  # threads cost such small tensors more than they give

Function = Callable[[torch.Tensor], torch.Tensor]
SHAPES = [(2, 33, 33, 1.0), (3, 50, 39, 1.0), (2, 50, 35, 1e-3)]  # batch, height, width, scale of the pixels; odd and even when halved


def randomise(model: nn.Module) -> None:
    """Every parameter and statistic, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)


def images(batch: int, height: int, width: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


def largest_error(
    model: Function, reference: Function, x: torch.Tensor, parameters: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> float:
    """Of the values, of the gradients to the image, and to each of `parameters`, which are `others` to the reference."""
    results = []
    for function, known in ((model, parameters), (reference, others)):
        image = x.clone().requires_grad_()
        y = function(image)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [image, *known.values()])])
    assert list(parameters) == list(others)
    return max(error(a, b) for a, b in zip(*results, strict=True))


def saved_numbers(model: nn.Module, example: Callable[[int], torch.Tensor]) -> int:
    """Numbers that autograd keeps of one sample: what it keeps of two, less what it keeps of one."""
    counts = []
    for batch in (1, 2):
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(example(batch))
        counts.append(sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values()))
        del y
    return counts[1] - counts[0]
