"""What the tests of the Vision Transformers share: random parameters, transformers' models with them, a comparison with gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.func import functional_call

Function = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]

_NAMES = [
    (r"^(cls_token|patch_embed|pos_embed|dist_token)", r"vit.embeddings.\1"),
    (r"patch_embed\.proj", "patch_embeddings.projection"),
    (r"\.pos_embed$", ".position_embeddings"),
    (r"dist_token", "distillation_token"),
    (r"^blocks", "vit.layers"),
    (r"^norm\.", "vit.layernorm."),
    (r"^decoder_blocks", "decoder_layers"),
    (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"attn\.proj", "attention.o_proj"),
    (r"^head_dist", "distillation_classifier"),
    (r"^head", "classifier"),
]


def randomise(model: nn.Module, seed: int = 3) -> nn.Module:
    """In fp64 with every parameter random, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            scale = 1.0 if parameter.ndim < 2 or "token" in name or "pos_embed" in name else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model.eval()


def images(batch: int = 3, pixels: int = 8, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def in_transformers(state: Mapping[str, torch.Tensor], prefix: str = "vit") -> dict[str, torch.Tensor]:
    """Our names and layout to those of transformers' ViT, DeiT (`prefix` deit) or ViTMAE; gradients pass through."""
    out = {}
    for name, tensor in state.items():
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        if prefix == "deit":
            name = re.sub(r"^vit\.", "deit.", re.sub(r"^classifier", "cls_classifier", name))
        parts = zip("qkv", tensor.chunk(3), strict=True) if "attn.qkv" in name else [("", tensor)]
        out |= {name.replace("attn.qkv", f"attention.{letter}_proj"): part for letter, part in parts}
    return out


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert b.abs().max() > 0
    return float((a - b).abs().max() / b.abs().max())


# 2^-8 is one rounding of bf16. Each branch adds a few to the residual stream, which rounds its sum itself. They are independent, so their
# squares add up, and what they fall on grows with the depth as well: a few blocks stay within two (0.4 to 1.7 over five seeds).
BF16 = 2 * 2**-8


def misfit(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, of all numbers together."""
    a, b = a.detach().double(), b.detach()
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def largest_error(model: nn.Module, reference: Function, x: torch.Tensor, call: Function | None = None) -> float:
    """Of the values, and of the gradients to the image and to each parameter of `model`, which `reference` is given by name.

    `call(parameters, x)` is what is compared of the model, by default its forward.
    """
    results = []
    for function in (call or (lambda parameters, x: functional_call(model, dict(parameters), (x,))), reference):
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        image = x.clone().requires_grad_()
        y = function(parameters, image)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [image, *parameters.values()])])
    return max(error(a, b) for a, b in zip(*results, strict=True))
