"""The weights of one Vision Transformer as another can load them: other pixels or classes, or another objective before."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from pipeline.models.positions import Convention, resize_axis, resize_positions

_HEADS = ("head", "head_dist")
# What only another objective has: MAE's decoder, masked patch prediction, DeiT's token and head, a representation layer.
_OBJECTIVES = ("mask_token", "mask_head.", "dist_token", "head_dist.", "pre_logits.")


def adapt_vit(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, side: int, tokens: int, convention: Convention
) -> dict[str, torch.Tensor]:
    """`state` with the names and shapes of `wanted`, the state of a fresh ViT with `tokens` before side x side patches.

    Accepts a ViT with or without head, class token, distillation and masked prediction; an MAE, whose decoder is dropped and whose
    fixed positions become learned ones; and the image tower of a CLIP, whose projection is not a classifier. Heads that do not fit
    are zero, a token that is missing is a fresh one, and so is a norm that stands elsewhere. What else differs is left as it is.
    """
    new_head = False
    if any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
        new_head = True
    mae = any(name.startswith("decoder_") for name in state)
    fitted = {name: t for name, t in state.items() if not name.startswith("decoder_") and not (mae and name == "mask_token")}
    # The classifier was trained on what the representation layer or another token's features gave it: without them it is worth nothing.
    new_head |= any(name.startswith("pre_logits.") for name in fitted) and "pre_logits.weight" not in wanted
    fitted = {name: t for name, t in fitted.items() if name in wanted or not name.startswith(_OBJECTIVES)}

    if "pos_embed" in fitted:
        if "pos_embed" in wanted:
            fitted["pos_embed"] = _fit_positions(fitted["pos_embed"], side, tokens, convention)
        elif mae:
            del fitted["pos_embed"]  # the same fixed ones, which are not saved
    for name in ("pos_embed_x", "pos_embed_y"):
        if name in fitted and name in wanted:
            fitted[name] = resize_axis(fitted[name], side, convention)
    for token in ("cls_token", "dist_token"):
        if token in wanted:
            fitted.setdefault(token, wanted[token])
        else:
            fitted.pop(token, None)
    for here, there in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{here}.weight" in wanted and f"{there}.weight" not in wanted and f"{here}.weight" not in fitted:
            for part in ("weight", "bias"):
                if fitted.pop(f"{there}.{part}", None) is not None:
                    fitted[f"{here}.{part}"] = wanted[f"{here}.{part}"]
    for head in _HEADS:
        for name in (f"{head}.weight", f"{head}.bias"):
            if name not in wanted:
                fitted.pop(name, None)
            elif new_head or name not in fitted or fitted[name].shape != wanted[name].shape:
                fitted[name] = torch.zeros_like(wanted[name])
    return fitted


def _fit_positions(positions: torch.Tensor, side: int, tokens: int, convention: Convention) -> torch.Tensor:
    """Another grid; a token that had no position, or was not there, gets zeros."""
    rows = positions.shape[1]
    old = rows - math.isqrt(rows) ** 2
    if old > 2:
        return positions
    missing = max(0, tokens - old)
    kept = [positions[:, : min(old, tokens)], positions.new_zeros(positions.shape[0], missing, positions.shape[2])]
    return resize_positions(torch.cat([*kept, positions[:, old:]], dim=1), side, convention)
