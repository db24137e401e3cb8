"""Google's .npz files: ViTs and hybrids of vit_jax, ViTs of big_vision (class token, GAP or MAP), and Big Transfer's ResNets.

Flax keeps kernels as (in, out), convolutions as (height, width, in, out), heads as an axis of their own, and its GELU is the tanh
approximation. The files are read, not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from pipeline.core.errors import CheckpointError
from pipeline.models.formats.files import Source
from pipeline.models.formats.imported import HALVES, Plan, outputs, side_of, wanted
from pipeline.models.formats.keys import Change, Rule, Tensors, count, rule, strip_prefix

_PREFIXES = ("", "opt/target/", "params/", "params/img/", "img/", "target/")
_BIT = "resnet/root_block/standardized_conv2d/kernel"
_KERNEL = Change(lambda t: t.permute(3, 2, 0, 1) if t.ndim == 4 else t.t())
_INTO_HEADS = Change(lambda t: t.flatten(1).t() if t.ndim == 3 else t.flatten())  # (D, h, d), and its bias (h, d)
_OUT_OF_HEADS = Change(lambda t: t.flatten(0, 1).t())  # (h, d, D)
_FLAT = Change(lambda t: t.flatten())  # GroupNorm's (1, 1, 1, C)


def recognises(names: Mapping[str, Any]) -> bool:
    return _BIT in names or any(f"{prefix}embedding/kernel" in names for prefix in _PREFIXES)


def plan(source: Source, given: Mapping[str, Any]) -> Plan:
    """Raises CheckpointError where the file is no whole model."""
    if _BIT in source.tensors:
        return _bit(source)
    prefix = next(prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in source.tensors)
    tensors, hybrid = _canonical(strip_prefix(source.tensors, prefix), source.url)
    url = source.url
    kernel = wanted(tensors, "embedding/kernel", url, 4)
    width = kernel.shape[-1]
    query = wanted(tensors, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", url, 3)
    stem = tuple(count(tensors, f"block{n + 1}/unit{{i}}/") for n in range(hybrid)) if hybrid else None
    pool = "map" if "MAPHead_0/probe" in tensors else "token" if "cls" in tensors else "gap"
    patch = kernel.shape[0] * (4 * 2 ** (hybrid - 1) if hybrid else 1)
    rows = wanted(tensors, "pos", url, 3).shape[1] - ("cls" in tensors)
    options: dict[str, Any] = {
        "pixels": side_of(rows, url, "pos_embedding") * patch,
        "classes": outputs(tensors, "head/kernel", url, axis=-1),
        "patch": patch,
        "width": width,
        "depth": count(tensors, "Transformer/encoderblock_{i}/"),
        "heads": query.shape[1],
        "mlp": wanted(tensors, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", url, 2).shape[-1],
        "pool": pool,
        "class_token": "cls" in tensors,
        "positions": "learned",
        "representation": outputs(tensors, "pre_logits/kernel", url, axis=-1) or None,
        "stem": stem,
    }
    return Plan(
        "Google ViT (.npz)", "vit", options, tensors, {"activation": "gelu-tanh", "resize": "google"}, _vit_rules(), normalisation=HALVES
    )


def _canonical(tensors: Tensors, url: str) -> tuple[Tensors, int]:
    """The names of vit_jax for all variants, units of stages counted from 0, positions as `pos` with a row for the class token; and
    how many stages a ResNet has before the Transformer."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in (
            (r"(?:Transformer/posembed_input/)?pos_embedding", "pos"),
            (r"(Transformer/encoderblock_?\d*|MAPHead_0)/MlpBlock_\d/(.*)", r"\1/MlpBlock_3/\2"),
            (r"(Transformer/encoderblock_?\d*|MAPHead_0)/MultiHeadDotProductAttention_\d/(.*)", r"\1/MultiHeadDotProductAttention_1/\2"),
            (r"(Transformer/encoderblock_?\d*)/LayerNorm_1/(.*)", r"\1/LayerNorm_2/\2"),
        ):
            if match := re.fullmatch(old, name):
                name = match.expand(new)
        name = re.sub(r"^(block\d+)/unit(\d+)/", lambda m: f"{m[1]}/unit{int(m[2]) - 1}/", name)
        if scanned := re.fullmatch(r"Transformer/encoderblock/(.*)", name):  # layers are an axis
            found |= {f"Transformer/encoderblock_{i}/{scanned[1]}": part for i, part in enumerate(tensor.unbind())}
        else:
            found[name] = tensor
    if "cls" in found and "pos" in found and found["pos"].ndim == 3:
        rows = found["pos"].shape[1]
        if round(rows**0.5) ** 2 == rows:  # big_vision adds positions before the class token is there
            found["pos"] = F.pad(found["pos"], (0, 0, 1, 0))
    return found, count(found, "block{i}/")


def _vit_rules() -> list[Rule]:
    block, theirs = "blocks.{i}", "Transformer/encoderblock_{i}"
    attention, pool = f"{theirs}/MultiHeadDotProductAttention_1", "MAPHead_0/MultiHeadDotProductAttention_1"
    stem = "patch_embed.backbone"
    return [
        rule("cls_token", "cls"),
        rule("pos_embed", "pos"),
        *_dense("patch_embed.proj", "embedding"),
        *_norm(f"{block}.norm1", f"{theirs}/LayerNorm_0"),
        *_heads(f"{block}.attn.qkv", *(f"{attention}/{part}" for part in ("query", "key", "value"))),
        *_out(f"{block}.attn.proj", f"{attention}/out"),
        *_norm(f"{block}.norm2", f"{theirs}/LayerNorm_2"),
        *_dense(f"{block}.mlp.fc1", f"{theirs}/MlpBlock_3/Dense_0"),
        *_dense(f"{block}.mlp.fc2", f"{theirs}/MlpBlock_3/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        rule("attn_pool.latent", "MAPHead_0/probe"),
        *_heads("attn_pool.q", f"{pool}/query"),
        *_heads("attn_pool.kv", f"{pool}/key", f"{pool}/value"),
        *_out("attn_pool.proj", f"{pool}/out"),
        *_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0"),
        *_dense("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_3/Dense_0"),
        *_dense("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_3/Dense_1"),
        *_dense("pre_logits", "pre_logits"),
        *_dense("head", "head"),
        rule(f"{stem}.stem.conv.weight", "conv_root/kernel", change=_KERNEL),
        *_norm(f"{stem}.stem.norm", "gn_root"),
        *(r for stage in range(4) for r in _stage_rules(f"{stem}.stages.{stage}.blocks.{{i}}", f"block{stage + 1}/unit{{i}}")),
    ]


def _stage_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        *(rule(f"{ours}.conv{n}.weight", f"{theirs}/conv{n}/kernel", change=_KERNEL) for n in (1, 2, 3)),
        *(r for n in (1, 2, 3) for r in _norm(f"{ours}.norm{n}", f"{theirs}/gn{n}")),
        rule(f"{ours}.downsample.conv.weight", f"{theirs}/conv_proj/kernel", change=_KERNEL),
        *_norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj"),
    ]


def _dense(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.weight", f"{theirs}/kernel", change=_KERNEL), rule(f"{ours}.bias", f"{theirs}/bias")]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.weight", f"{theirs}/scale", change=_FLAT), rule(f"{ours}.bias", f"{theirs}/bias", change=_FLAT)]


def _heads(ours: str, *theirs: str) -> list[Rule]:
    return [rule(f"{ours}.{p}", *(f"{t}/{q}" for t in theirs), change=_INTO_HEADS) for p, q in (("weight", "kernel"), ("bias", "bias"))]


def _out(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.weight", f"{theirs}/kernel", change=_OUT_OF_HEADS), rule(f"{ours}.bias", f"{theirs}/bias")]


def _bit(source: Source) -> Plan:
    tensors: Tensors = {}
    for name, tensor in source.tensors.items():
        new = re.sub(r"^resnet/block(\d+)/unit(\d+)/", lambda m: f"resnet/block{int(m[1]) - 1}/unit{int(m[2]) - 1}/", name)
        tensors[new] = tensor
    width = wanted(tensors, _BIT, source.url, 4).shape[-1]
    if width % 64:
        raise CheckpointError(f"{source.url}: its first convolution has {width} channels, a BiT's are a multiple of 64")
    options = {
        "depths": tuple(count(tensors, f"resnet/block{n}/unit{{i}}/") for n in range(count(tensors, "resnet/block{i}/"))),
        "factor": width // 64,
        "classes": outputs(tensors, "resnet/head/conv2d/kernel", source.url, 4, -1),
    }
    ours, theirs = "stages.{i}.blocks.{j}", "resnet/block{i}/unit{j}"
    rules = [
        rule("stem.conv.weight", _BIT, change=_KERNEL),
        *_group_norm("norm", "resnet/group_norm"),
        rule("head.fc.weight", "resnet/head/conv2d/kernel", change=_KERNEL),
        rule("head.fc.bias", "resnet/head/conv2d/bias"),
        rule(f"{ours}.downsample.conv.weight", f"{theirs}/a/proj/standardized_conv2d/kernel", change=_KERNEL),
    ]
    for n, letter in ((1, "a"), (2, "b"), (3, "c")):
        rules.append(rule(f"{ours}.conv{n}.weight", f"{theirs}/{letter}/standardized_conv2d/kernel", change=_KERNEL))
        rules += _group_norm(f"{ours}.norm{n}", f"{theirs}/{letter}/group_norm")
    return Plan("Google BiT (.npz)", "bit", options, tensors, {"pixels": 224, "numerics": "google"}, rules, normalisation=HALVES)


def _group_norm(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.weight", f"{theirs}/gamma", change=_FLAT), rule(f"{ours}.bias", f"{theirs}/beta", change=_FLAT)]
